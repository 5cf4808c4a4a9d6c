"""Hugging Face folder -> Meta's layout, for LLaMA-3.x and other plain LlamaForCausalLM models such as SmolLM2."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open

from convert import meta_format
from convert.meta_format import EMBEDDING, OUTPUT, Converted, Source
from convert.vocabulary import Vocabulary, from_tiktoken, from_tokenizer_json
from llama.args import ModelArgs
from llama.tokenizer import N_SPECIAL, read_ranks
from moa.files import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

# Meta's key -> Hugging Face's name; in a block, after `layers.{i}.` and `model.layers.{i}.`.
GLOBAL_KEYS = {
    EMBEDDING: "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    OUTPUT: "lm_head.weight",
}
LAYER_KEYS = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
# Constants that old versions saved along with the weights.
IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def convert(input: str | Path, output_dir: str | Path, dtype: str = "bf16", overwrite: bool = False) -> Converted:
    """Convert a folder with config.json, safetensors and a tokenizer; `dtype` is bf16, fp32 or fp16.

    Raises ValueError or OSError naming the file and the tensor or key at fault; then nothing was written.
    """
    folder = Path(input)
    output_dir = meta_format.check_output(output_dir, overwrite)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: holds no config.json, so it is not a Hugging Face model folder")
    config = read_json(folder / "config.json")
    source = Safetensors(folder)
    embedding, output = GLOBAL_KEYS[EMBEDDING], GLOBAL_KEYS[OUTPUT]
    rows = source.shapes().get(embedding, (None,))[0]
    if rows is None:
        raise source.error(embedding, "is missing")
    if config.get("vocab_size") != rows:
        problem = f"has {rows} rows, but {folder / 'config.json'} has vocab_size {config.get('vocab_size')}"
        raise source.error(embedding, problem)
    vocabulary, tokenizer = _read_tokenizer(folder, rows)
    args = read_config(config, folder / "config.json", vocab_size=len(vocabulary.row_map))
    names = meta_format.source_names(args.n_layers, GLOBAL_KEYS, LAYER_KEYS, "model.layers.")
    tied = bool(config.get("tie_word_embeddings", False))
    if tied:
        names[OUTPUT] = embedding
        if output in source.shapes() and not torch.equal(source.read(output), source.read(embedding)):
            raise source.error(output, f"differs from {embedding}, but config.json says tie_word_embeddings")

    def change(key: str, tensor: torch.Tensor) -> torch.Tensor:
        return permute_rope(tensor, args.head_dim) if key.endswith(("wq.weight", "wk.weight")) else tensor

    def ignored(name: str) -> bool:
        return bool(IGNORED.fullmatch(name)) or (tied and name == output)

    return meta_format.write_converted(
        output_dir, args, vocabulary, source, names, dtype, overwrite, tokenizer, ignored, change
    )


def permute_rope(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows (heads * head_dim, D) of wq or wk: per head from [first half, second half] to Meta's interleaved pairs."""
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[-1])
    return halves.transpose(1, 2).reshape(weight.shape)


def unpermute_rope(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Inverse of `permute_rope`."""
    pairs = weight.view(-1, head_dim // 2, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def read_config(config: dict[str, Any], path: Path, vocab_size: int) -> ModelArgs:
    """The model's shape from config.json. Raises ValueError for whatever Meta's layout cannot express."""

    def refuse(problem: str) -> NoReturn:
        raise ValueError(f"{path}: {problem}")

    def number(key: str, kind: type = int, default: Any = None) -> Any:
        value = config.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or value <= 0:
            refuse(f"{key} must be a positive {'whole number' if kind is int else 'number'}, not {value!r}")
        return value

    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    if config.get("model_type") != "llama" or architectures != ["LlamaForCausalLM"]:
        refuse(
            f"only LlamaForCausalLM can be converted, not {architectures} of model_type {config.get('model_type')!r}"
        )
    for key in ("attention_bias", "mlp_bias", "sliding_window", "quantization_config"):
        if config.get(key):
            refuse(f"{key} = {config[key]!r} has no counterpart in Meta's layout")
    if config.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act must be 'silu', not {config['hidden_act']!r}")
    dim, heads = number("hidden_size"), number("num_attention_heads")
    if dim % heads or number("head_dim", default=dim // heads) != dim // heads:
        refuse(f"head_dim {config.get('head_dim')} must be hidden_size / num_attention_heads = {dim} / {heads}")
    try:
        return ModelArgs(
            dim=dim,
            n_layers=number("num_hidden_layers"),
            n_heads=heads,
            n_kv_heads=number("num_key_value_heads", default=heads),
            vocab_size=vocab_size,
            norm_eps=number("rms_norm_eps", float, 1e-6),
            **meta_format.ffn_rule(dim, number("intermediate_size")),
            **_read_rope(config, refuse),
        )
    except ValueError as error:
        raise error if str(error).startswith(str(path)) else ValueError(f"{path}: {error}") from None


def _read_rope(config: dict[str, Any], refuse: Callable[[str], NoReturn]) -> dict[str, Any]:
    # Written as rope_theta + rope_scaling until transformers 4, as rope_parameters since 5.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        refuse(f"rope_scaling must be an object, not {rope!r}")
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        refuse("partial_rotary_factor has no counterpart in Meta's layout")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        refuse(f"rope_type must be 'default' or 'llama3', not {kind!r}")
    scaling = {
        "rope_scaling_factor": "factor",
        "rope_low_freq_factor": "low_freq_factor",
        "rope_high_freq_factor": "high_freq_factor",
        "rope_original_max_seq_len": "original_max_position_embeddings",
    }
    for key in scaling.values():
        if key not in rope:
            refuse(f"the llama3 rope scaling lacks {key}")
    return {"rope_theta": theta, "use_scaled_rope": True, **{name: rope[key] for name, key in scaling.items()}}


class Safetensors(Source):
    """The tensors of a folder's `model.safetensors`, or of the shards its index names. Read one by one."""

    def __init__(self, folder: Path):
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._expected_in = folder / SINGLE
        if (folder / SINGLE).is_file():
            files, listed = [folder / SINGLE], None
        elif (folder / INDEX).is_file():
            self._expected_in = folder / INDEX
            listed = read_json(folder / INDEX).get("weight_map")
            if not isinstance(listed, dict) or not all(Path(str(name)).name == name for name in listed.values()):
                raise ValueError(f"{folder / INDEX}: weight_map must map tensor names to file names of this folder")
            files = [folder / name for name in sorted(set(listed.values()))]
        else:
            pickled = sorted(p.name for pattern in ("*.bin", "*.pth", "*.pt") for p in folder.glob(pattern))
            why = f"; pickled weights ({pickled[0]}) are not read, save them as safetensors" if pickled else ""
            raise ValueError(f"{folder}: holds neither {SINGLE} nor {INDEX}{why}")
        for file in files:
            if not file.is_file():
                raise ValueError(f"{file}: no such file, but {INDEX} names it")
            with open_safetensors(file) as opened:
                for name in opened.keys():
                    self._file_of[name] = file
                    self._shapes[name] = tuple(opened.get_slice(name).get_shape())
        for name in listed or ():
            if self._file_of.get(name) != folder / listed[name]:
                raise ValueError(f"{folder / listed[name]}: tensor {name} is missing, but {INDEX} names it")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def where(self, name: str) -> str:
        return str(self._file_of.get(name, self._expected_in))

    def read(self, name: str) -> torch.Tensor:
        with open_safetensors(self._file_of[name]) as opened:
            tensor = opened.get_tensor(name)
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise self.error(name, f"is {tensor.dtype}, expected float32, bfloat16 or float16")
        return tensor


def open_safetensors(file: Path) -> safe_open:
    """Open a file whose tensors are read one by one. ValueError naming the file."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error})") from None


def _read_tokenizer(folder: Path, rows: int) -> tuple[Vocabulary, bytes | None]:
    """The vocabulary, and the folder's own tokenizer.model where it is a tiktoken file that fits."""
    reason = f"{folder}: holds no tokenizer.json and no tokenizer.model"
    for path in (folder / "original" / "tokenizer.model", folder / "tokenizer.model"):
        if path.is_file():
            try:
                n = len(read_ranks(path)) + N_SPECIAL
                if n == rows:
                    return from_tiktoken(path), path.read_bytes()
                reason = f"{path}: has {n} tokens with Meta's special ones, but the embedding has {rows} rows"
            except ValueError as error:
                reason = str(error)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(reason)
    return from_tokenizer_json(folder / "tokenizer.json"), None
