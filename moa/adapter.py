"""What an adapter is: a module that declares each of its trained parameters once, with all that others need to know."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moa.parallel import Cut, copy_to_ranks, mp_size, share, sum_over_holders, sum_over_ranks


class Init(Protocol):
    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor: ...


def zeros(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def uniform(bound: float) -> Init:
    return partial(_uniform, bound)


def _uniform(bound: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)


def like_linear(in_features: int) -> Init:
    """The start of `nn.Linear`'s weight."""
    return uniform(1 / math.sqrt(in_features))


@dataclass(frozen=True)
class Declared:
    """A trained parameter: its whole shape, its start, how it is cut over model-parallel ranks, weight decay."""

    shape: tuple[int, ...]
    init: Init
    cut: Cut | None
    decay: bool


class AdapterModule(nn.Module):
    """Base of adapters and routers. All parameters are float32 and made by `declare`: freezing, counting, saving,
    loading, initialising, optimizer groups and model parallelism all read `declared`."""

    per_row = False  # of a block's router: it is asked once per row instead of once per token

    def __init__(self):
        super().__init__()
        self.declared: dict[str, Declared] = {}
        self.expert_router: nn.Module | None = None  # of an adapter that has several experts

    def declare(
        self, name: str, shape: tuple[int, ...], init: Init, cut: Cut | None = None, decay: bool | None = None
    ) -> None:
        """Make parameter `name` of whole shape `shape`, of which this rank holds its part.

        cut: `site.outputs(dim)` or `site.inputs(dim)` for a parameter that belongs to the site's outputs or inputs
        along one of its dimensions; the gradient of a part that several ranks hold is then summed over them.
        decay: whether weight decay applies (default: to all but 1-D parameters).
        """
        local = list(shape)
        if cut is not None:
            what = f"dimension {cut.dim} of {type(self).__name__}.{name}"
            local[cut.dim] = share(shape[cut.dim], what, cut.parts)
        parameter = nn.Parameter(torch.empty(local, dtype=torch.float32))
        if cut is not None and cut.parts < mp_size():
            parameter.register_hook(partial(sum_over_holders, cut=cut))
        self.register_parameter(name, parameter)
        self.declared[name] = Declared(shape, init, cut, len(shape) > 1 if decay is None else decay)


@dataclass(frozen=True)
class Site:
    """A place where an adapter stands: whole widths of what goes in and comes out there, and how the layer beside it
    is cut: "out" (column-parallel), "in" (row-parallel) or None (replicated). parts: into how many parts, where they
    are fewer than ranks."""

    in_features: int
    out_features: int
    cut: str | None
    n_heads: int
    parts: int | None = None

    def outputs(self, dim: int) -> Cut | None:
        """How a parameter is cut whose dimension `dim` runs along the outputs."""
        return Cut(dim, self.parts or mp_size()) if self.cut == "out" else None

    def inputs(self, dim: int) -> Cut | None:
        """How a parameter is cut whose dimension `dim` runs along the inputs."""
        return Cut(dim, self.parts or mp_size()) if self.cut == "in" else None


def project_in(site: Site, u: Tensor, weight: Tensor) -> Tensor:
    """(N, in) -> (N, k), whole on every rank, by a (k, in) weight that is cut as the site's inputs are."""
    y = F.linear(u, weight.to(u.dtype))
    return sum_over_ranks(y) if site.cut == "in" else y


def project_out(site: Site, a: Tensor, weight: Tensor) -> Tensor:
    """(N, k) -> (N, out), cut as the site's outputs are, by an (out, k) weight that is cut so too."""
    if site.cut == "out":
        a = copy_to_ranks(a)
    return F.linear(a, weight.to(a.dtype))
