"""IA3: a trained factor for each output of a layer (arXiv 2205.05638).

l * (W x)        with a gate g: (1 + g (l - 1)) * (W x)

The paper scales keys, values and the input of the feed-forward block's second layer. That input is
silu(W1 x) * (W3 x), so a factor at the output of W3 (FFN_UP) is the same.
"""

from torch import Tensor

from moa.adapter import AdapterModule, Target, constant
from moa.config import AdapterConfig


class IA3(AdapterModule):
    """factor (out,), sharded as the outputs. It scales what stands at the layer, other adapters' updates included."""

    def __init__(self, target: Target, config: AdapterConfig):
        super().__init__()
        self.target = target
        self.add_parameter("factor", (target.out_features,), constant(1.0), target.shard_outputs(0))

    def forward(self, x: Tensor, output: Tensor, gate: Tensor | None) -> Tensor:
        """output (N, out), gate (N, 1) -> (N, out)."""
        factor = self.factor.to(output.dtype)
        if gate is not None:
            factor = 1 + self.target.gate_output(gate) * (factor - 1)
        return factor * output
