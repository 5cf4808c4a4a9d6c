"""Attention by the fastest kernels of each device, in place of the plain formulas of `llama.model`.

Shapes: N tokens, R sequences, T tokens of the longest, H query heads, K key/value heads (each serves H/K query heads),
h head width.
"""

import inspect
import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from llama import model
from llama.accelerate.kernels import upcast_on_cpu
from llama.packing import PackedBatch

aten = torch.ops.aten


def causal_attention(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, flash: bool = False) -> Tensor:
    """As `llama.model.causal_attention`.

    flash: flash-attn 2's variable-length kernel (a GPU and bf16 or fp16). Else torch's CPU kernel, one call for
    sequences of equal length, torch's variable-length kernel where the GPU has it, and the plain formula.
    """
    if flash:
        from flash_attn import flash_attn_varlen_func

        ends = (batch.cu_seqlens, batch.cu_seqlens, batch.max_seqlen, batch.max_seqlen)
        return flash_attn_varlen_func(q, k, v, *ends, causal=True)
    if q.device.type == "cpu":
        return CPUAttentionFunction.apply(q, k, v, batch)
    if batch.equal_lengths:
        q, k, v = (view_as_sequences(t, batch) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)
    if q.device.type == "cuda" and has_varlen(q):
        return varlen_attention(q, k, v, batch)
    return model.causal_attention(q, k, v, batch)


def view_as_sequences(t: Tensor, batch: PackedBatch) -> Tensor:
    """(N, heads, h) of equally long sequences -> (R, heads, T, h)."""
    return t.unflatten(0, (len(batch.lengths), batch.max_seqlen)).transpose(1, 2)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """As `llama.model.decode_attention`. On a CPU several rows are two plain products, for which torch's kernel takes
    twice as long."""
    if q.device.type != "cpu" or len(q) == 1:
        return model.decode_attention(q, k, v, mask)
    q = upcast_on_cpu(q.unflatten(1, (k.shape[2], -1)))  # (R, K, H/K, h)
    # One copy that the product can read: heads apart, in the type of q
    k = k.transpose(1, 2).to(q.dtype, memory_format=torch.contiguous_format)  # (R, K, T, h)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores += mask
    return (scores.softmax(-1).to(v.dtype) @ v.transpose(1, 2)).flatten(1, 2)


class CPUAttentionFunction(torch.autograd.Function):
    """Causal attention by torch's CPU kernels in float32, sequence by sequence into tensors of the whole batch.

    Keeps the inputs and the output in their own type.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
        out, log_sums = torch.empty_like(q), []
        wide = [upcast_on_cpu(t) for t in (q, k, v)]
        for view in _sequence_views(batch):
            part, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(*map(view, wide), is_causal=True)
            view(out).copy_(part)
            log_sums.append(log_sum)
        ctx.save_for_backward(q, k, v, out, *log_sums)
        ctx.batch = batch
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, *log_sums = ctx.saved_tensors
        grads = [torch.empty_like(t) for t in (q, k, v)]
        q, k, v, out, grad = (upcast_on_cpu(t) for t in (q, k, v, out, grad))
        for view, log_sum in zip(_sequence_views(ctx.batch), log_sums, strict=True):
            parts = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                view(grad), view(q), view(k), view(v), view(out), log_sum, 0.0, True
            )
            for whole, part in zip(grads, parts, strict=True):
                view(whole).copy_(part)
        return *grads, None


def _sequence_views(batch: PackedBatch) -> list[Callable[[Tensor], Tensor]]:
    """Views (R, heads, T, h) of (N, heads, h) tensors: of all sequences where they are equally long, else of each."""
    if batch.equal_lengths:
        return [lambda t: view_as_sequences(t, batch)]
    return [lambda t, a=a, b=b: t[a:b].transpose(0, 1)[None] for a, b in batch.spans]


def has_varlen(q: Tensor) -> bool:
    """Whether torch's variable-length kernel takes q (..., h): 2-byte numbers, on Ampere or a later GPU."""
    fits = q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    built = torch.backends.cuda.is_flash_attention_available()
    return fits and built and torch.cuda.get_device_capability(q.device) >= (8, 0)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # takes two seconds to load

    ends = (batch.cu_seqlens, batch.cu_seqlens, batch.max_seqlen, batch.max_seqlen)
    causal = (-1, 0)  # a window: all earlier tokens, no later one
    if _varlen_has_gqa():
        return varlen_attn(q, k, v, *ends, window_size=causal, enable_gqa=True)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return varlen_attn(q, k, v, *ends, window_size=causal)


@cache
def _varlen_has_gqa() -> bool:
    """torch has it since 2.13."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
