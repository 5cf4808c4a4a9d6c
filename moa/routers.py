"""Routers of a block: from the block's input x, before any norm, to one gate per adapter, by slot name.

s is the logistic sigmoid; x (N, D); n the number of the block's adapters. A router with `per_sequence` gets the mean
of x over each sequence's prompt tokens, (R, D). Its gates hold for the whole sequence, also while decoding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moa.adapter import AdapterModule, Init, Target, linear_init, zeros
from moa.config import AdapterConfig, Slot

Gates = dict[str, Tensor]  # slot -> (N, 1)


class RouterLinear(AdapterModule):
    """W x + b in float32, b zero at the start. target: the layer whose input x is; W is sharded as its inputs.

    init: of W (default: `linear_init`).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        target: Target | None = None,
        init: Init | None = None,
    ):
        super().__init__()
        self.target = target
        shard = target.shard_inputs(1) if target is not None else None
        self.add_parameter("weight", (out_features, in_features), init or linear_init(in_features), shard)
        if bias:
            self.add_parameter("bias", (out_features,), zeros)
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.target is not None:
            return self.add_bias(self.target.project_in(x, self.weight))
        return self.add_bias(F.linear(x, self.weight.to(x.dtype)))

    def add_bias(self, y: Tensor) -> Tensor:
        """W x -> W x + b, float32."""
        return y.float() if self.bias is None else y + self.bias


class SwiGLU(AdapterModule):
    """W2 (silu(W1 x) * W3 x), each with a bias that is zero at the start."""

    def __init__(self, in_features: int, hidden: int, out_features: int):
        super().__init__()
        self.w1 = RouterLinear(in_features, hidden)
        self.w2 = RouterLinear(hidden, out_features)
        self.w3 = RouterLinear(in_features, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class SoftRouter(AdapterModule):
    """g = s(router(x)) per token: gates do not compete. With `gate_activation` softmax they do."""

    def __init__(self, slots: list[Slot], dim: int, config: AdapterConfig):
        super().__init__()
        self.slots = [slot.name for slot in slots]
        hidden = config.swi_x * len(slots)
        self.proj: nn.Module = SwiGLU(dim, hidden, len(slots)) if hidden else RouterLinear(dim, len(slots))
        self.softmax = config.gate_activation == "softmax"

    def forward(self, x: Tensor) -> Gates:
        """x (N, D) -> gates (N, 1) by slot, in the type of x."""
        return self.by_slot(self.activate(self.proj(x)), x.dtype)

    def activate(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1) if self.softmax else torch.sigmoid(logits)

    def by_slot(self, gates: Tensor, dtype: torch.dtype) -> Gates:
        return dict(zip(self.slots, gates.to(dtype).split(1, dim=-1), strict=True))


class InstanceRouter(SoftRouter):
    """The soft router, once per sequence."""

    per_sequence = True


class UniPELTRouter(AdapterModule):
    """UniPELT (arXiv 2110.07577; the paper calls it UniPEFT): one gate s(W x + b) per sequence and adapter type.

    The LoRAs of a block share theirs.
    """

    per_sequence = True

    def __init__(self, slots: list[Slot], dim: int, config: AdapterConfig):
        super().__init__()
        self.type_of = {slot.name: slot.type for slot in slots}
        for adapter_type in dict.fromkeys(self.type_of.values()):
            self.add_module(adapter_type, RouterLinear(dim, 1))

    def forward(self, x: Tensor) -> Gates:
        gates = {name: torch.sigmoid(linear(x)).to(x.dtype) for name, linear in self.named_children()}
        return {slot: gates[adapter_type] for slot, adapter_type in self.type_of.items()}


class SparseRouter(SoftRouter):
    """g = s(router(x)), threshold G = G_max s(w x + b); an adapter counts with g where g >= G, elsewhere with 0.

    The comparison has no derivative, so nothing would teach the threshold. With "straight_through" the mask [g >= G]
    passes gradients to G as if it were g - G (arXiv 1308.3432). The forward value and g's gradient stay as they are.
    """

    def __init__(self, slots: list[Slot], dim: int, config: AdapterConfig):
        super().__init__(slots, dim, config)
        self.max_threshold = config.max_threshold
        self.straight_through = config.threshold_gradient == "straight_through" and not config.const_threshold
        self.threshold = None if config.const_threshold else RouterLinear(dim, 1)

    def forward(self, x: Tensor) -> Gates:
        threshold = None if self.threshold is None else self.threshold(x)
        return self.by_slot(self.sparse_gates(self.proj(x), threshold), x.dtype)

    def sparse_gates(self, logits: Tensor, threshold_logits: Tensor | None) -> Tensor:
        """Logits (N, n) and the threshold's (N, 1), None where it is constant -> gates (N, n)."""
        gates, limit = torch.sigmoid(logits), self.limit(threshold_logits)
        mask = (gates >= limit).to(gates.dtype)
        if self.straight_through:
            mask = mask - (limit - limit.detach())
        return gates * mask

    def limit(self, threshold_logits: Tensor | None) -> Tensor | float:
        """G of each token, (N, 1), or the constant."""
        return self.max_threshold * (1.0 if threshold_logits is None else torch.sigmoid(threshold_logits))
