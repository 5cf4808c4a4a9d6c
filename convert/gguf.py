"""GGUF file -> Meta's layout, for the architectures llama and qwen3 with a byte-level BPE vocabulary."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from convert import meta_format
from convert.meta_format import EMBEDDING, GGUF, OUTPUT, Source, SourceTensor, Written, source_names, whole_number
from convert.vocabulary import from_gguf
from llama.args import ModelArgs
from llama.model import rope_frequencies

ROPE_FREQS = "rope_freqs.weight"

# Architecture -> whether its rotary embedding pairs the halves of a head, as Hugging Face's does (llama.cpp's rope type
# NEOX), so that rows of wq and wk are still in that order.
PAIRS_HALVES = {"llama": False, "qwen3": True}

# Keys that are read or tell no more than tensors do, and those that change nothing with these values. Any other key of
# the architecture is refused.
READ = {
    *("vocab_size", "context_length", "block_count", "embedding_length", "feed_forward_length", "tensor_data_layout"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "rope.freq_base"),
    *("attention.key_length", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
}
NEUTRAL = {
    **dict.fromkeys(("rope.scaling.factor", "rope.scale_linear"), (0, 1)),  # llama.cpp's scaling, also without a type
    **{"rope.scaling.type": ("none", "linear"), "rope.scaling.attn_factor": (1,), "attention.causal": (True,)},
    **dict.fromkeys(("expert_count", "expert_used_count", "attention.sliding_window"), (0,)),
}


def convert(input: str | Path, output_dir: str | Path, dtype: str = "bf16", overwrite: bool = False) -> Written:
    """Convert a .gguf file; see `meta_format.convert`."""
    return meta_format.convert(read, input, output_dir, dtype, overwrite)


def read(path: Path) -> Source:
    """The model of a file. ValueError naming the file and the tensor or key at fault."""
    metadata, tensors = read_gguf(path)
    divisors = tensors.pop(ROPE_FREQS).read() if ROPE_FREQS in tensors else None
    try:
        args = _read_metadata(metadata, "output.weight" not in tensors, divisors)
        vocabulary = from_gguf(metadata, args.vocab_size)
    except KeyError as error:
        raise ValueError(f"{path}: the metadata lacks {error.args[0]}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    names = source_names(args.n_layers, GGUF)
    if names[OUTPUT] not in tensors:  # tied
        names[OUTPUT] = names[EMBEDDING]
    return Source(path, args, vocabulary, tensors, names, PAIRS_HALVES[metadata["general.architecture"]])


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, SourceTensor]]:
    """The metadata and the tensors of a file. ValueError naming it."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        reader = _WholeReader(path)
        if reader.byte_order != "I":
            raise ValueError("it has the other byte order")  # quantised blocks would be misread
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, KeyError, IndexError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: not a whole GGUF file ({error})") from None
    tensors = {}
    for tensor in reader.tensors:
        origin, shape = f"{path}: tensor {tensor.name}", tuple(int(n) for n in reversed(tensor.shape))
        tensors[tensor.name] = SourceTensor(origin, shape, partial(_dequantized, origin, tensor))
    return metadata, tensors


def _dequantized(origin: str, tensor: ReaderTensor) -> torch.Tensor:
    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise ValueError(f"{origin} has type {tensor.tensor_type.name}, which is not read") from None
    return torch.from_numpy(np.array(values, dtype=np.float32))  # a copy: the file is mapped read-only


class _WholeReader(GGUFReader):
    """A reader whose reads past the end of the file are errors, not short arrays."""

    def _get(self, offset: Any, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        values = super()._get(offset, dtype, count, override_order)
        if len(values) != int(count):
            raise ValueError("it ends too early")
        return values


def _read_metadata(metadata: dict[str, Any], tied: bool, divisors: torch.Tensor | None) -> ModelArgs:
    """The model's shape. ValueError or KeyError for what is missing or has no counterpart here."""
    architecture = metadata["general.architecture"]
    if architecture not in PAIRS_HALVES:
        raise ValueError(f"architecture {architecture!r}, expected {' or '.join(map(repr, PAIRS_HALVES))}")
    is_qwen3 = architecture == "qwen3"
    prefix = f"{architecture}."
    own = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
    dim, heads = whole_number(own, "embedding_length"), whole_number(own, "attention.head_count")
    head_dim = whole_number(own, "attention.key_length", dim // heads)
    neutral = NEUTRAL | dict.fromkeys(("rope.dimension_count", "attention.value_length"), (head_dim,))
    if own.get("rope.scaling.type") == "none":
        own = {key: value for key, value in own.items() if key not in ("rope.scaling.factor", "rope.scale_linear")}
    for key, value in own.items():
        if key not in READ and value not in neutral.get(key, ()):
            expected = f" (expected {' or '.join(map(str, neutral[key]))})" if key in neutral else ""
            raise ValueError(f"{prefix}{key} is {value!r}, which is not supported{expected}")
    if metadata.get("split.count", 0) > 1:
        raise ValueError(f"split.count is {metadata['split.count']}: the file is one of several, which are not read")
    args = ModelArgs(
        dim=dim,
        n_layers=whole_number(own, "block_count"),
        n_heads=heads,
        n_kv_heads=whole_number(own, "attention.head_count_kv", heads),
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        norm_eps=_shortest(own["attention.layer_norm_rms_epsilon"]),
        rope_theta=_shortest(own.get("rope.freq_base", 10000.0)),
        head_dim=head_dim,
        ffn_dim=whole_number(own, "feed_forward_length"),
        qk_norm=is_qwen3,
        tied_embeddings=is_qwen3 and tied,
    )
    return args if divisors is None else _with_scaling(args, divisors)


def _with_scaling(args: ModelArgs, divisors: torch.Tensor) -> ModelArgs:
    """LLaMA-3.1's scaling from its effect (head_dim / 2), one divisor for each frequency."""
    for factor in (8.0, 32.0):  # 3.1 and 3.2; its other three numbers are the same in both
        scaled = replace(args, use_scaled_rope=True, rope_scaling_factor=factor)
        expected = rope_frequencies(args) / rope_frequencies(scaled)
        if divisors.shape == expected.shape and torch.allclose(divisors, expected, rtol=1e-4):
            return scaled
    raise ValueError(f"tensor {ROPE_FREQS} is not the scaling of LLaMA-3.1 or 3.2, the only ones known")


def _shortest(value: float) -> float:
    """The number with the fewest digits that is this float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))
