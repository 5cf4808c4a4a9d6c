"""Parallel adapter: a bottleneck beside the feed-forward block (arXiv 2110.04366).

sum_e g_e (U_e f(V_e u + b_V) + b_U); f is silu unless `p_adapter_activation` says otherwise.
"""

import math

from torch import Tensor
from torch.nn import functional as F

from moa.adapter import AdapterModule, Site, uniform, zeros
from moa.config import AdapterConfig
from moa.experts import build_expert_router

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class ParallelAdapter(AdapterModule):
    """E experts, lying side by side: down (E size, D), or (size, D) where they share it (hydra); up (D, E size), its
    bias (E, D). Whole on every model-parallel rank: its width is far too small to cut."""

    def __init__(self, site: Site, config: AdapterConfig):
        super().__init__()
        knobs, n_experts, dim = config.adapters["p_adapter"], config.experts.expert_num, site.in_features
        self.size, self.activation = knobs.size, ACTIVATIONS[knobs.activation]
        middle = knobs.size if knobs.hydra else knobs.size * n_experts
        xavier = uniform(1e-4 * math.sqrt(6 / (dim + knobs.size)))  # so small a start hardly touches the base
        self.declare("down", (middle, dim), xavier)
        self.declare("down_bias", (middle,), zeros)
        self.declare("up", (dim, knobs.size * n_experts), xavier)
        self.declare("up_bias", (n_experts, dim), zeros, decay=False)
        self.expert_router = build_expert_router(site, config)

    def forward(self, u: Tensor, gate: Tensor | None) -> Tensor:
        """u (N, D), the normed input of the feed-forward block -> what to add to the block's output (N, D). The gate
        (N, E) weighs the narrow middles, and the biases beside them."""
        down, down_bias, up, up_bias = (w.to(u.dtype) for w in (self.down, self.down_bias, self.up, self.up_bias))
        hidden = self.activation(F.linear(u, down, down_bias))
        if gate is None:
            return F.linear(hidden, up, up_bias[0])
        hidden = (hidden.unflatten(-1, (-1, self.size)) * gate[:, :, None]).flatten(1)  # (N, E size)
        return F.linear(hidden, up) + gate @ up_bias
