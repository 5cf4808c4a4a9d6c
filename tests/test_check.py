"""Whether a checkpoint is whole: every kind of damage is found, named, and beside it all the others."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from convert.__main__ import main
from convert.check import check
from tiny import BASE, PARAMS, golden_state, golden_with_large_tensors, write_base

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


def found(folder: Path) -> dict[str, list[str]]:
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


def edit(file: Path, change: Callable[[State], Any]) -> None:
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


def flip(file: Path, tensor: Tensor, bit: int = 16) -> None:
    """One bit of a tensor's numbers, where they lie in the file."""
    content = bytearray(file.read_bytes())
    content[content.index(tensor.numpy().tobytes()) + 4 * 7 + 1] ^= bit
    file.write_bytes(content)


def held(folder: Path, name: str, key: str) -> Tensor:
    return torch.load(folder / name, weights_only=True)[key]


def test_a_whole_checkpoint(folder: Path) -> None:
    read: list[int] = []
    verdicts = list(check(folder, read.append))
    size = (folder / FIRST).stat().st_size
    assert [verdict.file.name for verdict in verdicts] == [
        *("params.json", "tokenizer.model", FIRST, SECOND, "checklist.chk")
    ]
    assert not any(verdict.problems for verdict in verdicts)
    assert verdicts[0].content == "3 layers of width 64" and verdicts[1].content == "512 tokens"
    assert verdicts[2].content == f"30 tensors of float32, {size / 1e3:.0f}kB"
    assert verdicts[4].content == "4 MD5 sums"
    assert sum(read) == size + (folder / SECOND).stat().st_size  # all of it, once


@pytest.mark.parametrize("shards", [1, 4])
def test_other_whole_checkpoints(shards: int, tmp_path: Path) -> None:
    assert not found(BASE)
    state = {key: t if key == NORM else t.bfloat16() for key, t in golden_state().items()}
    folder = write_base(tmp_path / "base", PARAMS | {"vocab_size": -1}, state, shards)
    for i, part in enumerate(state["tok_embeddings.weight"].chunk(shards, 1)):  # LLaMA-2's way
        change = {"tok_embeddings.weight": part.clone(), "rope.freqs": torch.ones(8)}
        edit(folder / f"consolidated.0{i}.pth", lambda s, change=change: s.update(change))
    assert not found(folder)
    assert list(check(folder))[2].content.startswith("29 tensors of bfloat16, 2 tensors of float32, ")


@pytest.mark.parametrize("key", [W2, NORM, "output.weight"])
def test_a_flipped_bit(key: str, folder: Path) -> None:
    flip(folder / SECOND, held(folder, SECOND, key))
    (folder / "checklist.chk").unlink()
    problems = found(folder)
    damaged = f"{SECOND}: {key} is damaged: its CRC-32 is not that of what was written"
    assert problems.pop(SECOND)[-1] == damaged and not problems


def test_a_flipped_bit_in_a_large_tensor(tmp_path: Path) -> None:
    """Above 1 MiB tensors are not looked at when a shard is opened."""
    params, state = golden_with_large_tensors()
    folder = write_base(tmp_path / "base", params, state)
    assert not found(folder)
    flip(folder / FIRST, state[W2])
    assert found(folder) == {FIRST: [f"{FIRST}: {W2} is damaged: its CRC-32 is not that of what was written"]}


def test_every_byte_of_a_shard_is_guarded(folder: Path) -> None:
    """By the checksums or, between the members, by the MD5 sum."""
    content = (folder / FIRST).read_bytes()
    for place in range(0, len(content), len(content) // 20):
        changed = bytearray(content)
        changed[place] ^= 4
        (folder / FIRST).write_bytes(changed)
        assert any("its MD5 sum is" in problem for problem in found(folder)[FIRST]), place


def test_numbers_that_are_not_finite(folder: Path) -> None:
    def change(state: State) -> None:
        state[W2][3, :5] = torch.nan
        state[W2][9, 1] = -torch.inf
        state["output.weight"][0, 0] = torch.inf

    edit(folder / SECOND, change)
    write_sums(folder)
    expected = {
        SECOND: [
            f"{SECOND}: output.weight has 1 of {256 * 64} values that are not finite numbers",
            f"{SECOND}: {W2} has 6 of {64 * 112} values that are not finite numbers",
        ]
    }
    assert found(folder) == expected


def test_sums(folder: Path) -> None:
    (folder / "README").write_text("read me")
    write_sums(folder)
    assert not found(folder)
    lines = (folder / "checklist.chk").read_text().splitlines()
    wrong = lines[0].replace(lines[0][:4], "0000")
    assert FIRST in lines[1] and "README" in lines[0]
    listed = [wrong, "f" * 32 + f" *{FIRST}", *lines[2:], "", "what?", "f" * 32 + "  ../x", "f" * 32 + "  gone.pth"]
    (folder / "checklist.chk").write_text("\r\n".join(listed))
    (folder / "params.json").write_text(json.dumps(PARAMS, indent=3))
    problems = found(folder)
    for name in (FIRST, "params.json"):
        assert len(problems[name]) == 1 and problems[name][0].startswith(f"{name}: its MD5 sum is "), name
    assert problems[FIRST][0].endswith(f", checklist.chk says {'f' * 32}")
    not_a_line = "is not an MD5 sum and the name of a file in this folder"
    assert [p for p in problems["checklist.chk"]] == [
        f"checklist.chk: line 7 {not_a_line}",
        f"checklist.chk: line 8 {not_a_line}",
        f"checklist.chk: lists README, whose MD5 sum is {lines[0][:32]}, not {wrong[:32]}",
        "checklist.chk: lists gone.pth, which is not there",
    ]
    assert problems.keys() == {FIRST, "params.json", "checklist.chk"}


DAMAGE = {
    "truncated": (lambda f: os.truncate(f, f.stat().st_size // 2), ["damaged, cut short or"]),
    "empty": (lambda f: os.truncate(f, 0), ["not what torch.save writes"]),
    "text": (lambda f: f.write_text("<html>"), ["not what torch.save writes"]),
    "list": (lambda f: torch.save([torch.zeros(1)], f), ["expected a dictionary, found list"]),
    "nested": (lambda f: torch.save({"model": golden_state()}, f), ["expected a dictionary of tensors"]),
    "missing": (
        lambda f: edit(f, lambda s: (s.pop(W2), s.pop(NORM))),
        [f"missing tensors {W2}, {NORM}"],
    ),
    "too many": (lambda f: edit(f, lambda s: s.update(extra=s[W2])), ["unexpected tensor extra"]),
    "shape": (
        lambda f: edit(f, lambda s: s.update({k: s[k][:, 1:].clone() for k in (W2, "output.weight")})),
        [f"{W2} has shape (64, 111), in {FIRST} (64, 112)", f"output.weight has shape (256, 63), in {FIRST} (256, 64)"],
    ),
    "type": (
        lambda f: edit(f, lambda s: s.update({W2: s[W2].half()})),
        [f"{W2} has type torch.float16, in {FIRST} torch.float32"],
    ),
    "integers": (lambda f: edit(f, lambda s: s.update({W2: s[W2].int()})), [f"{W2} has type torch.int32, expected"]),
    "norms": (
        lambda f: edit(f, lambda s: s[NORM].add_(1)),
        [f"{NORM} differs from that in {FIRST}, which should be the same"],
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_shards(case: str, folder: Path) -> None:
    damage, sentences = DAMAGE[case]
    damage(folder / SECOND)
    write_sums(folder)
    problems = found(folder)
    assert problems.keys() == {SECOND}
    assert len(problems[SECOND]) == len(sentences), problems
    for problem, words in zip(sorted(problems[SECOND]), sorted(sentences), strict=True):
        assert problem.startswith(SECOND) and words in problem


def test_shapes_other_than_params_json_says(folder: Path) -> None:
    (folder / "params.json").write_text(json.dumps(PARAMS | {"multiple_of": 64}))
    write_sums(folder)
    problems = found(folder)
    assert problems.keys() == {FIRST} and len(problems[FIRST]) == 9
    assert all(" of 2 shards: layers." in p and "feed_forward" in p for p in problems[FIRST])


def test_a_missing_shard(folder: Path) -> None:
    shutil.move(folder / FIRST, folder / "consolidated.02.pth")
    problems = found(folder)
    assert problems == {
        "": ["shard consolidated.00.pth is missing (2 present)"],
        "checklist.chk": ["checklist.chk: lists consolidated.00.pth, which is not there"],
    }


def test_all_at_once(folder: Path) -> None:
    """What is wrong with one file hides nothing of the others."""
    (folder / "params.json").write_text("{")
    (folder / "tokenizer.model").write_text("what?")
    flip(folder / FIRST, held(folder, FIRST, W2))
    flip(folder / FIRST, held(folder, FIRST, "output.weight"))
    edit(folder / SECOND, lambda s: s[W2].fill_(torch.nan))
    (folder / "checklist.chk").unlink()
    problems = found(folder)
    assert {name: len(sentences) for name, sentences in problems.items()} == {
        **{"params.json": 1, "tokenizer.model": 1},
        **{FIRST: 2, SECOND: 1},
    }
    assert {p.split()[1] for p in problems[FIRST]} == {W2, "output.weight"}
    (folder / SECOND).unlink()
    (folder / FIRST).unlink()
    assert found(folder)[""] == ["no consolidated.NN.pth (a Meta checkpoint's weights)"]


def test_another_models_tokenizer(folder: Path) -> None:
    (folder / "params.json").write_text(json.dumps(PARAMS | {"vocab_size": 511}))
    (folder / "checklist.chk").unlink()
    problems = found(folder)
    assert problems.keys() == {"tokenizer.model", FIRST} and "512 tokens" in problems["tokenizer.model"][0]
    assert [words in p for words, p in zip(("tok_embeddings", "output"), problems[FIRST], strict=True)] == [True, True]
    (folder / "params.json").write_text(json.dumps(PARAMS | {"vocab_size": -1}))
    assert not found(folder)
    (folder / "tokenizer.model").unlink()
    assert found(folder).keys() == {"tokenizer.model"}  # the vocabulary is not known, the rest is looked at


def test_nothing_is_executed_or_changed(folder: Path, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save(golden_state() | {"norm.weight": Code()}, folder / SECOND)
    write_sums(folder)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}
    assert list(found(folder)) == [SECOND]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()} == before
    assert not (tmp_path / "executed").exists()


def test_from_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([str(folder)], ["--ckpt_dir", str(folder)]):
        main(["check", *words])
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 5 and all(": ok (" in line for line in lines)
    flip(folder / FIRST, held(folder, FIRST, W2))
    flip(folder / SECOND, held(folder, SECOND, NORM))
    with pytest.raises(SystemExit) as caught:
        main(["check", str(folder)])
    assert caught.value.code == 1
    out, err = capsys.readouterr()
    assert f"{folder / FIRST}: 2 problems (30 tensors of float32" in out
    errors = err.splitlines()
    assert len(errors) == 5 and all(line.startswith(f"error: {folder}/consolidated.0") for line in errors)
    assert sum(f": {key} is damaged" in line for line in errors for key in (W2, NORM)) == 2
    for words, message, status in (([tmp_path / "none"], "none: no such folder", 1), ([], "--ckpt_dir is required", 2)):
        with pytest.raises(SystemExit) as caught:
            main(["check", *map(str, words)])
        error = capsys.readouterr().err
        assert caught.value.code == status and error.startswith("error: ") and message in error
