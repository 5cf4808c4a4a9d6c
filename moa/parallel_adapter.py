"""Parallel adapter: a bottleneck beside the feed-forward block (arXiv 2110.04366).

sum_e g_e (U_e f(V_e u + b_V) + b_U); f is silu unless `p_adapter_activation` says otherwise.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from moa.adapter import AdapterModule, Target, add_product, laid_out, narrow_type, uniform, weigh, zeros
from moa.config import AdapterConfig
from moa.expert_routers import build_expert_router

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class ParallelAdapter(AdapterModule):
    """E experts, lying side by side: down (E size, D), or (size, D) where they share it (hydra); up (D, E size), its
    bias (E, D). Whole on every model-parallel rank: its width is far too small to cut."""

    def __init__(self, site: Target, config: AdapterConfig):
        super().__init__()
        knobs, n_experts, dim = config.adapters["p_adapter"], config.experts.expert_num, site.in_features
        self.site, self.size, self.activation = site, knobs.size, ACTIVATIONS[knobs.activation]
        middle = knobs.size if knobs.hydra else knobs.size * n_experts
        xavier = uniform(1e-4 * math.sqrt(6 / (dim + knobs.size)))  # so small a start hardly touches the base
        self.add_parameter("down", (middle, dim), xavier)
        self.add_parameter("down_bias", (middle,), zeros)
        self.add_parameter("up", (dim, knobs.size * n_experts), xavier)
        self.add_parameter("up_bias", (n_experts, dim), zeros, decay=False)
        self.expert_router = build_expert_router(site, config)

    def reads(self) -> list[Tensor]:
        return [self.down]

    def forward(self, output: Tensor, down: Tensor, gate: Tensor | None) -> Tensor:
        """The block's output (N, D) and V u, (N, E size) or (N, size), u being the normed input of the feed-forward
        block -> the output with the adapter's. The gate (N, E) weighs the narrow middles, and the biases beside them:
        both in one product."""
        hidden = self.activation(down + self.cast("down_bias", down.dtype))
        if gate is None:
            gate = down.new_ones(1, 1).expand(len(down), -1)
        else:
            hidden = weigh(hidden, gate, self.size)  # (N, E size)
        dtype = narrow_type(self, down)
        up = self.derived(("up", dtype), lambda: laid_out(torch.cat([self.up.T, self.up_bias]), dtype))
        return add_product(output, self.site, torch.cat([hidden, gate], 1), up)
