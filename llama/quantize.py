"""NF4: the frozen matrices of the blocks in 4 bits, by bitsandbytes (QLoRA, arXiv 2305.14314).

Each block of 64 numbers is stored as its largest magnitude and sixteen levels of a normal distribution; the magnitudes
are quantised too (double quantisation). Products are computed with the matrix dequantised to the type of their input,
once in the forward and once more in the backward pass. Norms, embeddings and the output matrix stay as they are.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama.parallel_layers import ColumnParallelLinear, RowParallelLinear

BLOCK, NESTED_BLOCK = 64, 256


def require_quantization(model_parallel_size: int) -> None:
    """ValueError unless a base can be quantised here."""
    if model_parallel_size > 1:
        raise ValueError(f"quantize needs model_parallel_size 1, not {model_parallel_size}: blocks would be cut apart")
    bitsandbytes()


def bitsandbytes() -> ModuleType:
    """The functions of bitsandbytes. ValueError where it is not installed."""
    try:
        import bitsandbytes.functional
    except ImportError:
        message = "--quantize needs the package bitsandbytes, which is not installed (pip install bitsandbytes==0.50.2)"
        raise ValueError(message) from None
    return bitsandbytes.functional


def nf4_bytes(numel: int) -> int:
    """Bytes of a quantised matrix: half a byte for each number, one for each block, 4 for each block of blocks."""
    num_blocks = -(-numel // BLOCK)
    return -(-numel // 2) + num_blocks + 4 * -(-num_blocks // NESTED_BLOCK)


class NF4Weight:
    """A quantised matrix (out, in)."""

    def __init__(self, weight: Tensor):
        self.shape, self.dtype = weight.shape, weight.dtype
        self.packed, self.state = weight, None
        if not weight.is_meta:
            options = {"quant_type": "nf4", "compress_statistics": True, "blocksize": BLOCK}
            self.packed, self.state = bitsandbytes().quantize_4bit(weight.contiguous(), **options)

    def dequantize(self) -> Tensor:
        if self.state is None:  # without numbers, for estimates
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        return bitsandbytes().dequantize_4bit(self.packed, self.state)


class NF4Product(torch.autograd.Function):
    """x W^T, which keeps the quantised W for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: NF4Weight) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize().to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.weight.dequantize().to(grad.dtype), None


class NF4Layer(nn.Module):
    """A frozen linear layer whose matrix is quantised. `weight` dequantises it."""

    quantized: NF4Weight

    @property
    def weight(self) -> Tensor:
        return self.quantized.dequantize()

    def product(self, x: Tensor) -> Tensor:
        return NF4Product.apply(x, self.quantized)


class NF4ColumnParallelLinear(NF4Layer, ColumnParallelLinear):
    pass


class NF4RowParallelLinear(NF4Layer, RowParallelLinear):
    pass


def quantize_layer(layer: nn.Module, weight: Tensor) -> None:
    """Give a frozen linear layer its matrix, quantised. The layer stays the object that adapters know."""
    del layer._parameters["weight"]
    layer.__class__ = NF4ColumnParallelLinear if isinstance(layer, ColumnParallelLinear) else NF4RowParallelLinear
    layer.quantized = NF4Weight(weight)


def is_quantizable(key: str) -> bool:
    """Whether a base tensor is a matrix of a block (`layers.0.attention.wq.weight`)."""
    return ".attention.w" in key or ".feed_forward.w" in key
