"""The base of adapters and routers: a module that declares each trained parameter once."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moa.parallel import (
    Shard,
    all_reduce_shared_grad,
    copy_to_model_parallel_region,
    divide,
    mp_size,
    reduce_from_model_parallel_region,
)

# Initial values: (whole shape, generator) -> whole tensor, or this rank's shard of it.
Init = Callable[[tuple[int, ...], torch.Generator], Tensor]


def constant(value: float) -> Init:
    return lambda shape, generator: torch.full(shape, value)


def zeros(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def uniform(bound: float) -> Init:
    return lambda shape, generator: torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)


def linear_init(in_features: int) -> Init:
    """The initial weights of `nn.Linear`."""
    return uniform(1 / math.sqrt(in_features))


@dataclass(frozen=True)
class ParamSpec:
    """A parameter of an adapter or a router.

    shape: whole. shard: `target.shard_outputs(dim)` or `target.shard_inputs(dim)` for one that runs along the outputs
    or inputs of the adapted layer. decay: whether weight decay applies (None: to all but 1-D ones). lr_scale: factor of
    the learning rate. trained: False for numbers that are saved with the adapter and have no gradient.
    """

    shape: tuple[int, ...]
    init: Init
    shard: Shard | None = None
    decay: bool | None = None
    lr_scale: float = 1.0
    trained: bool = True


class AdapterModule(nn.Module):
    """Base of adapters and routers. All parameters are float32 and made by `add_parameter`.

    Freezing, counting, saving, loading, initialising, optimizer groups and model parallelism all read `specs`.
    """

    per_sequence = False  # of a block's router: it runs once per sequence instead of once per token
    is_stochastic = False  # draws random numbers while training
    # A training step sets its `token_counts` to zero, sums them over the ranks after all backward passes, then calls
    # its `balance()`
    self_balancing = False

    def __init__(self):
        super().__init__()
        self.specs: dict[str, ParamSpec] = {}
        self.expert_router: nn.Module | None = None  # of an adapter with several experts

    def add_parameter(
        self, name: str, shape: tuple[int, ...], init: Init, shard: Shard | None = None, **options: Any
    ) -> None:
        """Make parameter `name` of whole shape `shape`; this rank holds its shard of it. options: see `ParamSpec`.

        Where several ranks hold the same shard, its gradient is summed over them.
        """
        spec = self.specs[name] = ParamSpec(shape, init, shard, **options)
        local = list(shape)
        if shard is not None:
            what = f"dimension {shard.dim} of {type(self).__name__}.{name}"
            local[shard.dim] = divide(shape[shard.dim], what, shard.num_shards)
        parameter = nn.Parameter(torch.empty(local, dtype=torch.float32), requires_grad=spec.trained)
        if spec.trained and shard is not None and shard.num_shards < mp_size():
            parameter.register_hook(partial(all_reduce_shared_grad, shard=shard))
        self.register_parameter(name, parameter)


@dataclass(frozen=True)
class Target:
    """A point of a block where adapters can stand: beside a linear layer, at the attention, or at the block's output.

    in_features, out_features: whole widths of its input and output.
    parallel: how model-parallel ranks shard it: "column" (by outputs), "row" (by inputs) or None (replicated).
    layers: the frozen layers there: the adapted one, or at the attention its key and value projections.
    num_shards: number of shards, where there are fewer than ranks.
    """

    in_features: int
    out_features: int
    parallel: str | None
    n_heads: int
    layers: Sequence[nn.Module] = ()
    num_shards: int | None = None

    def shard_outputs(self, dim: int) -> Shard | None:
        """Shards of a parameter whose dimension `dim` runs along the outputs."""
        return Shard(dim, self.num_shards or mp_size()) if self.parallel == "column" else None

    def shard_inputs(self, dim: int) -> Shard | None:
        """Shards of a parameter whose dimension `dim` runs along the inputs."""
        return Shard(dim, self.num_shards or mp_size()) if self.parallel == "row" else None

    def project_in(self, x: Tensor, weight: Tensor) -> Tensor:
        """x W^T, (N, in) -> (N, k), whole on every rank. weight (k, in): sharded as the layer's inputs."""
        y = F.linear(x, weight.to(x.dtype))
        return reduce_from_model_parallel_region(y) if self.parallel == "row" else y

    def project_out(self, a: Tensor, weight: Tensor) -> Tensor:
        """a W^T, (N, k) whole -> (N, out). weight (out, k): sharded as the layer's outputs."""
        if self.parallel == "column":
            a = copy_to_model_parallel_region(a)
        return F.linear(a, weight.to(a.dtype))

    def gate_output(self, gate: Tensor) -> Tensor:
        """A gate (N, 1) that multiplies this rank's outputs: where they are a shard, so is its gradient."""
        return copy_to_model_parallel_region(gate) if self.parallel == "column" else gate


def apply_gates(a: Tensor, gate: Tensor, width: int) -> Tensor:
    """Weigh the experts' parts of a (N, E width), or a (N, width) that they share, by gate (N, E) -> (N, E width)."""
    return (a.unflatten(-1, (-1, width)) * gate[:, :, None]).flatten(1)
