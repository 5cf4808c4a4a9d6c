"""Routers of a block: from the block's input to one gate per adapter, by name.

s is the logistic sigmoid; x (N, D) the block's input, before any norm; n the number of the block's adapters. A router
with `per_row` is asked once per row, about the mean over the tokens of its prompt, (R, D); its gates hold for the whole
row, also while decoding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moa.adapter import AdapterModule, like_linear, narrow_type, reads_of, shared_out, stacked, zeros
from moa.config import AdapterConfig, Slot
from moa.parallel import Cut

Gates = dict[str, Tensor]  # slot -> (N, 1), in the type of what they weigh; worked out in float32


class RouterLinear(AdapterModule):
    """W x + b, b zero at the start; cut as a site's inputs where it reads one. `finish` makes it of the product W x: in
    float32, whatever the product's type."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, cut: Cut | None = None):
        super().__init__()
        self.add_parameter("weight", (out_features, in_features), like_linear(in_features), cut)
        if bias:
            self.add_parameter("bias", (out_features,), zeros)
        else:
            self.register_parameter("bias", None)

    def reads(self) -> list[Tensor]:
        return [self.weight]

    def finish(self, y: Tensor) -> Tensor:
        return y.float() if self.bias is None else y + self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(F.linear(x, self.cast("weight", x.dtype)))


class SwiGLU(AdapterModule):
    """W2 (silu(W1 x) * W3 x), each with a bias that is zero at the start."""

    def __init__(self, in_features: int, hidden: int, out_features: int):
        super().__init__()
        self.w1 = RouterLinear(in_features, hidden)
        self.w2 = RouterLinear(hidden, out_features)
        self.w3 = RouterLinear(in_features, hidden)

    def reads(self) -> list[Tensor]:
        return [self.w1.weight, self.w3.weight]

    def finish(self, y1: Tensor, y3: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1.finish(y1)) * self.w3.finish(y3))


class SoftRouter(AdapterModule):
    """g = s(router(x)) per token: the gates of a block do not compete. With `gate_activation` softmax they do."""

    def __init__(self, slots: list[Slot], dim: int, config: AdapterConfig):
        super().__init__()
        self.slots = [slot.name for slot in slots]
        hidden = config.router.swi_x * len(slots)
        self.router: nn.Module = SwiGLU(dim, hidden, len(slots)) if hidden else RouterLinear(dim, len(slots))
        self.compete = config.router.gate_activation == "softmax"

    def forward(self, x: Tensor) -> Gates:
        (y,) = self._read(x, self.router)
        return self._by_name(y.softmax(-1) if self.compete else torch.sigmoid(y), x)

    def _read(self, x: Tensor, *layers: RouterLinear | SwiGLU) -> list[Tensor]:
        """What each of these makes of x, (N, ...) float32: one product for all."""
        dtype = narrow_type(self, x)
        stack = self.derived(dtype, lambda: stacked(reads_of(layers), dtype))
        products = shared_out(F.linear(x.to(dtype), stack), layers)
        return [layer.finish(*products[layer]) for layer in layers]

    def _by_name(self, gates: Tensor, x: Tensor) -> Gates:
        return dict(zip(self.slots, gates.to(narrow_type(self, x)).split(1, dim=-1), strict=True))


class InstanceRouter(SoftRouter):
    """As the soft router, once per row."""

    per_row = True


class UniPELTRouter(AdapterModule):
    """UniPELT (arXiv 2110.07577): one gate per row and kind of adapter, s(W x + b); a block's LoRAs share theirs."""

    per_row = True

    def __init__(self, slots: list[Slot], dim: int, config: AdapterConfig):
        super().__init__()
        self.kind_of = {slot.name: slot.kind for slot in slots}
        for kind in dict.fromkeys(self.kind_of.values()):
            self.add_module(kind, RouterLinear(dim, 1))

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
        self.threshold = None if knobs.const_threshold else RouterLinear(dim, 1)

    def limit(self, x: Tensor) -> Tensor | float:
        """G of each token, (N, 1), or the constant that it is for all."""
        return self.max_threshold if self.threshold is None else self._limit(self.threshold(x))

    def _limit(self, y: Tensor) -> Tensor:
        return self.max_threshold * torch.sigmoid(y)

    def forward(self, x: Tensor) -> Gates:
        y, *threshold = self._read(x, self.router, *([] if self.threshold is None else [self.threshold]))
        gates, limit = torch.sigmoid(y), self._limit(*threshold) if threshold else self.max_threshold
        mask = (gates >= limit).to(gates.dtype)
        if self.straight_through:
            mask = mask - (limit - limit.detach())
        return self._by_name(gates * mask, x)
