"""What `train_bias_norm` trains of the base itself: biases of linear layers and weights of norms (as BitFit does)."""

from collections.abc import Callable

import torch
from torch import Tensor

from moa.adapter import AdapterModule, Target, zeros

BIASED_TARGETS = ("Q", "O", "FFN_UP", "FFN_GATE", "FFN_DOWN")


class TrainableBias(AdapterModule):
    """W x + b. The block's router never gates it."""

    def __init__(self, target: Target):
        super().__init__()
        self.add_parameter("bias", (target.out_features,), zeros, target.shard_outputs(0))

    def forward(self, x: Tensor, output: Tensor, gate: None) -> Tensor:
        return output + self.bias.to(output.dtype)


class TrainableNormWeight(AdapterModule):
    """A norm's weight (D,) in place of the base's, from which it starts. base_weight: returns the base's."""

    def __init__(self, dim: int, base_weight: Callable[[], Tensor]):
        super().__init__()

        def from_base(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
            return base_weight().detach().float().cpu()

        self.add_parameter("weight", (dim,), from_base)
