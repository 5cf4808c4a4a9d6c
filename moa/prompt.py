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

from moa.adapter import AdapterModule, Site, few, normal, zeros
from moa.config import AdapterConfig
from moa.experts import build_expert_router
from moa.parallel import copy_to_ranks


class Prompt(AdapterModule):
    """P: (E L, D), z: (H,)."""

    def __init__(self, site: Site, config: AdapterConfig):
        super().__init__()
        self.n_experts = config.experts.expert_num
        self.declare("P", (self.n_experts * config.adapters["prompt"].len, site.in_features), normal)
        self.declare("z", (site.n_heads,), zeros, site.outputs(0))
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
        n, n_heads, width = query.shape
        keys, values = self.derived(query.dtype, lambda: self._keys_and_values(wk, wv, width, query.dtype))
        n_kv, length, _ = keys.shape
        if self.n_experts == 1 and few(self, query):  # one kernel
            weight = self.cast("z", query.dtype)[:, None]  # (H, 1)
            if gate is not None:
                weight = (weight * gate[:, :, None]).to(query.dtype)  # (N, H, 1)
            one_row = (query.transpose(0, 1)[None], keys[None], values[None])
            out = F.scaled_dot_product_attention(*one_row, scale=1.0, enable_gqa=True)[0]
            return torch.addcmul(output, out.transpose(0, 1), weight)
        # Query heads that share a key head lie side by side, tokens innermost: (N, H, h) -> (K, h, N * H/K). Then the
        # softmax runs along an outer dimension, which takes a tenth of the time.
        grouped = query.view(n, n_kv, -1, width).transpose(0, 1).reshape(n_kv, -1, width).mT
        attention = (keys @ grouped).softmax(1)  # (K, E L, N * H/K)
        weight = self.cast("z", query.dtype).view(n_kv, 1, 1, 1, -1)
        if gate is not None:  # each rank's heads give part of its gradient
            weight = weight * copy_to_ranks(gate.to(query.dtype)).T[:, None, :, None]
        weighed = attention.view(n_kv, self.n_experts, -1, n, n_heads // n_kv) * weight  # (K, E, L, N, H/K)
        out = (weighed.view(n_kv, length, -1).mT @ values).view(n_kv, n, -1, width)
        return (output.view(n, n_kv, -1, width) + out.transpose(0, 1)).flatten(1, 2)

    def _keys_and_values(
        self, wk: Callable[[Tensor], Tensor], wv: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Of the prompt, (K, E L, h) each, the keys divided by sqrt(h)."""
        prompt = copy_to_ranks(self.cast("P", dtype))
        keys, values = (w(prompt).view(len(prompt), -1, width).transpose(0, 1) for w in (wk, wv))
        return keys / math.sqrt(width), values
