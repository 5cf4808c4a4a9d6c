"""Layer-wise prompt with a zero-initialised scale per head (LLaMA-Adapter's, arXiv 2303.16199).

Each head's query also attends to E L trained vectors, L of each expert, in a softmax of their own; then the part of
each expert is weighed: z sum_e g_e softmax(q (W_k P)^T / sqrt(h))_e (W_v P_e), with the frozen W_k and W_v and no
rotary embedding on the keys.
"""

import math
from collections.abc import Callable

from torch import Tensor

from moa.adapter import AdapterModule, Site, normal, zeros
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
        u: Tensor,
        query: Tensor,
        wk: Callable[[Tensor], Tensor],
        wv: Callable[[Tensor], Tensor],
        gate: Tensor | None,
    ) -> Tensor:
        """query (N, H, h), rotated -> what to add to the heads' output (N, H, h). gate: (N, E). wk, wv: the frozen
        projections. u (N, D), the attention's input, is for the router of experts alone.

        Heads here are this rank's heads. P is whole on every rank.
        """
        n, n_heads, width = query.shape
        prompt = copy_to_ranks(self.P.to(query.dtype))
        keys = wk(prompt).view(len(prompt), -1, width).permute(1, 2, 0)  # (K, h, E L)
        values = wv(prompt).view(len(prompt), -1, width).transpose(0, 1)  # (K, E L, h)
        # Query heads that share a key head lie side by side: (N, H, h) -> (K, N * H/K, h)
        grouped = query.view(n, len(keys), -1, width).transpose(0, 1).reshape(len(keys), -1, width)
        attention = (grouped @ keys / math.sqrt(width)).softmax(-1, dtype=keys.dtype)
        if gate is not None and self.n_experts > 1:
            gate = copy_to_ranks(gate)  # each rank's heads give part of its gradient
            parts = attention.view(len(keys), n, -1, self.n_experts, len(prompt) // self.n_experts)
            attention = (parts * gate[None, :, None, :, None]).view_as(attention)
        out = (attention @ values).view(len(keys), n, -1, width).transpose(0, 1).reshape(n, n_heads, width)
        weight = self.z.to(query.dtype)[:, None]  # (H, 1)
        if gate is not None and self.n_experts == 1:
            weight = weight * copy_to_ranks(gate)[:, :, None]  # (N, H, 1)
        return out * weight
