"""Weights that stand still: what is derived from them is kept, and copies are in the layout that a CPU's kernels read
fastest, for decode steps.

oneDNN's bf16 kernels reorder a matrix anew for every product, unless a copy lies in their layout. Without bf16 kernels
fbgemm's are the fastest for few rows: they read weights of fp16, half the bytes of float32, and multiply and add in
float32. Where fp16 would lose digits, the copy stays as it is.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama.accelerate.narrow import NarrowCopies

T = TypeVar("T")

DECODE_MAX_TOKENS = 64


class WeightCache:
    """What is derived from weights alone. Active while they are frozen for a run of generation; in training everything
    is computed anew. prepack: there is room for copies of the frozen weights."""

    def __init__(self, decode_max_tokens: int = DECODE_MAX_TOKENS) -> None:
        self.frozen, self.prepack, self.decode_max_tokens = False, False, decode_max_tokens
        self.entries: dict[Hashable, Any] = {}
        self.copies = NarrowCopies()  # for training

    def get(self, owner: nn.Module, key: Hashable, make: Callable[[], T]) -> T:
        if not self.frozen:
            return make()
        if (owner, key) not in self.entries:
            self.entries[owner, key] = make()
        return self.entries[owner, key]

    def is_decode(self, x: Tensor) -> bool:
        """Whether x (N, ...) holds the few tokens of a decode step."""
        return self.frozen and len(x) <= self.decode_max_tokens

    def narrow_dtype(self, x: Tensor) -> torch.dtype:
        """Type in which a product with a narrow matrix is fastest.

        That is float32 for the few tokens of a decode step on a CPU, whose bf16 kernels take longer to start than
        float32's to finish.
        """
        return torch.float32 if x.device.type == "cpu" and self.is_decode(x) else x.dtype


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of x (N, in) and a frozen W (k, in), without a gradient.

    In float32 a CPU's kernels take up to three times as long for a few rows of x, unless the weight stands in front.
    """
    few = 1 < len(x) <= DECODE_MAX_TOKENS and x.device.type == "cpu" and x.dtype == torch.float32
    return torch.mm(weight, x.T).T.contiguous() if few else F.linear(x, weight)


def prepacked_linear(weights: Sequence[Tensor], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The product of x (N, in) with a prepacked copy of weights (k, in), one above the other, for x of this type."""
    copy = torch.cat([weight.to(dtype) for weight in weights])
    if uses_onednn(copy):
        ordered = torch.ops.mkldnn._reorder_linear_weight(copy, None)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, ordered, None, "none", [], "")
    if uses_fbgemm(copy) and fp16_is_lossless(copy):
        packed = torch.ops.quantized.linear_prepack_fp16(copy.float(), None)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x.float(), packed).to(dtype)
    return partial(linear, weight=copy)


def uses_onednn(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and has_onednn_bf16()


def uses_fbgemm(weight: Tensor) -> bool:
    narrow = weight.dtype in (torch.float32, torch.bfloat16)
    return weight.device.type == "cpu" and narrow and not uses_onednn(weight) and has_fbgemm()


@cache
def has_onednn_bf16() -> bool:
    """Whether this processor has bf16 kernels; AVX2 alone has none."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def has_fbgemm() -> bool:
    """Whether torch has fbgemm's kernels here: on x86 from AVX2 on."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def fp16_is_lossless(weight: Tensor) -> bool:
    """Whether fp16 holds a weight (k, in) as well as float32: no row loses more than float32's own rounding.

    That is so for what was published in bf16, as LLaMA-3 was, unless it has rows of tiny or huge numbers.
    """
    wide = weight.float()
    lost = (wide - wide.half()).norm(dim=1)
    return bool((lost <= 2**-24 * wide.norm(dim=1)).all())
