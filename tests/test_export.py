"""Plain LoRA merged into its base, what no converter takes, and the authors' format."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from convert.__main__ import main
from convert.adapters import merge, to_reference
from convert.peft import from_peft, to_peft
from convert_samples import close, edit_shard, load_shards, refused_by_command
from llama import Llama
from moa.adapter import AdapterModule, Target, normal
from moa.config import AdapterConfig
from moa.lora import LoRA
from moa.methods import ADAPTERS, LINEAR_TARGETS, META_NAMES, AdapterType, LoRAConfig, option
from tiny import (
    ARGS,
    BASE,
    BASELINES,
    GOLDEN,
    METHODS,
    PARAMS,
    golden_state,
    save,
    shared,
    tokens,
    write_base,
)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Random LoRAs at every linear layer of the golden base."""
    return save(shared("lora"), tmp_path / "adapter")


# --- merging ---


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_merged_checkpoint_has_the_adapters_logits(n: int, adapter: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", PARAMS | {"vocab_size": -1}, golden_state(), n)
    if n == 4:
        for file in base.glob("*.pth"):
            edit_shard(file, lambda s: s.update({"rope.freqs": torch.ones(8)}))
    result = merge(base, adapter, tmp_path / "merged")
    assert result.summary == f"matrices changed: {7 * ARGS.n_layers}, shards: {n} before, now {n}"
    for name in ("params.json", "tokenizer.model"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    plain = load_shards(write_base(tmp_path / "plain", PARAMS, golden_state(), n))  # cut as LLaMA-3's
    changed = tuple(f"{name}.weight" for name in META_NAMES.values())
    for before, after in zip(plain, load_shards(tmp_path / "merged"), strict=True):
        assert before.keys() == after.keys() - {"rope.freqs"}
        assert all(torch.equal(after[key], tensor) != key.endswith(changed) for key, tensor in before.items())
    batch = tokens(2, 12)
    merged = Llama.build(tmp_path / "merged").model(batch)
    close(merged, shared("lora").model(batch), shared(None).model(batch))


@pytest.mark.parametrize("dtype", [None, "fp16", "fp32"])
def test_number_formats(dtype: str | None, adapter: Path, tmp_path: Path) -> None:
    state = {key: t if key == "norm.weight" else t.bfloat16() for key, t in golden_state().items()}
    base = write_base(tmp_path / "base", PARAMS, state)
    merge(base, adapter, tmp_path / "merged", dtype)
    actual, lora = load_shards(tmp_path / "merged")[0], torch.load(adapter, weights_only=True)
    kind = {None: torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    assert actual["norm.weight"].dtype == (kind if dtype else torch.float32)
    for layer in range(ARGS.n_layers):
        for target, name in META_NAMES.items():
            part, key = name.partition(".")[0], f"layers.{layer}.{name}.weight"
            a, b = (lora[f"layers.{layer}.{part}.adapters.lora_{target}.lora_{ab}"].double() for ab in "AB")
            exact = state[key].double() + 6 / 4 * torch.einsum("or,ri->oi", b, a)
            assert actual[key].dtype == kind
            # Half a unit in the last place, and float32's own rounding before it
            torch.testing.assert_close(actual[key].double(), exact, rtol=torch.finfo(kind).eps / 2 + 1e-6, atol=2e-6)


@torch.no_grad()
def test_an_adapter_of_the_authors_merges_to_their_logits(tmp_path: Path) -> None:
    merge(BASE, GOLDEN / "lora" / "adapter.pth", tmp_path / "merged")
    expected = np.load(GOLDEN / "lora" / "expected.npz")
    batch = torch.from_numpy(expected["tokens"])
    actual = Llama.build(tmp_path / "merged").model(batch)
    valid = batch != 0  # their padding; ours has none
    torch.testing.assert_close(actual[valid], torch.from_numpy(expected["logits"])[valid], atol=2e-4, rtol=2e-4)


# --- refusals ---

NOT_PLAIN = {
    "prompt": ["prompt_layers 0-3"],
    "parallel_adapter": ["p_adapter_layers 0-3"],
    "soft_moa": ["prompt_layers 1-3", "p_adapter_layers 0-1,2-3", "block_router soft"],
    "hydralora": ["expert_num 3"],
    "lora_bias_norm": ["train_bias_norm True"],
    "LoRA behind a router": ["block_router soft"],
    "pissa": ["pissa_layers 0-3"],
}


@pytest.mark.parametrize("name", NOT_PLAIN)
def test_what_is_more_than_plain_lora(name: str, tmp_path: Path) -> None:
    flat = (METHODS | BASELINES).get(name, METHODS["lora"] | {"block_router": "soft"})
    path = save(Llama.build(BASE, config=AdapterConfig.from_dict(flat, ARGS.n_layers)), tmp_path / "adapter")
    for convert in (lambda: to_peft(path, tmp_path / "out"), lambda: merge(BASE, path, tmp_path / "out")):
        with pytest.raises(ValueError, match="adapter.pth: only plain LoRA can be converted") as caught:
            convert()
        assert all(words in str(caught.value) for words in NOT_PLAIN[name])
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@dataclass(frozen=True)
class MagnitudeConfig(LoRAConfig):
    magnitude: bool = option(True, "a trained factor per output")


@dataclass(frozen=True)
class ScaledConfig(LoRAConfig):
    factor: float = option(3.0, "weight of all updates")


@dataclass(frozen=True)
class ShiftConfig:
    layers: str = option("", "layers with a trained shift of the outputs")


class Magnitude(LoRA):
    """LoRA with a trained factor per output, as DoRA has."""

    def __init__(self, target: Target, config: AdapterConfig):
        super().__init__(target, config)
        self.add_parameter("magnitude", (target.out_features,), normal, target.shard_outputs(0))


class Shift(AdapterModule):
    def __init__(self, target: Target, config: AdapterConfig):
        super().__init__()
        self.add_parameter("shift", (target.out_features,), normal, target.shard_outputs(0))


# What a contributor may register -> what a converter says of it
UNKNOWN = {
    "a tensor and its setting": (("lora", MagnitudeConfig, "Magnitude", LINEAR_TARGETS), "lora_magnitude True"),
    "a tensor": (("lora", LoRAConfig, "Magnitude", LINEAR_TARGETS), "unexpected tensors? .*lora_Q.magnitude"),
    "a setting": (("lora", ScaledConfig, "LoRA", LINEAR_TARGETS), "lora_factor 3.0"),
    "an adapter type": (("shift", ShiftConfig, "Shift", ("Q",)), "shift_layers 1-2"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_adapters_that_a_converter_does_not_know(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = save(shared("lora"), tmp_path / "plain")
    to_peft(plain, tmp_path / "peft")
    (name, options, module, targets), message = UNKNOWN[case]
    monkeypatch.setitem(ADAPTERS, name, AdapterType(options, f"{__name__}:{module}", targets))
    flat = METHODS["lora"] | ({"shift_layers": "1-2"} if name == "shift" else {})
    llm = Llama.build(BASE, config=AdapterConfig.from_dict(flat, ARGS.n_layers))
    path, out = save(llm, tmp_path / "adapter"), tmp_path / "out"
    conversions = {
        "merge": lambda: merge(BASE, path, out),
        "peft": lambda: to_peft(path, out),
        "reference": lambda: to_reference(path, out),
    }
    for convert in conversions.values():
        with pytest.raises(ValueError, match=f"adapter.pth: .*{message}") as caught:
            convert()
        assert "\n" not in str(caught.value)
    if name == "lora":  # then a folder of plain LoRA is none of what is registered
        with pytest.raises(ValueError, match="missing adapter tensor|only plain LoRA"):
            from_peft(tmp_path / "peft", BASE, out)
    else:
        from_peft(tmp_path / "peft", BASE, tmp_path / "back")  # which has none of the new adapters
    assert not out.exists()


def test_a_base_of_another_shape(adapter: Path, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", PARAMS | {"n_heads": 8}, golden_state())
    with pytest.raises(ValueError, match="the adapter was trained on a base with n_heads 4, this one has 8"):
        merge(base, adapter, tmp_path / "out")


def test_a_sum_beyond_the_number_format(adapter: Path, tmp_path: Path) -> None:
    w2 = "layers.1.feed_forward.w2.weight"
    base = write_base(tmp_path / "base", PARAMS, golden_state() | {w2: torch.full((64, ARGS.ffn_dim), 1e5)})
    with pytest.raises(ValueError, match=f"base: {w2} has values that are not finite numbers in fp16"):
        merge(base, adapter, tmp_path / "out", dtype="fp16")
    merge(base, adapter, tmp_path / "out")


def test_output_folders_of_other_things_stay(adapter: Path, tmp_path: Path) -> None:
    """A checkpoint is no place for a PEFT adapter, nor is a base for itself, whatever --overwrite says."""
    base = write_base(tmp_path / "base", PARAMS, golden_state())
    with pytest.raises(ValueError, match="is the base itself"):
        merge(base, adapter, tmp_path / "adapter" / ".." / "base", overwrite=True)
    for _ in range(2):
        to_peft(adapter, tmp_path / "peft", overwrite=True)
    with pytest.raises(ValueError, match="peft: holds adapter_"):
        merge(BASE, adapter, tmp_path / "peft", overwrite=True)


# --- the command line ---


def test_merge_from_the_command_line(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ckpt_dir", str(BASE), "--adapter_path", str(adapter.parent), "--output_dir", str(tmp_path / "merged")]
    main(["merge", *flags, "--dtype", "bf16"])
    assert "merged (matrices changed: 21, shards: 1 before, now 1)" in capsys.readouterr().out
    assert {t.dtype for t in load_shards(tmp_path / "merged")[0].values()} == {torch.bfloat16}
    refused_by_command(["merge", *flags], capsys, "exists already (--overwrite replaces it)")


# The authors' format


def test_ours_for_the_authors_by_command(tmp_path: Path) -> None:
    llm, batch = shared("molora"), tokens(2, 7)
    path = save(llm, tmp_path / "ours")
    main(["reference", "--adapter_path", str(path), "--output_dir", str(tmp_path / "theirs")])
    assert sorted(f.name for f in (tmp_path / "theirs").iterdir()) == ["adapter.pth", "adapter_params.json"]
    assert all(key.startswith("llama.") for key in torch.load(tmp_path / "theirs" / "adapter.pth", weights_only=True))
    other = Llama.build(BASE, tmp_path / "theirs", device="cpu")
    assert torch.equal(other.model(batch), llm.model(batch))


def test_what_the_authors_format_cannot_hold_is_refused(tmp_path: Path, capsys) -> None:
    path = save(shared("custom"), tmp_path / "ours")
    for source, words in ((path, "gate_activation softmax"), (GOLDEN / "lora" / "adapter.pth", "the shape of the")):
        flags = ["--adapter_path", str(source), "--output_dir", str(tmp_path / "theirs")]
        refused_by_command(["authors", *flags], capsys, words)  # the command's other name
        assert not (tmp_path / "theirs").exists()
