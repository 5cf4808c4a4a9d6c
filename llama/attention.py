"""Causal attention over a packed batch, and over the KV cache.

Shapes: N tokens, R rows, H query heads, K key/value heads (each serves H/K query heads), h head width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from llama.kv_cache import KVCache
from llama.packing import PackedBatch
from moa.adapter import wide_on_cpu

aten = torch.ops.aten


def causal_attention(q: Tensor, k: Tensor, v: Tensor, rows: PackedBatch, flash: bool) -> Tensor:
    """q (N, H, h), k and v (N, K, h) -> (N, H, h): each token attends to itself and the earlier ones of its own row.

    flash: use flash-attn 2's variable-length kernel (a GPU and bf16 or fp16), one launch for all rows; else PyTorch's
    scaled_dot_product_attention where all rows are of one length, its own variable-length kernel where they are not,
    and row by row where the GPU has none.
    """
    if flash:
        from flash_attn import flash_attn_varlen_func

        longest = max(rows.lengths)
        return flash_attn_varlen_func(q, k, v, rows.cu_seqlens, rows.cu_seqlens, longest, longest, causal=True)
    if q.device.type == "cpu":
        return _CPUAttention.apply(q, k, v, rows)
    if rows.uniform:
        shape = (len(rows.lengths), rows.lengths[0])
        return _sdpa(*(t.unflatten(0, shape) for t in (q, k, v))).flatten(0, 1)
    if _has_varlen(q):
        return _varlen(q, k, v, rows)
    return torch.cat([_sdpa(q[None, a:b], k[None, a:b], v[None, a:b])[0] for a, b in rows.spans])


def _has_varlen(q: Tensor) -> bool:
    """Whether PyTorch's variable-length kernel takes such a query (..., h): flash attention of two-byte numbers, on a
    GPU of the Ampere generation or a later one."""
    fits = q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    built = torch.backends.cuda.is_flash_attention_available()
    return fits and built and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _varlen(q: Tensor, k: Tensor, v: Tensor, rows: PackedBatch) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # takes two seconds to load

    longest, causal = max(rows.lengths), (-1, 0)  # a window: all that is earlier, nothing that is later
    ends = (rows.cu_seqlens, rows.cu_seqlens, longest, longest)
    return varlen_attn(q, k, v, *ends, window_size=causal, enable_gqa=True)


def cached_attention(q: Tensor, cache: KVCache, layer: int) -> Tensor:
    """Decode step: q (R, H, h), one new token per cached row -> (R, H, h), over all that the cache holds of the row.

    The H/K query heads that share a key head are treated as that many queries of one head: nothing is repeated.
    """
    k, v = cache.filled(layer)  # (R, K, T, h)
    grouped = q.unflatten(1, (k.shape[1], -1))  # (R, K, H/K, h)
    if q.device.type == "cpu":
        return _decode_on_cpu(grouped, k, v, cache.mask).flatten(1, 2)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=cache.mask).flatten(1, 2)


def _decode_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """q (R, K, H/K, h), k and v (R, K, T, h) -> (R, K, H/K, h), scores in float32. Two plain products: PyTorch's kernel
    takes twice as long for so few queries."""
    scores = wide_on_cpu(q) @ wide_on_cpu(k).mT / math.sqrt(q.shape[-1])
    if mask is not None:
        scores += mask
    return scores.softmax(-1).to(v.dtype) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(R, T, heads, h) in and out."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


class _CPUAttention(torch.autograd.Function):
    """PyTorch's kernels for a CPU, in float32 (in bf16 their backward pass takes three to five times as long), row by
    row into tensors of the whole batch. Kept are the inputs and the output in their own type."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, rows: PackedBatch) -> Tensor:
        out, sums = torch.empty_like(q), []
        wide = [wide_on_cpu(t) for t in (q, k, v)]
        for row in _pieces(rows):
            part, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(*(row(t) for t in wide), is_causal=True)
            row(out).copy_(part)
            sums.append(log_sum)
        ctx.save_for_backward(q, k, v, out, *sums)
        ctx.rows = rows
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, *sums = ctx.saved_tensors  # to be read once: recomputation hands them out only once
        grads = [torch.empty_like(t) for t in (q, k, v)]
        q, k, v, out, grad = (wide_on_cpu(t) for t in (q, k, v, out, grad))
        for row, log_sum in zip(_pieces(ctx.rows), sums, strict=True):
            found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                row(grad), row(q), row(k), row(v), row(out), log_sum, 0.0, True
            )
            for whole, part in zip(grads, found, strict=True):
                row(whole).copy_(part)
        return *grads, None


def _pieces(rows: PackedBatch) -> list[Callable[[Tensor], Tensor]]:
    """Views (R, heads, T, h) of (N, heads, h) tensors: of all rows at once where they are of one length, else of one
    row each."""
    if rows.uniform:
        shape = (len(rows.lengths), rows.lengths[0])
        return [lambda t: t.unflatten(0, shape).transpose(1, 2)]
    return [lambda t, a=a, b=b: t[a:b].transpose(0, 1)[None] for a, b in rows.spans]
