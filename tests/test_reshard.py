"""Another number of shards: the same numbers to the bit, cut as Meta cuts them, or a refusal that leaves nothing."""

import os
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from convert.__main__ import main
from convert.reshard import reshard
from convert_samples import edit_shard, flip_bit, load_shards, refused_by_command
from llama import Llama
from tiny import PARAMS, golden_state, shared, tokens, write_base

State = dict[str, Tensor]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def same(actual: list[State], expected: list[State]) -> None:
    """Shard by shard the same tensors to the bit, of the same types, and each with a file's space of its own."""
    assert len(actual) == len(expected)
    for state, other in zip(actual, expected, strict=True):
        assert list(state) == list(other)
        for key, tensor in other.items():
            assert state[key].dtype == tensor.dtype and torch.equal(state[key], tensor), key
            assert state[key].untyped_storage().nbytes() == state[key].nbytes, key


@pytest.mark.parametrize("kind", [*TYPES, "mixed"])
def test_there_and_back_is_the_identity(kind: str, tmp_path: Path) -> None:
    state = {key: t.to(TYPES.get(kind, torch.bfloat16)) for key, t in golden_state().items()}
    if kind == "mixed":
        state |= {"norm.weight": state["norm.weight"].float(), "output.weight": state["output.weight"].half()}
    folder = write_base(tmp_path / "start", PARAMS, state)
    for step, n in enumerate((2, 4, 1, 4, 2, 1)):
        result = reshard(folder, tmp_path / f"{step}", n)
        assert result.folder == tmp_path / f"{step}" and result.summary.endswith(f"now {n}")
        folder = result.folder
        # As the tests' own writer cuts them, which has Meta's rule by name
        same(load_shards(folder), load_shards(write_base(tmp_path / f"expected{step}", PARAMS, state, n)))
    assert sorted(p.name for p in folder.iterdir()) == ["consolidated.00.pth", "params.json", "tokenizer.model"]


def test_key_value_heads_that_several_shards_hold(tmp_path: Path) -> None:
    """Four shards of two heads, where each has a whole one."""
    base = write_base(tmp_path / "base", PARAMS, golden_state(), 4)
    keys = [f"layers.{layer}.attention.{name}.weight" for layer in range(3) for name in ("wk", "wv")]
    for i in range(4):
        heads = {key: golden_state()[key].chunk(2)[i // 2].clone() for key in keys}
        edit_shard(base / f"consolidated.0{i}.pth", lambda s, heads=heads: s.update(heads))
    for n in (1, 2, 4):
        reshard(base, tmp_path / f"{n}", n)
        same(
            load_shards(tmp_path / f"{n}"),
            load_shards(write_base(tmp_path / f"expected{n}", PARAMS, golden_state(), n)),
        )
    edit_shard(base / "consolidated.03.pth", lambda s: s["layers.2.attention.wk.weight"][3].add_(1))
    with pytest.raises(ValueError, match=r"03.pth: layers.2.attention.wk.weight differs from that in \S+02.pth"):
        reshard(base, tmp_path / "none", 1)


def test_what_goes_along_and_another_number_format(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", PARAMS | {"vocab_size": -1}, golden_state(), 2)
    for i in range(2):
        edit_shard(base / f"consolidated.0{i}.pth", lambda s: s.update({"rope.freqs": torch.arange(8.0)}))
    (base / "checklist.chk").write_text("not of the new files\n")
    reshard(base, tmp_path / "out", 4)
    for name in ("params.json", "tokenizer.model"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "out" / "checklist.chk").exists()
    assert all(torch.equal(state["rope.freqs"], torch.arange(8.0)) for state in load_shards(tmp_path / "out"))
    batch = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(Llama.build(tmp_path / "out").model(batch), shared(None).model(batch))
    base = write_base(tmp_path / "whole", PARAMS, golden_state())
    reshard(base, tmp_path / "bf16", 2, dtype="bf16")
    expected = {key: tensor.bfloat16() for key, tensor in golden_state().items()}
    same(load_shards(tmp_path / "bf16"), load_shards(write_base(tmp_path / "expected", PARAMS, expected, 2)))
    edit_shard(base / "consolidated.00.pth", lambda s: s["output.weight"].fill_(1e5))
    with pytest.raises(ValueError, match="whole: output.weight has values that are not finite numbers in fp16"):
        reshard(base, tmp_path / "half", 2, dtype="fp16")
    assert not (tmp_path / "half").exists()


@pytest.mark.parametrize(
    "params, n, numbers",
    [
        ({}, 3, ["3 does not divide 4 (n_heads)", "512 (tok_embeddings.weight)", "64 (layers.0.attention"]),
        ({}, 8, ["8 does not divide 4 (n_heads)"]),  # a query head has one shard
        ({"n_heads": 12, "n_kv_heads": 4, "dim": 48}, 6, ["6 does not divide 4 (n_kv_heads)", "512 (tok_emb"]),
        ({}, 100, ["1 to 99 shards, not 100"]),
        ({}, 0, ["1 to 99 shards, not 0"]),
    ],
)
def test_numbers_that_do_not_divide(params: dict, n: int, numbers: list[str], tmp_path: Path, monkeypatch) -> None:
    base = write_base(tmp_path / "base", PARAMS | params, golden_state())
    monkeypatch.setattr(torch, "load", None)  # no shard is looked at
    with pytest.raises(ValueError) as caught:
        reshard(base, tmp_path / "out", n)
    message = str(caught.value)
    assert "\n" not in message and all(words in message for words in numbers), message
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


W2 = "layers.1.feed_forward.w2.weight"


# The rest of what can be wrong with a shard: test_check.py
DAMAGE = {
    "a bit": (lambda f: flip_bit(f, W2), r"01.pth: damaged \(checksum"),
    "gone": (lambda f: f.rename(f.with_name("consolidated.02.pth")), "shard consolidated.01.pth is missing"),
    "missing": (lambda f: edit_shard(f, lambda s: s.pop(W2)), f"01.pth: missing tensor {W2}"),
    "norm": (lambda f: edit_shard(f, lambda s: s["norm.weight"][1:2].add_(1)), "01.pth: norm.weight differs from that"),
    "nan": (lambda f: edit_shard(f, lambda s: s[W2][1:2].fill_(torch.nan)), f"{W2} has values that are not finite"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_shards(case: str, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", PARAMS, golden_state(), 2)
    damage, message = DAMAGE[case]
    damage(base / "consolidated.01.pth")
    for n in (1, 4):
        with pytest.raises(ValueError, match=message) as caught:
            reshard(base, tmp_path / "out", n)
        assert "\n" not in str(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_one_shard_in_memory_and_nothing_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk fills up at the third, or Ctrl-C comes, nothing is left, and what is there stays."""
    base, alive = write_base(tmp_path / "base", PARAMS, golden_state()), []
    reshard(base, tmp_path / "out", 2)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def save(state: State, path: Path) -> None:
        assert all(tensor() is None for tensor in alive), "the last shard is still in memory"
        assert not set(os.listdir(tmp_path)) - {"base", "out"} - {path.parent.parent.name}
        assert sum(t.untyped_storage().nbytes() for t in state.values()) == sum(t.nbytes for t in state.values())
        alive.extend(weakref.ref(tensor) for tensor in state.values())
        if path.name == "consolidated.02.pth":
            raise KeyboardInterrupt if overwrite else OSError(28, "No space left on device", str(path))
        path.write_bytes(b"shard")

    monkeypatch.setattr("convert.reshard.save_shard", save)
    for overwrite in (False, True):
        alive.clear()
        target = tmp_path / ("out" if overwrite else "new")
        with pytest.raises(KeyboardInterrupt if overwrite else OSError):
            reshard(base, target, 4, overwrite=overwrite)
        assert len(alive) == 3 * len(golden_state())
        assert sorted(os.listdir(tmp_path)) == ["base", "out"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = write_base(tmp_path / "base", PARAMS, golden_state()), tmp_path / "out"
    flags = ["reshard", "--ckpt_dir", str(base), "--output_dir", str(out)]

    main([*flags, "--shards", "4"])
    assert f"wrote {out} (shards: 1 before, now 4)" in capsys.readouterr().out
    assert len(load_shards(out)) == 4
    refused_by_command([*flags, "--shards", "2"], capsys, "out: exists already (--overwrite replaces it)")
    main([*flags, "--shards", "2", "--overwrite"])
    assert len(load_shards(out)) == 2 and sorted(os.listdir(tmp_path)) == ["base", "out"]
    refused_by_command([*flags, "--shards", "3", "--overwrite"], capsys, "3 does not divide 4 (n_heads)")
    refused_by_command([*flags, "--shards", "0"], capsys, "--shards must be at least 1", status=2)
    refused_by_command(flags, capsys, "--shards is required", status=2)
    back = ["reshard", "--ckpt_dir", str(out), "--output_dir", str(out), "--shards", "1", "--overwrite"]
    refused_by_command(back, capsys, "is the base itself")
    assert len(load_shards(out)) == 2
