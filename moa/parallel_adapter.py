"""Parallel adapter: a bottleneck beside the feed-forward block (arXiv 2110.04366).

sum_e g_e (U_e f(V_e x + b_V) + b_U)        f is silu unless `p_adapter_activation` says otherwise
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from moa.adapter import AdapterModule, Target, apply_gates, uniform, zeros
from moa.config import AdapterConfig
from moa.expert_routers import build_expert_router

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class ParallelAdapter(AdapterModule):
    """E experts side by side: down_proj (E size, D), or (size, D) where they share it (hydra); up_proj (D, E size) with
    a bias (E, D). Replicated on every model-parallel rank: its width is too small to shard."""

    def __init__(self, target: Target, config: AdapterConfig):
        super().__init__()
        options, num_experts, dim = config.adapters["p_adapter"], config.expert_num, target.in_features
        self.target, self.size, self.activation = target, options.size, ACTIVATIONS[options.activation]
        width = options.size if options.hydra else options.size * num_experts
        xavier = uniform(1e-4 * math.sqrt(6 / (dim + options.size)))  # Xavier's with gain 1e-4
        self.add_parameter("down_proj", (width, dim), xavier)
        self.add_parameter("down_proj_bias", (width,), zeros)
        self.add_parameter("up_proj", (dim, options.size * num_experts), xavier)
        self.add_parameter("up_proj_bias", (num_experts, dim), zeros, decay=False)
        self.expert_router = build_expert_router(target, config)

    def forward(self, x: Tensor, output: Tensor, gate: Tensor | None) -> Tensor:
        """x (N, D), the normed input of the feed-forward block; output (N, D), the block's; gate (N, E) -> (N, D)."""
        hidden = self.activation(self.target.project_in(x, self.down_proj) + self.down_proj_bias.to(x.dtype))
        if gate is None:
            gate = x.new_ones(1, 1).expand(len(x), -1)
        hidden = apply_gates(hidden, gate, self.size)  # (N, E size)
        up = torch.cat([self.up_proj, self.up_proj_bias.T], 1)  # (D, E size + E): each bias is gated as its expert
        return output + self.target.project_out(torch.cat([hidden, gate], 1), up)
