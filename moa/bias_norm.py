"""What of the base itself trains under `train_bias_norm`: a bias beside linear layers, and the weights of the norms."""

from collections.abc import Callable

import torch
from torch import Tensor

from moa.adapter import AdapterModule, Target, zeros

BIASED_TARGETS = ("Q", "O", "FFN_UP", "FFN_GATE", "FFN_DOWN")


class TrainableBias(AdapterModule):
    """W u + b. Never gated: the block's router has no output for it."""

    def __init__(self, site: Target):
        super().__init__()
        self.add_parameter("bias", (site.out_features,), zeros, site.outputs(0))

    def forward(self, output: Tensor, u: Tensor, gate: None) -> Tensor:
        return output + self.cast("bias", output.dtype)


class TrainableNormWeight(AdapterModule):
    """A norm's weight in the place of the base's, from which it starts. weight_of_base: gives it, (D,)."""

    def __init__(self, dim: int, weight_of_base: Callable[[], Tensor]):
        super().__init__()

        def from_base(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
            return weight_of_base().detach().float().cpu()

        self.add_parameter("weight", (dim,), from_base)
