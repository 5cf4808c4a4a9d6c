"""A generator of checkpoints: what transformers and llama.cpp can write of small LLaMAs, in the spellings of their
versions. Each converts to transformers' own logits and token ids, or is refused with the key that it cannot express."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from convert import gguf as from_gguf
from convert import hf as from_hf
from convert_samples import STYLES, as_gguf, same_ids, same_logits, write_gguf, write_hf
from llama import ModelArgs
from llama.model import rope_frequencies

Config = dict[str, Any]
REMOVED = object()  # as the value of a key that config.json lacks

# The rotary embeddings of the samples, and their numbers
DEFAULT, OTHER_BASE = {"rope_type": "default", "rope_theta": 1e4}, {"rope_type": "default", "rope_theta": 5e5}
LLAMA31 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA31 |= {"original_max_position_embeddings": 8192}
SCALED = LLAMA31 | {"rope_theta": 5e3, "factor": 32.0, "original_max_position_embeddings": 64}  # shows at position 64
ROPES = {"default": DEFAULT, "base": OTHER_BASE, "llama31": LLAMA31, "scaled": SCALED}


def split(rope: Config) -> tuple[float, Config]:
    return rope["rope_theta"], {key: value for key, value in rope.items() if key != "rope_theta"}


def old(rope: Config, **inside: Any) -> Config:
    """As transformers wrote it until version 4."""
    theta, scaling = split(rope)
    return {"rope_theta": theta, "rope_scaling": (scaling | inside) if scaling["rope_type"] != "default" else None}


def by_type(rope: Config) -> Config:
    theta, scaling = split(rope)
    return {"rope_theta": theta, "rope_scaling": {"type": scaling.pop("rope_type"), **scaling}}


# How config.json tells a rotary embedding; each makes its keys
SPELLINGS: dict[str, Callable[[Config], Config]] = {
    "rope_parameters": lambda rope: {"rope_parameters": rope},
    "rope_scaling": old,
    "type": by_type,
    "base inside": lambda rope: {"rope_scaling": rope, "rope_theta": 77.0},
    "both": lambda rope: old(rope) | {"rope_scaling": split(rope)[1], "rope_parameters": {"rope_theta": 77.0}},
    "null": lambda rope: {"rope_parameters": rope, "rope_scaling": None, "rope_theta": 77.0},
}


@dataclass
class Case:
    """sizes: of the model. config: keys of config.json, changed after saving. refused: by what sentence."""

    sizes: Config = field(default_factory=dict)
    config: Config = field(default_factory=dict)
    style: str = "llama3"
    stored: str = "as saved"  # or of a tied pair "lm_head" alone, or "both"
    dtype: str = "float32"
    shard_size: str = "1GB"
    refused: str | None = None


CASES: dict[str, Case] = {}
LEFT_OUT = ("architectures", "rope_parameters", "head_dim", "hidden_act", "rms_norm_eps", "tie_word_embeddings")
SHAPES = {
    "GQA": {},
    "MHA": {"num_key_value_heads": 6},
    "MQA": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 8},
    "odd width": {"intermediate_size": 97},
    "narrow": {"intermediate_size": 40},
    "epsilon": {"rms_norm_eps": 1e-2},
}
for i, (spelling, tell) in enumerate(SPELLINGS.items()):
    for j, (rope, numbers) in enumerate(ROPES.items()):
        style = [*STYLES][(i + j) % len(STYLES)]
        CASES[f"rope {rope} as {spelling}, {style}"] = Case(config=tell(numbers), style=style)
for shape, sizes in SHAPES.items():
    for dtype in ("float32", "bfloat16", "float16"):
        tied = dtype == "bfloat16"
        CASES[f"{shape} in {dtype}"] = Case(sizes | {"tie_word_embeddings": tied}, dtype=dtype)
for style in STYLES:
    for stored in ("as saved", "lm_head", "both"):
        CASES[f"tied, {stored}, {style}"] = Case({"tie_word_embeddings": True}, style=style, stored=stored)
    CASES[f"shards, {style}"] = Case(style=style, shard_size="60KB")
    CASES[f"untied, {style}"] = Case({"tie_word_embeddings": False}, style=style)
CASES |= {
    "least": Case(config=dict.fromkeys(LEFT_OUT, REMOVED)),
    "nulls": Case({"num_key_value_heads": 6}, config={"num_key_value_heads": None, "head_dim": None}),
    "linear": Case(config={"rope_parameters": DEFAULT | {"rope_type": "linear", "factor": 2.0}}, refused="'linear'"),
    "dynamic": Case(config={"rope_scaling": {"type": "dynamic", "factor": 2.0}}, refused="'dynamic'"),
    "yarn": Case(config={"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, refused="'yarn'"),
    "part": Case(
        config={"partial_rotary_factor": 0.5, "rope_parameters": REMOVED}, refused="partial_rotary_factor 0.5"
    ),
    "layers": Case(
        config={"rope_parameters": {"full_attention": DEFAULT}}, refused="rope_parameters has full_attention"
    ),
    "two lengths": Case(
        config={"rope_parameters": SCALED, "original_max_position_embeddings": 32},
        refused="original_max_position_embeddings is 32, but 64",
    ),
    "no length": Case(
        config={"rope_parameters": {k: v for k, v in SCALED.items() if "max" not in k}},
        refused="lacks original_max_position_embeddings",
    ),
    "head_dim elsewhere": Case({"head_dim": 16}),
    "sliding window": Case(config={"sliding_window": 4096}, refused="config.json: sliding_window = 4096"),
    "no size": Case(
        config={"hidden_size": REMOVED}, refused="config.json: hidden_size must be a positive whole number"
    ),
    "heads": Case(
        config={"num_key_value_heads": 4}, refused="config.json: n_heads 6 must be a multiple of n_kv_heads 4"
    ),
    "fewer rows": Case(
        config={"vocab_size": 600}, refused=r"embed_tokens.weight has shape \(517, 48\), expected \(600"
    ),
    "no output": Case(
        {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, refused="lm_head.weight is missing"
    ),
    "biases": Case({"attention_bias": True}, refused="attention_bias"),
    "biases of w1 to w3": Case({"mlp_bias": True}, refused="mlp_bias"),
    "gelu": Case({"hidden_act": "gelu"}, refused="hidden_act must be 'silu', not 'gelu'"),
    "quantised": Case(config={"quantization_config": {"bits": 4}}, refused="quantization_config"),
    "other model": Case(config={"model_type": "mistral"}, refused="model_type 'mistral'"),
    "other head": Case(config={"architectures": ["LlamaForSequenceClassification"]}, refused="only LlamaForCausalLM"),
}


def write(case: Case, folder: Path) -> None:
    """The checkpoint of a case, saved by transformers and then spelled as the case says."""
    sizes = {"max_position_embeddings": 256} | case.sizes
    model = write_hf(folder, case.style, case.shard_size, dtype=getattr(torch, case.dtype), **sizes)
    config = json.loads((folder / "config.json").read_text())
    if any(key.startswith("rope_") for key in case.config):
        del config["rope_parameters"]
    config = {key: value for key, value in (config | case.config).items() if value is not REMOVED}
    (folder / "config.json").write_text(json.dumps(config))
    if case.stored != "as saved":
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = model.state_dict()["lm_head.weight"].clone()
        if case.stored == "lm_head":
            del tensors["model.embed_tokens.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("name", CASES)
def test_a_hugging_face_folder(name: str, tmp_path: Path) -> None:
    case, folder = CASES[name], tmp_path / "hf"
    write(case, folder)
    if case.refused is not None:
        with pytest.raises(ValueError, match=case.refused) as caught:
            from_hf.convert(folder, tmp_path / "out", dtype="fp32")
        assert str(folder) in str(caught.value) and not (tmp_path / "out").exists()
        return
    result = from_hf.convert(folder, tmp_path / "out", dtype="fp32")
    same_logits(result, LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval())
    same_ids(result, folder / "tokenizer.json")


# GGUF: the same model as llama.cpp's converter writes it, with keys of its versions


def divisors(rope: Config, head_dim: int = 8) -> list[float]:
    """The numbers of rope_freqs.weight, as LLaMA-3.1's scaling is defined."""
    numbers = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        kept = min(max((turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"]), 0), 1)
        numbers.append(1 / ((1 - kept) / rope["factor"] + kept))
    return numbers


@dataclass
class GgufCase:
    """rope: of the model. metadata: more keys after "llama."; refused: by what sentence."""

    rope: Config = field(default_factory=lambda: DEFAULT)
    metadata: Config = field(default_factory=dict)
    style: str = "smol"
    divisors: list[float] | None = None
    type: gguf.GGMLQuantizationType | None = None
    refused: str | None = None


LLAMA32 = LLAMA31 | {"factor": 32.0}
GGUF_CASES = {
    "smol": GgufCase(),
    "llama3": GgufCase(style="llama3"),
    "deepseek": GgufCase(style="deepseek"),
    "qwen": GgufCase(style="qwen"),
    "base": GgufCase(OTHER_BASE, style="llama3"),
    "F16": GgufCase(type=gguf.GGMLQuantizationType.F16),
    "BF16": GgufCase(type=gguf.GGMLQuantizationType.BF16, style="llama3"),
    "LLaMA-3.1": GgufCase(LLAMA31, divisors=divisors(LLAMA31), style="llama3"),
    "LLaMA-3.2": GgufCase(LLAMA32, divisors=divisors(LLAMA32), style="llama3"),
    "other divisors": GgufCase(LLAMA31, divisors=[1.0, 1.0, 2.0, 3.0], refused="rope_freqs.weight is not the scaling"),
    "no scaling": GgufCase(metadata={"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    "factor 1": GgufCase(metadata={"rope.scaling.factor": 1.0, "rope.scale_linear": 1.0, "rope.dimension_count": 8}),
    "factor without type": GgufCase(metadata={"rope.scaling.factor": 4.0}, refused="llama.rope.scaling.factor is 4.0"),
    "old factor": GgufCase(metadata={"rope.scale_linear": 4.0}, refused="llama.rope.scale_linear is 4.0"),
    "linear": GgufCase(
        metadata={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, refused="scaling.factor is 4.0"
    ),
    "attention factor": GgufCase(metadata={"rope.scaling.attn_factor": 1.5}, refused="llama.rope.scaling.attn_factor"),
    "unknown rope key": GgufCase(metadata={"rope.tomorrow": 2.0}, refused="llama.rope.tomorrow is 2.0"),
    "unknown key": GgufCase(metadata={"logit_scale": 0.5}, refused="llama.logit_scale is 0.5"),
    "part": GgufCase(metadata={"rope.dimension_count": 4}, refused="dimension_count is 4"),
    "experts": GgufCase(metadata={"expert_count": 8}, refused="llama.expert_count is 8"),
    "of several files": GgufCase(metadata={"/split.count": 2}, refused="split.count is 2"),
}


@pytest.mark.parametrize("name", GGUF_CASES)
def test_a_gguf_file(name: str, tmp_path: Path) -> None:
    case, path = GGUF_CASES[name], tmp_path / "model.gguf"
    model = write_hf(tmp_path / "hf", case.style, rope_parameters=dict(case.rope))
    tensors = as_gguf(model)
    if case.divisors:
        tensors["rope_freqs.weight"] = np.array(case.divisors, dtype=np.float32)
    metadata = {f"llama.{key}".replace("llama./", ""): value for key, value in case.metadata.items()}
    types = {name: case.type for name in tensors if case.type and "norm" not in name and name != "rope_freqs.weight"}
    write_gguf(path, tensors, types, style=case.style, theta=case.rope["rope_theta"], metadata=metadata)
    if case.refused is not None:
        with pytest.raises(ValueError, match=f"model.gguf: .*{case.refused}"):
            from_gguf.convert(path, tmp_path / "out", dtype="fp32")
        assert not (tmp_path / "out").exists()
        return
    result = from_gguf.convert(path, tmp_path / "out", dtype="fp32")
    if case.type:
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16}[case.type.name]
        for key, parameter in model.named_parameters():
            parameter.data = parameter.data if "norm" in key else parameter.data.to(dtype).float()
    same_logits(result, model)
    same_ids(result, tmp_path / "hf" / "tokenizer.json")


# Meta's own folders, which say that the rotary embedding is scaled and not by how much

META = {"vocab_size": 128256, "n_kv_heads": 8, "norm_eps": 1e-5, "rope_theta": 5e5, "use_scaled_rope": True}
RELEASES = {
    "3.1-8B": ({"dim": 4096, "n_layers": 32, "n_heads": 32, "ffn_dim_multiplier": 1.3, "multiple_of": 1024}, 8.0),
    "3.2-1B": ({"dim": 2048, "n_layers": 16, "n_heads": 32, "ffn_dim_multiplier": 1.5, "multiple_of": 256}, 32.0),
    "3.2-3B": ({"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0, "multiple_of": 256}, 32.0),
}


@pytest.mark.parametrize("release", RELEASES)
def test_metas_params_take_the_published_factor_aloud(release: str, tmp_path: Path, capsys) -> None:
    sizes, factor = RELEASES[release]
    (tmp_path / "params.json").write_text(json.dumps(META | sizes))
    args = ModelArgs.from_file(tmp_path / "params.json")
    sentence = f"params.json: no rope_scaling_factor; {factor:g} is taken, as published for LLaMA-{release}"
    assert sentence in capsys.readouterr().err
    head_dim = args.dim // args.n_heads
    config = LlamaConfig(head_dim=head_dim, rope_parameters=LLAMA31 | {"factor": factor})
    torch.testing.assert_close(rope_frequencies(args), LlamaRotaryEmbedding(config).inv_freq)


def test_a_scaled_shape_that_is_no_release_needs_the_factor(tmp_path: Path, capsys) -> None:
    params = META | RELEASES["3.2-1B"][0] | {"n_layers": 15}
    (tmp_path / "params.json").write_text(json.dumps(params))
    with pytest.raises(ValueError, match="params.json: use_scaled_rope needs rope_scaling_factor beside it"):
        ModelArgs.from_file(tmp_path / "params.json")
    (tmp_path / "params.json").write_text(json.dumps(params | {"rope_scaling_factor": 16}))
    assert ModelArgs.from_file(tmp_path / "params.json").rope_scaling_factor == 16
    assert not capsys.readouterr().err


def test_there_are_enough_of_them() -> None:
    assert len(CASES) + len(GGUF_CASES) >= 60
