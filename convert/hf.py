"""Hugging Face folder -> Meta's layout, for LLaMA-3.x and other plain LlamaForCausalLM models such as SmolLM2, and for
Qwen3."""

import re
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, equal

from convert import meta_format
from convert.meta_format import EMBEDDING, HF, OUTPUT, Source, SourceTensor, Written, source_names, whole_number
from convert.vocabulary import from_hf, require_off
from llama.args import ModelArgs
from moa.files import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

# Constants that old versions saved along with the weights.
IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

# model_type -> its architecture. Where config.json lacks `head_dim`, Qwen3's is 128.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
QWEN3_HEAD_DIM = 128

# Keys of params.json -> of the llama3 scaling in config.json
LLAMA3_SCALING = {
    "rope_scaling_factor": "factor",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
    "rope_original_max_seq_len": "original_max_position_embeddings",
}


def convert(input: str | Path, output_dir: str | Path, dtype: str = "bf16", overwrite: bool = False) -> Written:
    """Convert a folder with config.json, safetensors and tokenizer.json; see `meta_format.convert`."""
    return meta_format.convert(read, input, output_dir, dtype, overwrite)


def read(folder: Path) -> Source:
    """The model of a folder. ValueError naming the file and the tensor or key at fault."""
    path = folder / "config.json"
    config = read_json(path)
    try:
        args = read_config(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    vocabulary, tensors, names = from_hf(folder, args.vocab_size), read_tensors(folder), source_names(args.n_layers, HF)
    if config.get("tie_word_embeddings"):  # then either name may be the stored one, or both
        output = tensors.pop(names[OUTPUT], None)
        embedding = output and tensors.setdefault(names[EMBEDDING], output)
        if output is not embedding and not equal(output.read(), embedding.read()):
            raise ValueError(f"{output.origin} differs from {names[EMBEDDING]}, but {path} says tie_word_embeddings")
        names[OUTPUT] = names[EMBEDDING]
    return Source(folder, args, vocabulary, tensors, names, pairs_halves=True)


def read_config(config: dict[str, Any]) -> ModelArgs:
    """The model's shape from config.json. Raises ValueError for whatever Meta's layout cannot express."""
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if model_type not in ARCHITECTURES or (architectures or [ARCHITECTURES[model_type]]) != [ARCHITECTURES[model_type]]:
        known = " and ".join(ARCHITECTURES.values())
        raise ValueError(f"only {known} can be converted, not {architectures} of model_type {model_type!r}")
    is_qwen3 = model_type == "qwen3"
    # Qwen3's sliding_window counts only where use_sliding_window is true
    window = "use_sliding_window" if is_qwen3 else "sliding_window"
    require_off(config, ("attention_bias", "mlp_bias", window, "num_experts", "quantization_config"))
    for kind in config.get("layer_types") or ():
        if kind != "full_attention":
            raise ValueError(f"layer_types has {kind!r}, only 'full_attention' has a counterpart here")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act must be 'silu', not {config['hidden_act']!r}")
    dim, heads = whole_number(config, "hidden_size"), whole_number(config, "num_attention_heads")
    return ModelArgs(
        dim=dim,
        n_layers=whole_number(config, "num_hidden_layers"),
        n_heads=heads,
        n_kv_heads=whole_number(config, "num_key_value_heads", heads),
        vocab_size=whole_number(config, "vocab_size"),
        norm_eps=config.get("rms_norm_eps", 1e-6),
        head_dim=whole_number(config, "head_dim", QWEN3_HEAD_DIM if is_qwen3 else dim // heads),
        ffn_dim=whole_number(config, "intermediate_size"),
        qk_norm=is_qwen3,
        tied_embeddings=is_qwen3 and bool(config.get("tie_word_embeddings")),
        **_read_rope(config),
    )


def _read_rope(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding. As in transformers, `rope_scaling` (until version 4) goes before `rope_parameters` (since
    5), and what stands in either before the same key beside it."""
    name = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(name) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{name} must be an object, not {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type must be 'default' or 'llama3', not {kind!r}")
    beside = ("rope_theta", "partial_rotary_factor")
    for key in rope.keys() - {"rope_type", "type", *beside, *LLAMA3_SCALING.values()}:
        raise ValueError(f"{name} has {key} = {rope[key]!r}, which is not known")
    theta, part = (rope.get(key, config.get(key, default)) for key, default in zip(beside, (1e4, 1.0), strict=True))
    if part not in (None, 1.0):
        raise ValueError(f"partial_rotary_factor {part!r} has no counterpart in Meta's layout")
    if kind == "default":
        return {"rope_theta": theta}
    for key in LLAMA3_SCALING.values():
        if key not in rope:
            raise ValueError(f"the llama3 rope scaling lacks {key}")
        if config.get(key, rope[key]) != rope[key]:
            raise ValueError(f"{key} is {config[key]!r}, but {rope[key]!r} in {name}")
    scaling = {ours: rope[theirs] for ours, theirs in LLAMA3_SCALING.items()}
    return {"rope_theta": theta, "use_scaled_rope": True, **scaling}


def read_tensors(folder: Path) -> dict[str, SourceTensor]:
    """The tensors of `model.safetensors`, or of the shards that its index names, by their names."""
    if (folder / SINGLE).is_file():
        files, listed = [folder / SINGLE], {}
    elif (folder / INDEX).is_file():
        listed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not all(Path(str(name)).name == name for name in listed.values()):
            raise ValueError(f"{folder / INDEX}: weight_map must map tensor names to file names of this folder")
        files = [folder / name for name in sorted(set(listed.values()))]
    else:
        raise ValueError(f"{folder}: holds neither {SINGLE} nor {INDEX}; pickled weights are not read")
    tensors = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: no such file, but {INDEX} names it")
        with open_safetensors(file) as opened:
            for name in opened.keys():
                shape = tuple(opened.get_slice(name).get_shape())
                tensors[name] = SourceTensor(f"{file}: tensor {name}", shape, partial(_read_tensor, file, name))
    for name, file in listed.items():
        if name not in tensors or not tensors[name].origin.startswith(f"{folder / file}: "):
            raise ValueError(f"{folder / file}: tensor {name} is missing, but {INDEX} names it")
    return {name: tensor for name, tensor in tensors.items() if not IGNORED.fullmatch(name)}


def _read_tensor(file: Path, name: str) -> Tensor:
    with open_safetensors(file) as opened:
        return opened.get_tensor(name)


def open_safetensors(file: Path) -> safe_open:
    """Open a file whose tensors are read one by one. ValueError naming the file."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
