"""Causal attention over a packed batch, and over the KV cache.

Shapes: N tokens, R sequences, T tokens of the longest, H query heads, K key/value heads (each serves H/K query heads),
h head width.
"""

import inspect
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from llama.packing import PackedBatch


def causal_attention(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, flash: bool) -> Tensor:
    """q (N, H, h), k and v (N, K, h) -> (N, H, h): each token attends to itself and the earlier ones of its sequence.

    flash: flash-attn 2's variable-length kernel (a GPU and bf16 or fp16). Else scaled_dot_product_attention for
    equal lengths, torch's variable-length kernel where the GPU has it, and one sequence at a time elsewhere.
    """
    if flash:
        from flash_attn import flash_attn_varlen_func

        ends = (batch.cu_seqlens, batch.cu_seqlens, batch.max_seqlen, batch.max_seqlen)
        return flash_attn_varlen_func(q, k, v, *ends, causal=True)
    if batch.equal_lengths:
        shape = (len(batch.lengths), batch.max_seqlen)
        return _sdpa(*(t.unflatten(0, shape) for t in (q, k, v))).flatten(0, 1)
    if q.device.type == "cuda" and _has_varlen(q):
        return _varlen(q, k, v, batch)
    return torch.cat([_sdpa(q[None, a:b], k[None, a:b], v[None, a:b])[0] for a, b in batch.spans])


def decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One new token per sequence, q (R, H, h), over k and v (R, T, K, h) -> (R, H, h). mask (R, 1, 1, T), additive.

    The H/K query heads that share a key head are treated as that many queries of one head: nothing is repeated.
    """
    q = q.unflatten(1, (k.shape[2], -1))  # (R, K, H/K, h)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(R, T, heads, h) in and out."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _has_varlen(q: Tensor) -> bool:
    """Whether torch's variable-length kernel takes q (..., h): 2-byte numbers, on Ampere or a later GPU."""
    fits = q.dtype.itemsize == 2 and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256
    built = torch.backends.cuda.is_flash_attention_available()
    return fits and built and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _varlen(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
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
