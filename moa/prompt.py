"""Layer-wise prompt with a zero-initialised scale per head (LLaMA-Adapter's, arXiv 2303.16199).

Each head's query also attends to L trained vectors, in a softmax of their own:
g z softmax(q (W_k P)^T / sqrt(h)) (W_v P), with the frozen W_k and W_v and no rotary embedding on the keys.
"""

import math
from collections.abc import Callable

from torch import Tensor

from moa.adapter import AdapterModule, Site, normal, zeros
from moa.config import AdapterConfig
from moa.parallel import copy_to_ranks


class Prompt(AdapterModule):
    """P: (L, D), z: (H,)."""

    def __init__(self, site: Site, config: AdapterConfig):
        super().__init__()
        self.declare("P", (config.adapters["prompt"].len, site.in_features), normal)
        self.declare("z", (site.n_heads,), zeros, cut=0)

    def forward(
        self, query: Tensor, wk: Callable[[Tensor], Tensor], wv: Callable[[Tensor], Tensor], gate: Tensor | None
    ) -> Tensor:
        """query (N, H, h), rotated -> what to add to the heads' output (N, H, h). wk, wv: the frozen projections.

        Heads here are this rank's heads. P is whole on every rank; wk and wv see to its gradient.
        """
        n, n_heads, width = query.shape
        prompt = self.P.to(query.dtype)
        keys = wk(prompt).view(len(prompt), -1, width).permute(1, 2, 0)  # (K, h, L)
        values = wv(prompt).view(len(prompt), -1, width).transpose(0, 1)  # (K, L, h)
        # Query heads that share a key head lie side by side: (N, H, h) -> (K, N * H/K, h)
        grouped = query.view(n, len(keys), -1, width).transpose(0, 1).reshape(len(keys), -1, width)
        attention = (grouped @ keys / math.sqrt(width)).softmax(-1, dtype=keys.dtype)
        out = (attention @ values).view(len(keys), n, -1, width).transpose(0, 1).reshape(n, n_heads, width)
        weight = self.z.to(query.dtype)[:, None]  # (H, 1)
        if gate is not None:
            weight = weight * copy_to_ranks(gate)[:, :, None]  # (N, H, 1); each rank's heads give part of its gradient
        return out * weight
