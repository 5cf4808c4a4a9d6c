"""Copies of frozen weights in the form in which a CPU's kernels read them fastest, for the decode steps of a run.

bf16 kernels sort a matrix anew for every product, unless a copy lies in their order. Without such kernels fbgemm's are
the fastest for few rows, of float32 and bf16 alike: they read weights of fp16, half the bytes of float32, and multiply
and add in float32. Where a copy in fp16 would lose digits, it stays as it is.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from moa.adapter import FEW, stacked

Product = Callable[[Tensor], Tensor]  # x (N, in) -> (N, out)


def frozen_product(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T of x (N, in) and a frozen W (k, in). In float32 a CPU's kernels take up to three times as long for the few
    rows of a decode step, where these stand in front; with the weight there none was seen that took longer."""
    few = 1 < len(x) <= FEW and x.device.type == "cpu" and x.dtype == torch.float32
    return torch.mm(weight, x.T).T.contiguous() if few and not torch.is_grad_enabled() else F.linear(x, weight)


def product_of_copy(weights: Sequence[Tensor], dtype: torch.dtype) -> Product:
    """The product with a copy of weights (k, in), one above the other, for inputs of this type."""
    copy = stacked(weights, dtype)
    if sorts(copy):
        ordered = torch.ops.mkldnn._reorder_linear_weight(copy, None)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, ordered, None, "none", [], "")
    if packs(copy) and fits_half(copy):
        packed = torch.ops.quantized.linear_prepack_fp16(copy.float(), None)
        return lambda x: torch.ops.quantized.linear_dynamic_fp16(x.float(), packed).to(dtype)
    return partial(frozen_product, weight=copy)


def sorts(weight: Tensor) -> bool:
    """Whether copies of such a weight are sorted: for bf16 kernels."""
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and can_sort()


def packs(weight: Tensor) -> bool:
    """Whether they are packed: in fp16, of numbers that it can hold."""
    narrow = weight.dtype in (torch.float32, torch.bfloat16)
    return weight.device.type == "cpu" and narrow and not sorts(weight) and can_pack()


@cache
def can_sort() -> bool:
    """Whether this processor has bf16 kernels: AVX2 alone has none."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def can_pack() -> bool:
    """Whether PyTorch has fbgemm's kernels here: on x86, from AVX2 on."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def fits_half(weight: Tensor) -> bool:
    """Whether fp16 holds a weight (k, in) as well as float32 does: of no row more is lost than float32's own rounding
    would lose. So it is with what was published in bf16, as LLaMA-3 was, unless it has rows of tiny or huge numbers."""
    wide = weight.float()
    lost = (wide - wide.half()).norm(dim=1)
    return bool((lost <= 2**-24 * wide.norm(dim=1)).all())
