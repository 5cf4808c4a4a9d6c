"""Routers of a block: from the block's input to one gate per adapter, by name.

s is the logistic sigmoid; x (N, D) the block's input, before any norm; n the number of the block's adapters. A router
with `per_row` is asked once per row, about the mean over the tokens of its prompt, (R, D); its gates hold for the whole
row, also while decoding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moa.adapter import AdapterModule, like_linear, zeros
from moa.config import AdapterConfig, Slot
from moa.parallel import Cut, mp_size, sum_over_ranks

Gates = dict[str, Tensor]  # slot -> (N, 1), float32 from the router


class Linear(AdapterModule):
    """W x + b, b zero at the start. Computes in x's dtype, returns float32. cut "in": x is this rank's part."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, cut: str | None = None):
        super().__init__()
        self.input_is_cut = cut == "in"
        weight_cut = Cut(1, mp_size()) if self.input_is_cut else None
        self.declare("weight", (out_features, in_features), like_linear(in_features), weight_cut)
        if bias:
            self.declare("bias", (out_features,), zeros)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype)).float()
        if self.input_is_cut:
            y = sum_over_ranks(y)
        return y if self.bias is None else y + self.bias


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
    """g = s(router(x)) per token: the gates of a block do not compete. With `gate_activation` softmax they do."""

    def __init__(self, slots: list[Slot], dim: int, config: AdapterConfig):
        super().__init__()
        self.slots = [slot.name for slot in slots]
        hidden = config.router.swi_x * len(slots)
        self.router: nn.Module = SwiGLU(dim, hidden, len(slots)) if hidden else Linear(dim, len(slots))
        self.compete = config.router.gate_activation == "softmax"

    def forward(self, x: Tensor) -> Gates:
        y = self.router(x)
        return self._by_name(y.softmax(-1) if self.compete else torch.sigmoid(y))

    def _by_name(self, gates: Tensor) -> Gates:
        return dict(zip(self.slots, gates.split(1, dim=-1), strict=True))


class InstanceRouter(SoftRouter):
    """As the soft router, once per row."""

    per_row = True


class KindRouter(AdapterModule):
    """UniPEFT (arXiv 2110.07577): one gate per row and kind of adapter, s(W x + b); a block's LoRAs share theirs."""

    per_row = True

    def __init__(self, slots: list[Slot], dim: int, config: AdapterConfig):
        super().__init__()
        self.kind_of = {slot.name: slot.kind for slot in slots}
        for kind in dict.fromkeys(self.kind_of.values()):
            self.add_module(kind, Linear(dim, 1))

    def forward(self, x: Tensor) -> Gates:
        gates = {kind: torch.sigmoid(linear(x)) for kind, linear in self.named_children()}
        return {slot: gates[kind] for slot, kind in self.kind_of.items()}


class SparseRouter(SoftRouter):
    """g = s(router(x)), G = G_max s(w x + b); an adapter counts with g where g >= G and with 0 elsewhere.

    The comparison has no derivative, so that nothing would ever teach the threshold. Under "straight_through" the mask
    [g >= G] passes gradients on to G as if it were g - G (arXiv 1308.3432). The forward value and the gradient of g are
    untouched.
    """

    def __init__(self, slots: list[Slot], dim: int, config: AdapterConfig):
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
        return self._by_name(gates * mask)
