"""Causal attention over a packed batch, and over the KV cache.

Shapes: N tokens, R rows, H query heads, K key/value heads (each serves H/K query heads), h head width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from llama.cache import Cache
from moa.rows import Rows


def causal_attention(q: Tensor, k: Tensor, v: Tensor, rows: Rows, flash: bool) -> Tensor:
    """q (N, H, h), k and v (N, K, h) -> (N, H, h): each token attends to itself and the earlier ones of its own row.

    flash: use flash-attn 2's variable-length kernel (a GPU and bf16 or fp16), one launch for all rows; else PyTorch's
    scaled_dot_product_attention, once where all rows are of one length and row by row where they are not.
    """
    if flash:
        from flash_attn import flash_attn_varlen_func

        longest = max(rows.lengths)
        return flash_attn_varlen_func(q, k, v, rows.boundaries, rows.boundaries, longest, longest, causal=True)
    if rows.uniform:
        shape = (len(rows.lengths), rows.lengths[0])
        return _sdpa(*(t.unflatten(0, shape) for t in (q, k, v)), is_causal=True).flatten(0, 1)
    out = [_sdpa(q[None, a:b], k[None, a:b], v[None, a:b], is_causal=True)[0] for a, b in rows.spans]
    return torch.cat(out)


def cached_attention(q: Tensor, cache: Cache, layer: int) -> Tensor:
    """Decode step: q (R, H, h), one new token per cached row -> (R, H, h), over all that the cache holds of the row.

    The H/K query heads that share a key head are treated as that many queries of one head: nothing is repeated.
    """
    k, v = cache.filled(layer)  # (R, T, K, h)
    grouped = q.unflatten(1, (k.shape[2], -1))  # (R, K, H/K, h)
    out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=cache.visible)
    return out.flatten(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """(R, T, heads, h) in and out."""
    dtype = q.dtype
    if q.device.type == "cpu":  # its bf16 kernel's backward pass takes three to five times as long as float32's
        q, k, v = q.float(), k.float(), v.float()
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True)
    return out.transpose(1, 2).to(dtype)
