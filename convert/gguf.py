"""GGUF file -> Meta's layout, for the llama architecture with a byte-level BPE vocabulary."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize

from convert import meta_format
from convert.meta_format import EMBEDDING, OUTPUT, Converted, Source
from convert.vocabulary import Vocabulary, check_merges, plan
from llama.args import ModelArgs

# Meta's key -> GGUF's name; in a block, after `layers.{i}.` and `blk.{i}.`.
# Its wq and wk are in Meta's row order already.
GLOBAL_KEYS = {
    EMBEDDING: "token_embd.weight",
    "norm.weight": "output_norm.weight",
    OUTPUT: "output.weight",
}
LAYER_KEYS = {
    "attention.wq.weight": "attn_q.weight",
    "attention.wk.weight": "attn_k.weight",
    "attention.wv.weight": "attn_v.weight",
    "attention.wo.weight": "attn_output.weight",
    "feed_forward.w1.weight": "ffn_gate.weight",
    "feed_forward.w2.weight": "ffn_down.weight",
    "feed_forward.w3.weight": "ffn_up.weight",
    "attention_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
}
NORMAL, CONTROL = 1, 3  # of tokenizer.ggml.token_type
ROPE_FREQS = "rope_freqs.weight"

# LLaMA-3.1's scaling is stored as its effect only, one divisor for each frequency; of its four numbers these three
# are the same in every release, and the factor is 8 (3.1) or 32 (3.2).
STANDARD_SCALING = {"rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0, "rope_original_max_seq_len": 8192}
STANDARD_FACTORS = (8.0, 32.0)


def convert(input: str | Path, output_dir: str | Path, dtype: str = "bf16", overwrite: bool = False) -> Converted:
    """Convert a .gguf file; `dtype` is bf16, fp32 or fp16.

    Raises ValueError or OSError naming the file and the tensor or key at fault; then nothing was written.
    """
    output_dir = meta_format.check_output(output_dir, overwrite)
    source = Gguf(Path(input))
    vocabulary = _read_tokenizer(source)
    args = _read_metadata(source, vocab_size=len(vocabulary.row_map))
    names = meta_format.source_names(args.n_layers, GLOBAL_KEYS, LAYER_KEYS, "blk.")
    if names[OUTPUT] not in source.shapes():  # tied
        names[OUTPUT] = names[EMBEDDING]
    return meta_format.write_converted(
        output_dir, args, vocabulary, source, names, dtype, overwrite, ignored=lambda name: name == ROPE_FREQS
    )


class Gguf(Source):
    """The metadata and the tensors of a GGUF file. Tensors are read, and dequantised to float32, one by one."""

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        reader = _open(path)
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}

    def get(self, key: str, *default: Any) -> Any:
        """A metadata value. ValueError where it is missing and there is no default."""
        if key not in self._fields and not default:
            raise ValueError(f"{self.path}: the metadata lacks {key}")
        return self._fields[key].contents() if key in self._fields else default[0]

    def count(self, key: str, *default: int) -> int:
        """As `get`, of a positive whole number. ValueError for any other value."""
        value = self.get(key, *default)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{self.path}: {key} must be one positive whole number, not {value!r}")
        return value

    def refuse_unless(self, key: str, *allowed: Any) -> None:
        """Refuse a metadata value that is there and is none of `allowed`."""
        if key in self._fields and self.get(key) not in allowed:
            expected = " or ".join(map(str, allowed))
            raise ValueError(f"{self.path}: {key} is {self.get(key)!r}, which is not supported (expected {expected})")

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self._tensors.items()}

    def where(self, name: str) -> str:
        return str(self.path)

    def read(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise self.error(name, f"has type {tensor.tensor_type.name}, which is not read") from None
        return torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: the file is mapped read-only


class _WholeReader(GGUFReader):
    """A reader whose reads past the end of the file are errors, not short arrays."""

    def _get(self, offset: Any, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        values = super()._get(offset, dtype, count, override_order)
        if len(values) != int(count):
            raise ValueError("it ends too early")
        return values


def _open(path: Path) -> GGUFReader:
    try:
        reader = _WholeReader(path)
        if reader.byte_order != "I":
            raise ValueError("it has the other byte order")  # quantised blocks would be misread
        return reader
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: not a whole GGUF file ({error})") from None


def _read_metadata(source: Gguf, vocab_size: int) -> ModelArgs:
    if source.get("general.architecture") != "llama":
        raise ValueError(f"{source.path}: architecture {source.get('general.architecture')!r}, expected 'llama'")
    source.refuse_unless("split.count", 0, 1)
    source.refuse_unless("llama.expert_count", 0)
    source.refuse_unless("llama.attention.sliding_window", 0)
    source.refuse_unless("llama.rope.scaling.type", "none")
    dim, heads = source.count("llama.embedding_length"), source.count("llama.attention.head_count")
    for key in ("llama.rope.dimension_count", "llama.attention.key_length", "llama.attention.value_length"):
        source.refuse_unless(key, dim // heads)
    try:
        args = ModelArgs(
            dim=dim,
            n_layers=source.count("llama.block_count"),
            n_heads=heads,
            n_kv_heads=source.count("llama.attention.head_count_kv", heads),
            vocab_size=vocab_size,
            norm_eps=_shortest(source.get("llama.attention.layer_norm_rms_epsilon")),
            rope_theta=_shortest(source.get("llama.rope.freq_base", 10000.0)),
            **meta_format.ffn_rule(dim, source.count("llama.feed_forward_length")),
        )
    except ValueError as error:
        raise error if str(error).startswith(str(source.path)) else ValueError(f"{source.path}: {error}") from None
    return ModelArgs(**{**vars(args), **_recognise_scaling(source, args)})


def _recognise_scaling(source: Gguf, args: ModelArgs) -> dict[str, Any]:
    """The keys of params.json for the divisors in rope_freqs.weight (head_dim / 2), which must be LLaMA-3.1's."""
    if ROPE_FREQS not in source.shapes():
        return {}
    divisors = source.read(ROPE_FREQS).double().numpy()
    wavelength = 2 * np.pi * args.rope_theta ** (np.arange(0, args.head_dim, 2) / args.head_dim)
    low, high, length = STANDARD_SCALING.values()
    smooth = np.clip((length / wavelength - low) / (high - low), 0, 1)
    for factor in STANDARD_FACTORS:
        standard = 1 / ((1 - smooth) / factor + smooth)
        if divisors.shape == standard.shape and np.allclose(divisors, standard, rtol=1e-4):
            return {"use_scaled_rope": True, "rope_scaling_factor": factor, **STANDARD_SCALING}
    raise ValueError(f"{source.path}: tensor {ROPE_FREQS} is not the scaling of LLaMA-3.1 or 3.2, the only ones known")


def _read_tokenizer(source: Gguf) -> Vocabulary:
    where = str(source.path)
    if (model := source.get("tokenizer.ggml.model")) != "gpt2":
        raise ValueError(f"{where}: tokenizer.ggml.model is {model!r}; only byte-level BPE ('gpt2') can be converted")
    tokens, kinds = source.get("tokenizer.ggml.tokens"), source.get("tokenizer.ggml.token_type")
    if len(tokens) != len(kinds):
        raise ValueError(f"{where}: {len(tokens)} tokenizer.ggml.tokens but {len(kinds)} tokenizer.ggml.token_type")
    base, special = (
        {i: token for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == wanted}
        for wanted in (NORMAL, CONTROL)
    )
    check_merges([tuple(merge.split(" ")) for merge in source.get("tokenizer.ggml.merges")], base, where)
    return plan(base, special, where)


def _shortest(value: float) -> float:
    """The number with the fewest digits that is this float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))
