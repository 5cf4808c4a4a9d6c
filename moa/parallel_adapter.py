"""Parallel adapter: a bottleneck beside the feed-forward block (arXiv 2110.04366), g (U silu(V u + b_V) + b_U)."""

import math

from torch import Tensor
from torch.nn import functional as F

from moa.adapter import AdapterModule, Site, uniform, zeros
from moa.config import AdapterConfig


class ParallelAdapter(AdapterModule):
    """down: (size, D), up: (D, size). Whole on every model-parallel rank: its width is far too small to cut."""

    def __init__(self, site: Site, config: AdapterConfig):
        super().__init__()
        size, dim = config.adapters["p_adapter"].size, site.in_features
        xavier = uniform(1e-4 * math.sqrt(6 / (dim + size)))  # so small a start leaves the base almost untouched
        self.declare("down", (size, dim), xavier)
        self.declare("down_bias", (size,), zeros)
        self.declare("up", (dim, size), xavier)
        self.declare("up_bias", (dim,), zeros)

    def forward(self, u: Tensor, gate: Tensor | None) -> Tensor:
        """u (N, D), the normed input of the feed-forward block -> what to add to the block's output (N, D)."""
        down, down_bias, up, up_bias = (w.to(u.dtype) for w in (self.down, self.down_bias, self.up, self.up_bias))
        y = F.linear(F.silu(F.linear(u, down, down_bias)), up, up_bias)
        return y if gate is None else y * gate
