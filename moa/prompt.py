"""Layer-wise prompt with a zero-initialised scale per head (LLaMA-Adapter's, arXiv 2303.16199).

Each head's query also attends to E L trained vectors, L of each expert, in a softmax of their own; then the part of
each expert is weighed: z sum_e g_e softmax(q (W_k P)^T / sqrt(h))_e (W_v P_e), with the frozen W_k and W_v and no
rotary embedding on the keys.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from moa.adapter import AdapterModule, Target, few, normal, wide_on_cpu, zeros
from moa.config import AdapterConfig
from moa.expert_routers import build_expert_router
from moa.parallel import copy_to_model_parallel_region


class Prompt(AdapterModule):
    """P: (E L, D), z: (H,)."""

    def __init__(self, site: Target, config: AdapterConfig):
        super().__init__()
        self.n_experts = config.experts.expert_num
        self.add_parameter("P", (self.n_experts * config.adapters["prompt"].len, site.in_features), normal)
        self.add_parameter("z", (site.n_heads,), zeros, site.outputs(0))
        self.expert_router = build_expert_router(site, config)

    def forward(
        self,
        output: Tensor,
        u: Tensor,
        query: Tensor,
        wk: Callable[[Tensor], Tensor],
        wv: Callable[[Tensor], Tensor],
        gate: Tensor | None,
    ) -> Tensor:
        """The heads' output (N, H, h) and their queries, rotated, likewise -> the output with the prompt's. gate:
        (N, E). wk, wv: the frozen projections. u (N, D), the attention's input, does not matter here.

        Heads here are this rank's heads. P is whole on every rank.
        """
        keys, values = self.derived(query.dtype, lambda: self._keys_and_values(wk, wv, query.shape[2], query.dtype))
        if self.n_experts == 1 and few(self, query):  # one kernel
            weight = self.cast("z", query.dtype)[:, None]  # (H, 1)
            if gate is not None:
                weight = (weight * gate[:, :, None]).to(query.dtype)  # (N, H, 1)
            one_row = (query.transpose(0, 1)[None], keys[None], values[None])
            out = F.scaled_dot_product_attention(*one_row, scale=1.0, enable_gqa=True)[0]
            return torch.addcmul(output, out.transpose(0, 1), weight)
        weight = self.cast("z", query.dtype)[:, None, None]
        if gate is not None:  # each rank's heads give part of its gradient
            weight = weight * copy_to_model_parallel_region(gate.to(query.dtype)).T
        else:
            weight = weight.expand(-1, self.n_experts, len(query))
        return _Attention.apply(output, query, keys, values, weight)

    def _keys_and_values(
        self, wk: Callable[[Tensor], Tensor], wv: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Of the prompt, (K, E L, h) each, the keys divided by sqrt(h)."""
        prompt = copy_to_model_parallel_region(self.cast("P", dtype))
        keys, values = (w(prompt).view(len(prompt), -1, width).transpose(0, 1) for w in (wk, wv))
        return keys / math.sqrt(width), values


class _Attention(torch.autograd.Function):
    """output and query (N, H, h), keys and values (K, E L, h), weight (H, E, N) -> output + sum_e weight_e times the
    part of expert e in softmax(query keys^T) values.

    Heads stay where they are: each is a matrix whose rows lie apart, and products read and write it so. Scores lie with
    tokens innermost: then the softmax runs along an outer dimension, which takes a tenth of the time. On a CPU all is
    worked out in float32, as in its attention.
    """

    @staticmethod
    def forward(ctx, output: Tensor, query: Tensor, keys: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        q, k, v, g = _for_products(query, keys, values, weight)
        attention = torch.bmm(k, q.mT).softmax(1)  # (H, E L, N)
        total = output.to(q.dtype, copy=True)
        total.transpose(0, 1).baddbmm_(_weighed(attention, g).mT, v)
        ctx.save_for_backward(query, keys, values, weight, attention.to(query.dtype))
        return total.to(output.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        *inputs, attention = ctx.saved_tensors
        q, k, v, g = _for_products(*inputs)
        attention, heads = wide_on_cpu(attention), wide_on_cpu(grad).transpose(0, 1)  # (H, E L, N) and (H, N, h)
        of_weighed = torch.bmm(v, heads.mT)  # (H, E L, N)
        of_weight = (of_weighed * attention).unflatten(1, (g.shape[1], -1)).sum(2)
        of_values = torch.bmm(_weighed(attention, g), heads)
        of_scores = torch.ops.aten._softmax_backward_data(_weighed(of_weighed, g), attention, 1, attention.dtype)
        of_keys = torch.bmm(of_scores, q)
        of_query = torch.empty_like(inputs[0], dtype=q.dtype)
        torch.bmm(of_scores.mT, k, out=of_query.transpose(0, 1))
        of_keys, of_values = (t.unflatten(0, (len(inputs[1]), -1)).sum(1) for t in (of_keys, of_values))
        found = (of_query, of_keys, of_values, of_weight)
        return grad, *(of.to(t.dtype) for of, t in zip(found, inputs, strict=True))


def _for_products(query: Tensor, keys: Tensor, values: Tensor, weight: Tensor) -> list[Tensor]:
    """Queries (H, N, h), keys and values of each query head (H, E L, h), weights."""
    shared = (t.repeat_interleave(query.shape[1] // len(t), 0) for t in (keys, values))
    return [wide_on_cpu(t) for t in (query.transpose(0, 1), *shared, weight)]


def _weighed(scores: Tensor, weight: Tensor) -> Tensor:
    """Scores (H, E L, N), those of each expert by its weight (H, E, N)."""
    return (scores.unflatten(1, (weight.shape[1], -1)) * weight[:, :, None]).flatten(1, 2)
