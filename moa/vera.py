"""VeRA: random matrices that all layers share, and two trained vectors for each layer (arXiv 2310.11454).

W x + l_b * B (l_d * A x)        A (r, in), B (out, r) random and frozen

A and B follow from `vera_seed` and their shapes. They are drawn when they are first needed, and are not saved.
"""

import math
from functools import cache, partial

import torch
from torch import Tensor

from moa.adapter import AdapterModule, Target, zeros
from moa.config import AdapterConfig
from moa.parallel import Shard, shard_of


def constant(value: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.full(shape, value)


@torch.compiler.assume_constant_result
def shared_matrix(
    seed: int, rows: int, columns: int, fan_in: int, shard: Shard | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Kaiming-uniform (rows, columns), or this rank's shard of it; the same tensor for all layers that ask for it.

    A smaller matrix is the first rows of a larger one.
    """
    return _shared_matrix(seed, rows, columns, fan_in, shard, device, dtype)


@cache
@torch.inference_mode(False)
def _shared_matrix(
    seed: int, rows: int, columns: int, fan_in: int, shard: Shard | None, device: torch.device, dtype: torch.dtype
) -> Tensor:
    if device.type == "meta":
        matrix = torch.empty(rows, columns, device=device)
    else:
        numbers = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
        matrix = (2 * numbers - 1) * math.sqrt(6 / fan_in)
    return (matrix if shard is None else shard_of(matrix, shard)).to(device, dtype)


class VeRA(AdapterModule):
    """lambda_d (r,), replicated; lambda_b (out,), sharded as the outputs."""

    def __init__(self, target: Target, config: AdapterConfig):
        super().__init__()
        options = config.adapters["vera"]
        self.target, self.rank, self.seed = target, options.rank, options.seed
        self.add_parameter("lambda_d", (options.rank,), partial(constant, 0.1))
        self.add_parameter("lambda_b", (target.out_features,), zeros, target.shard_outputs(0))

    def shared(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (r, in) and B (out, r), sharded as the layer."""
        n_in, n_out, rank = self.target.in_features, self.target.out_features, self.rank
        inputs, outputs = self.target.shard_inputs(0), self.target.shard_outputs(0)
        a = shared_matrix(2 * self.seed, n_in, rank, n_in, inputs, device, dtype).T
        return a, shared_matrix(2 * self.seed + 1, n_out, rank, rank, outputs, device, dtype)

    def forward(self, x: Tensor, output: Tensor, gate: Tensor | None) -> Tensor:
        """x (N, in), the layer's output (N, out), gate (N, 1) -> output with the update, (N, out)."""
        matrix_a, matrix_b = self.shared(x.device, x.dtype)
        a = self.lambda_d.to(x.dtype) * self.target.project_in(x, matrix_a)
        if gate is not None:
            a = a * gate
        return output + self.lambda_b.to(x.dtype) * self.target.project_out(a, matrix_b)
