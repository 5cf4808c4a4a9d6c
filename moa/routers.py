"""Routers of a block: from the block's input to one gate per adapter, by name.

s is the logistic sigmoid; x (N, D) the block's input, before any norm; n the number of the block's adapters.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moa.adapter import AdapterModule, like_linear, zeros
from moa.config import AdapterConfig

Gates = dict[str, Tensor]  # slot -> (N, 1)


class Linear(AdapterModule):
    """W x + b, b zero at the start. Computes in x's dtype, returns float32."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.declare("weight", (out_features, in_features), like_linear(in_features))
        self.declare("bias", (out_features,), zeros)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)).float()


class SwiGLU(AdapterModule):
    """W2 (silu(W1 x) * W3 x), each with a bias that is zero at the start."""

    def __init__(self, in_features: int, hidden: int, out_features: int):
        super().__init__()
        self.w1 = Linear(in_features, hidden)
        self.w2 = Linear(hidden, out_features)
        self.w3 = Linear(in_features, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SoftRouter(AdapterModule):
    """g = s(router(x)) per token; the gates of a block do not compete."""

    def __init__(self, slots: list[str], dim: int, config: AdapterConfig):
        super().__init__()
        self.slots = slots
        hidden = config.router.swi_x * len(slots)
        self.router: nn.Module = SwiGLU(dim, hidden, len(slots)) if hidden else Linear(dim, len(slots))

    def forward(self, x: Tensor) -> Gates:
        return self._by_name(torch.sigmoid(self.router(x)), x.dtype)

    def _by_name(self, gates: Tensor, dtype: torch.dtype) -> Gates:
        return dict(zip(self.slots, gates.to(dtype).split(1, dim=-1), strict=True))


class SparseRouter(SoftRouter):
    """g = s(router(x)), G = G_max s(w x + b); an adapter counts with g where g >= G and with 0 elsewhere.

    The comparison has no derivative, so that nothing would ever teach the threshold. Under "straight_through" the mask
    [g >= G] passes gradients on to G as if it were g - G (arXiv 1308.3432). The forward value and the gradient of g are
    untouched.
    """

    def __init__(self, slots: list[str], dim: int, config: AdapterConfig):
        super().__init__(slots, dim, config)
        knobs = config.router
        self.max_threshold = knobs.max_threshold
        self.straight_through = knobs.threshold_gradient == "straight_through" and not knobs.const_threshold
        self.threshold = None if knobs.const_threshold else Linear(dim, 1)

    def forward(self, x: Tensor) -> Gates:
        gates = torch.sigmoid(self.router(x))
        limit = self.max_threshold
        if self.threshold is not None:
            limit = self.max_threshold * torch.sigmoid(self.threshold(x))
        mask = (gates >= limit).to(gates.dtype)
        if self.straight_through:
            mask = mask - (limit - limit.detach())
        return self._by_name(gates * mask, x.dtype)
