"""What an adapter is: a module that declares each of its trained parameters once, with all that others need to know."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moa.parallel import copy_to_ranks, share, sum_over_ranks


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
    """A trained parameter: its whole shape, its start, the dimension cut over model-parallel ranks, weight decay."""

    shape: tuple[int, ...]
    init: Init
    cut: int | None
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
        self, name: str, shape: tuple[int, ...], init: Init, cut: int | None = None, decay: bool | None = None
    ) -> None:
        """Make parameter `name` of whole shape `shape`; this rank holds its part along dimension `cut`.

        decay: whether weight decay applies (default: to all but 1-D parameters).
        """
        local = list(shape)
        if cut is not None:
            local[cut] = share(shape[cut], f"dimension {cut} of {type(self).__name__}.{name}")
        self.register_parameter(name, nn.Parameter(torch.empty(local, dtype=torch.float32)))
        self.declared[name] = Declared(shape, init, cut, len(shape) > 1 if decay is None else decay)


@dataclass(frozen=True)
class Site:
    """A place where an adapter stands: whole widths of what goes in and comes out there, and how the layer beside it
    is cut: "out" (column-parallel), "in" (row-parallel) or None (replicated)."""

    in_features: int
    out_features: int
    cut: str | None
    n_heads: int


def project_in(site: Site, u: Tensor, weight: Tensor) -> Tensor:
    """(N, in) -> (N, k), whole on every rank, by a (k, in) weight that is cut as the site's inputs are."""
    y = F.linear(u, weight.to(u.dtype))
    return sum_over_ranks(y) if site.cut == "in" else y


def project_out(site: Site, a: Tensor, weight: Tensor) -> Tensor:
    """(N, k) -> (N, out), cut as the site's outputs are, by an (out, k) weight that is cut so too."""
    if site.cut == "out":
        a = copy_to_ranks(a)
    return F.linear(a, weight.to(a.dtype))
