"""DoRA: a low-rank update of a matrix's directions, and a trained length of each row (arXiv 2402.09353).

m (W x + s B A x) / |W + s B A|        s = alpha / r; |.| is the norm of each row, a constant in the backward pass

B A is never formed:   |W + s B A|^2 = |W|^2 + 2 s sum(W A^T * B) + s^2 sum(B A A^T * B), sums along each row.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moa.adapter import AdapterModule, Target, linear_init, zeros
from moa.config import AdapterConfig
from moa.parallel import reduce_from_model_parallel_region


class DoRA(AdapterModule):
    """lora_A (r, in), lora_B (out, r); magnitude (out,) starts as the norms of the rows of W."""

    def __init__(self, target: Target, config: AdapterConfig):
        super().__init__()
        options = config.adapters["dora"]
        self.target, self.scale = target, options.alpha / options.rank
        a_shape, shard = (options.rank, target.in_features), target.shard_outputs(0)
        self.add_parameter("lora_A", a_shape, linear_init(target.in_features), target.shard_inputs(1))
        self.add_parameter("lora_B", (target.out_features, options.rank), zeros, shard)
        self.add_parameter("magnitude", (target.out_features,), self._initial_magnitude, shard)

    def _initial_magnitude(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return self._sum_over_inputs(self.target.layers[0].weight.float().square().sum(1)).sqrt().cpu()

    def _sum_over_inputs(self, part: Tensor) -> Tensor:
        """Sum over the shards of the inputs."""
        return reduce_from_model_parallel_region(part) if self.target.parallel == "row" else part

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """|W + s B A|, (out,) float32 or wider."""
        a, b, weight = self.lora_A, self.lora_B, self.target.layers[0].weight.to(self.lora_A.dtype)
        squares = self._sum_over_inputs(weight.square().sum(1))
        product = self._sum_over_inputs(F.linear(weight, a))  # W A^T, (out, r)
        gram = self._sum_over_inputs(F.linear(a, a))  # A A^T, (r, r)
        return (squares + ((2 * self.scale * product + self.scale**2 * b @ gram) * b).sum(1)).sqrt()

    def forward(self, x: Tensor, output: Tensor, gate: Tensor | None) -> Tensor:
        """x (N, in), the layer's output W x (N, out), gate (N, 1) -> (N, out)."""
        update = self.target.project_out(self.target.project_in(x, self.lora_A), self.lora_B)
        adapted = (self.magnitude / self.row_norms()).to(x.dtype) * (output + self.scale * update)
        return adapted if gate is None else output + self.target.gate_output(gate) * (adapted - output)
