"""DoRA (arXiv 2402.09353) as an adapter of one's own: one file with its options and its module, one registration.

m / |W + s B A| (W x + s B A x)        |.| is the norm of each row, taken as a constant in the backward pass
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from moa.adapter import AdapterModule, Target, linear_init, zeros
from moa.config import AdapterConfig
from moa.methods import ADAPTERS, LINEAR_TARGETS, AdapterType, LinearAdapterOptions, option
from moa.parallel import reduce_from_model_parallel_region


@dataclass(frozen=True)
class DoRAConfig(LinearAdapterOptions):
    """Low-rank updates with a trained magnitude of each output."""

    rank: int = option(4, "rank of each DoRA")
    scale: float = option(0.5, "factor of the update")


class DoRA(AdapterModule):
    def __init__(self, target: Target, config: AdapterConfig):
        super().__init__()
        options, self.target = config.adapters["my_dora"], target
        self.scale = options.scale
        inputs, outputs = target.shard_inputs(1), target.shard_outputs(0)
        self.add_parameter("lora_A", (options.rank, target.in_features), linear_init(target.in_features), inputs)
        self.add_parameter("lora_B", (target.out_features, options.rank), zeros, outputs)
        self.add_parameter("magnitude", (target.out_features,), self._row_norms, outputs)

    def _row_norms(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return self._norm(self.target.layers[0].weight).cpu()

    def _norm(self, weight: Tensor) -> Tensor:
        squares = weight.float().square().sum(1)
        return (reduce_from_model_parallel_region(squares) if self.target.parallel == "row" else squares).sqrt()

    def forward(self, x: Tensor, output: Tensor, gate: Tensor | None) -> Tensor:
        weight, update = self.target.layers[0].weight, self.scale * self.lora_B @ self.lora_A
        scale = (self.magnitude / self._norm((weight + update).detach())).to(output.dtype)
        low_rank = self.target.project_out(self.target.project_in(x, self.lora_A), self.lora_B)
        adapted = scale * (output + self.scale * low_rank)
        return adapted if gate is None else output + self.target.gate_output(gate) * (adapted - output)


@contextmanager
def registered() -> Iterator[None]:
    """The one registration; other tests know nothing of it."""
    with mock.patch.dict(ADAPTERS, my_dora=AdapterType(DoRAConfig, "dora:DoRA", LINEAR_TARGETS)):
        yield
