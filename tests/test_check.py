"""Whether a checkpoint is whole: every kind of damage is seen, named, and beside it all the others."""

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
    """A sound checkpoint in two shards."""
    return write_base(tmp_path / "base", PARAMS, golden_state(), 2)


def problems_of(folder: Path) -> list[str]:
    """All that is wrong with a checkpoint, sorted, without the folder's name."""
    with pytest.raises(ValueError) as caught:
        check(folder)
    return sorted(problem.replace(f"{folder}/", "") for problem in str(caught.value).split("\nerror: "))


@pytest.mark.parametrize("shards", [1, 4])
def test_whole_checkpoints(shards: int, tmp_path: Path) -> None:
    assert check(BASE).startswith(f"{BASE}: whole (3 layers, 512 tokens, shards: 1, ")
    state = {key: t if key == NORM else t.bfloat16() for key, t in golden_state().items()}
    folder = write_base(tmp_path / "base", PARAMS | {"vocab_size": -1}, state, shards)
    for file in folder.glob("*.pth"):
        edit_shard(file, lambda s: s.update({"rope.freqs": torch.ones(8)}))
    assert f"shards: {shards}, " in check(folder)


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
    problems = problems_of(folder)
    assert len(problems) == len(sentences), problems
    for problem, words in zip(problems, sorted(sentences), strict=True):
        assert problem.startswith(f"{SECOND}: ") and words in problem and "\n" not in problem


def test_all_at_once(folder: Path) -> None:
    """What is wrong with one shard hides nothing of the others; without params.json none can be judged."""
    flip_bit(folder / FIRST, W2)
    flip_bit(folder / FIRST, "output.weight")
    edit_shard(folder / SECOND, lambda s: s[W2].fill_(torch.nan))
    assert [problem.split()[:2] for problem in problems_of(folder)] == [
        [f"{FIRST}:", W2],
        [f"{FIRST}:", "output.weight"],
        [f"{SECOND}:", W2],
    ]
    (folder / SECOND).unlink()
    shutil.copy(folder / FIRST, folder / "consolidated.02.pth")
    assert "shard consolidated.01.pth is missing (2 present)" in problems_of(folder)[0]
    (folder / "params.json").write_text("{")
    assert len(problems_of(folder)) == 1 and problems_of(folder)[0].startswith("params.json: not valid JSON")


def test_a_params_json_of_another_model(folder: Path) -> None:
    (folder / "params.json").write_text(json.dumps(PARAMS | {"multiple_of": 64}))  # the feed-forward's width
    problems = problems_of(folder)
    assert len(problems) == 9 and all(" of 2 shards: layers." in p and "feed_forward" in p for p in problems)
    (folder / "params.json").write_text(json.dumps(PARAMS | {"vocab_size": 511}))
    assert problems_of(folder)[0].startswith("tokenizer.model: has 512 tokens")


def test_from_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([str(folder)], ["--ckpt_dir", str(folder)]):
        main(["check", *words])
        assert ": whole (3 layers, 512 tokens, shards: 2, " in capsys.readouterr().out
    flip_bit(folder / FIRST, W2)
    flip_bit(folder / SECOND, "output.weight")
    with pytest.raises(SystemExit) as caught:
        main(["check", str(folder)])
    errors = capsys.readouterr().err.splitlines()
    assert caught.value.code == 1 and len(errors) == 2
    for line, name, key in zip(errors, (FIRST, SECOND), (W2, "output.weight"), strict=True):
        assert line.startswith(f"error: {folder / name}: {key} is damaged")
    refused_by_command(["check", str(tmp_path / "none")], capsys, "none: no such folder")
    refused_by_command(["check"], capsys, "--ckpt_dir is required", status=2)
