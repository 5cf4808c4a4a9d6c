"""VeRA: random matrices that all layers share, and two trained vectors for each layer (arXiv 2310.11454).

W x + l_b * B (l_d * A x)        A (r, in), B (out, r) random and frozen

A and B follow from `vera_seed` and their shapes; they are not saved.
"""

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from moa.adapter import AdapterModule, Target, constant, zeros
from moa.config import AdapterConfig
from moa.parallel import mp_rank


@cache
def shared_matrix(
    seed: int, rows: int, columns: int, fan_in: int, num_shards: int, index: int, device: torch.device
) -> Tensor:
    """Shard `index` of the rows of a Kaiming-uniform matrix (rows, columns): one tensor for all layers that ask for it.

    A smaller matrix is the first rows of a larger one.
    """
    if device.type == "meta":
        matrix = torch.empty(rows, columns, device=device)
    else:
        with torch.device("cpu"):
            numbers = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
        matrix = (2 * numbers - 1) * math.sqrt(6 / fan_in)
    return matrix.chunk(num_shards)[index].to(device)


class VeRA(AdapterModule):
    """lambda_d (r,), replicated; lambda_b (out,), sharded as the outputs."""

    def __init__(self, target: Target, config: AdapterConfig):
        super().__init__()
        options = config.adapters["vera"]
        self.target, self.rank, self.seed = target, options.rank, options.seed
        self.add_parameter("lambda_d", (options.rank,), constant(0.1))
        self.add_parameter("lambda_b", (target.out_features,), zeros, target.shard_outputs(0))
        self.share_matrices()

    def share_matrices(self) -> None:
        """Hold the matrices A^T (in, r) and B (out, r) that all layers on this device share, sharded as the layer."""
        n_in, n_out, device = self.target.in_features, self.target.out_features, self.lambda_d.device
        inputs, outputs = (
            (shard.num_shards, shard.index(mp_rank())) if shard else (1, 0)
            for shard in (self.target.shard_inputs(0), self.target.shard_outputs(0))
        )
        a = shared_matrix(2 * self.seed, n_in, self.rank, n_in, *inputs, device)
        b = shared_matrix(2 * self.seed + 1, n_out, self.rank, self.rank, *outputs, device)
        self.register_buffer("matrix_a", a, persistent=False)
        self.register_buffer("matrix_b", b, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "VeRA":
        """Move to another device or type, as all of `Module.to` does; the matrices stay shared there."""
        super()._apply(fn, recurse)
        self.share_matrices()
        return self

    def forward(self, x: Tensor, output: Tensor, gate: Tensor | None) -> Tensor:
        """x (N, in), the layer's output (N, out), gate (N, 1) -> output with the update, (N, out)."""
        a = self.lambda_d.to(x.dtype) * self.target.project_in(x, self.matrix_a.T)
        if gate is not None:
            a = a * gate
        return output + self.lambda_b.to(x.dtype) * self.target.project_out(a, self.matrix_b)
