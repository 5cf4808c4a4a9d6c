"""Whether a checkpoint is whole: every kind of damage is found, named, and beside it all the others."""

import hashlib
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from convert.__main__ import main
from convert.check import check
from convert_samples import edit_shard, flip_bit, refused_by_command
from tiny import BASE, PARAMS, golden_state, write_base

State = dict[str, Tensor]
W2, NORM = "layers.1.feed_forward.w2.weight", "layers.2.ffn_norm.weight"
FIRST, SECOND = "consolidated.00.pth", "consolidated.01.pth"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint in two shards, with Meta's list of MD5 sums."""
    folder = write_base(tmp_path / "base", PARAMS, golden_state(), 2)
    write_sums(folder)
    return folder


def write_sums(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.name != "checklist.chk")
    lines = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "checklist.chk").write_text("".join(lines))


def problems_of(folder: Path) -> dict[str, list[str]]:
    """File -> its problems, each without the folder's name; files that are in order are left out."""
    verdicts = list(check(folder))
    for file, _, problems in verdicts:
        assert all(p.startswith(str(file)) and "\n" not in p for p in problems), problems
    names = {verdict.file: verdict.file.name if verdict.file != folder else "" for verdict in verdicts}
    assert len(names) == len(verdicts)
    return {
        names[file]: [p.replace(f"{folder}/", "").replace(f"{folder}: ", "") for p in problems]
        for file, _, problems in verdicts
        if problems
    }


def test_a_whole_checkpoint(folder: Path) -> None:
    verdicts = {verdict.file.name: verdict for verdict in check(folder)}
    assert not any(verdict.problems for verdict in verdicts.values())
    size = (folder / FIRST).stat().st_size
    assert {name: verdict.content for name, verdict in verdicts.items()} == {
        "params.json": "3 layers of width 64",
        "tokenizer.model": "512 tokens",
        **dict.fromkeys((FIRST, SECOND), f"30 tensors of float32, {size / 1e3:.0f}kB"),
        "checklist.chk": "4 MD5 sums",
    }


@pytest.mark.parametrize("shards", [1, 4])
def test_other_whole_checkpoints(shards: int, tmp_path: Path) -> None:
    assert not problems_of(BASE)
    state = {key: t if key == NORM else t.bfloat16() for key, t in golden_state().items()}
    folder = write_base(tmp_path / "base", PARAMS | {"vocab_size": -1}, state, shards)
    for file in folder.glob("*.pth"):
        edit_shard(file, lambda s: s.update({"rope.freqs": torch.ones(8)}))
    assert not problems_of(folder)
    assert {v.file.name: v for v in check(folder)}[FIRST].content.startswith(
        "29 tensors of bfloat16, 2 tensors of float32, "
    )


def test_sums(folder: Path) -> None:
    (folder / "README").write_text("read me")
    write_sums(folder)
    assert not problems_of(folder)
    lines = (folder / "checklist.chk").read_text().splitlines()
    wrong = lines[0].replace(lines[0][:4], "0000")
    assert FIRST in lines[1] and "README" in lines[0]
    listed = [wrong, "f" * 32 + f" *{FIRST}", *lines[2:], "", "what?", "f" * 32 + "  ../x", "f" * 32 + "  gone.pth"]
    (folder / "checklist.chk").write_text("\r\n".join(listed))
    (folder / "params.json").write_text(json.dumps(PARAMS, indent=3))
    problems = problems_of(folder)
    for name in (FIRST, "params.json", "README"):
        assert len(problems[name]) == 1 and problems[name][0].startswith(f"{name}: its MD5 sum is "), name
    assert problems[FIRST][0].endswith(f", checklist.chk says {'f' * 32}")
    not_a_line = "is not an MD5 sum and the name of a file in this folder"
    assert [p for p in problems["checklist.chk"]] == [
        f"checklist.chk: line 7 {not_a_line}",
        f"checklist.chk: line 8 {not_a_line}",
        "checklist.chk: lists gone.pth, which is not there",
    ]
    assert problems.keys() == {FIRST, "params.json", "README", "checklist.chk"}


def not_finite(state: State) -> None:
    state[W2][3, :5] = torch.nan
    state[W2][9, 1] = -torch.inf
    state["output.weight"][0, 0] = torch.inf


EDITS = {
    "missing": (lambda s: (s.pop(W2), s.pop(NORM)), [f"missing tensors {W2}, {NORM}"]),
    "too many": (lambda s: s.update(extra=s[W2]), ["unexpected tensor extra"]),
    "shape": (
        lambda s: s.update({key: s[key][:, 1:].clone() for key in (W2, "output.weight")}),
        [f"{W2} has shape (64, 111), in {FIRST} (64, 112)", f"output.weight has shape (256, 63), in {FIRST} (256, 64)"],
    ),
    "type": (lambda s: s.update({W2: s[W2].half()}), [f"{W2} has type torch.float16, in {FIRST} torch.float32"]),
    "integers": (lambda s: s.update({W2: s[W2].int()}), [f"{W2} is not a plain tensor of floating-point numbers"]),
    "norms": (lambda s: s[NORM].add_(1), [f"{NORM} differs from that in {FIRST}, which should be the same"]),
    "not finite": (
        not_finite,
        [
            f"output.weight has 1 of {256 * 64} values that are not finite numbers",
            f"{W2} has 6 of {64 * 112} values that are not finite numbers",
        ],
    ),
}
DAMAGE = {
    "truncated": (lambda f: os.truncate(f, f.stat().st_size // 2), ["damaged, cut short or"]),
    "text": (lambda f: f.write_text("<html>"), ["not what torch.save writes"]),
    "list": (lambda f: torch.save([torch.zeros(1)], f), ["expected a dictionary, found list"]),
    "nested": (lambda f: torch.save({"model": golden_state()}, f), ["expected a dictionary of tensors"]),
    "a bit": (lambda f: flip_bit(f, W2), [f"{W2} is damaged: its CRC-32 is not that of what was written"]),
    "a bit of a copy": (lambda f: flip_bit(f, NORM), [f"{NORM} differs from that", f"{NORM} is damaged: its CRC-32"]),
}
DAMAGE |= {case: (partial(edit_shard, change=change), sentences) for case, (change, sentences) in EDITS.items()}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_shards(case: str, folder: Path) -> None:
    damage, sentences = DAMAGE[case]
    damage(folder / SECOND)
    write_sums(folder)
    problems = problems_of(folder)
    assert problems.keys() == {SECOND}
    assert len(problems[SECOND]) == len(sentences), problems
    for problem, words in zip(sorted(problems[SECOND]), sorted(sentences), strict=True):
        assert problem.startswith(SECOND) and words in problem


def test_a_missing_shard(folder: Path) -> None:
    shutil.move(folder / FIRST, folder / "consolidated.02.pth")
    problems = problems_of(folder)
    assert problems == {
        "": ["shard consolidated.00.pth is missing (2 present)"],
        "checklist.chk": ["checklist.chk: lists consolidated.00.pth, which is not there"],
    }


def test_all_at_once(folder: Path) -> None:
    """What is wrong with one file hides nothing of the others."""
    (folder / "params.json").write_text("{")
    (folder / "tokenizer.model").write_text("what?")
    flip_bit(folder / FIRST, W2)
    flip_bit(folder / FIRST, "output.weight")
    edit_shard(folder / SECOND, lambda s: s[W2].fill_(torch.nan))
    (folder / "checklist.chk").unlink()
    problems = problems_of(folder)
    assert {name: len(sentences) for name, sentences in problems.items()} == {
        **{"params.json": 1, "tokenizer.model": 1},
        **{FIRST: 2, SECOND: 1},
    }
    assert {p.split()[1] for p in problems[FIRST]} == {W2, "output.weight"}
    (folder / SECOND).unlink()
    (folder / FIRST).unlink()
    assert problems_of(folder)[""] == ["no consolidated.NN.pth (a Meta checkpoint's weights)"]


def test_a_params_json_of_another_model(folder: Path) -> None:
    (folder / "checklist.chk").unlink()
    for changes, names, count in (
        ({"multiple_of": 64}, {FIRST}, 9),  # the feed-forward's width
        ({"vocab_size": 511}, {"tokenizer.model", FIRST}, 2),
        ({"vocab_size": -1}, set(), 0),
    ):
        (folder / "params.json").write_text(json.dumps(PARAMS | changes))
        problems = problems_of(folder)
        assert problems.keys() == names and len(problems.get(FIRST, ())) == count
    (folder / "tokenizer.model").unlink()
    assert problems_of(folder).keys() == {"tokenizer.model"}  # the vocabulary is not known, the rest is looked at


def test_from_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([str(folder)], ["--ckpt_dir", str(folder)]):
        main(["check", *words])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 5 and all(": ok (" in line for line in lines)
    flip_bit(folder / FIRST, W2)
    flip_bit(folder / SECOND, NORM)
    with pytest.raises(SystemExit) as caught:
        main(["check", str(folder)])
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert f"{folder / FIRST}: 2 problems (30 tensors of float32" in out
    errors = err.splitlines()
    assert len(errors) == 5 and all(line.startswith(f"error: {folder}/consolidated.0") for line in errors)
    assert sum(f": {key} is damaged" in line for line in errors for key in (W2, NORM)) == 2
    refused_by_command(["check", str(tmp_path / "none")], capsys, "none: no such folder")
    refused_by_command(["check"], capsys, "--ckpt_dir is required", status=2)
