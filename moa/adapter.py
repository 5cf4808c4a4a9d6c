"""What an adapter is: a module that declares each of its trained parameters once, with all that others need to know."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moa.parallel import (
    Cut,
    all_reduce_shared_grad,
    copy_to_model_parallel_region,
    mp_size,
    reduce_from_model_parallel_region,
    share,
)

T = TypeVar("T")
FEW = 64  # tokens


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
class ParamSpec:
    """A trained parameter: its whole shape, its start, how it is cut over model-parallel ranks, weight decay."""

    shape: tuple[int, ...]
    init: Init
    cut: Cut | None
    decay: bool


class Deriving(nn.Module):
    """A module that works things out from its weights alone, for every forward pass anew while they train; while they
    stand still (`weights_stand_still`) once. may_copy: meanwhile there is memory for copies of the frozen weights."""

    _derived: dict[Hashable, Any] | None = None
    may_copy = False

    @property
    def stands_still(self) -> bool:
        return self._derived is not None

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        if self._derived is None:
            return make()
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]


Derived = dict[Deriving, dict[Hashable, Any]]


@contextmanager
def weights_stand_still(model: nn.Module, may_copy: bool, known: Derived | None = None) -> Iterator[None]:
    """Meanwhile no weight changes, and nothing is differentiated: a run of generation. known: what was derived from the
    same weights before, as free to copy; what is derived now is put there too."""
    known = {} if known is None else known
    modules = [module for module in model.modules() if isinstance(module, Deriving)]
    for module in modules:
        module._derived, module.may_copy = known.setdefault(module, {}), may_copy
    try:
        yield
    finally:
        for module in modules:
            module._derived, module.may_copy = None, False


class AdapterModule(Deriving):
    """Base of adapters and routers. All parameters are float32 and made by `add_parameter`: freezing, counting, saving,
    loading, initialising, optimizer groups and model parallelism all read `declared`."""

    per_row = False  # of a block's router: it is asked once per row instead of once per token
    draws = False  # random numbers, while it trains

    def __init__(self):
        super().__init__()
        self.declared: dict[str, ParamSpec] = {}
        self.expert_router: nn.Module | None = None  # of an adapter that has several experts

    def add_parameter(
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
            parameter.register_hook(partial(all_reduce_shared_grad, cut=cut))
        self.register_parameter(name, parameter)
        self.declared[name] = ParamSpec(shape, init, cut, len(shape) > 1 if decay is None else decay)

    def reads(self) -> list[Tensor]:
        """Weights (k, in) whose products with its input u are all that an adapter, or a router of experts, wants of it.
        `forward` then gets these products, (N, k) each, in the place of u: those of all adapters that share an input
        are one product (`moa.block`). Default: none, and `forward` gets u."""
        return []

    def cast(self, name: str, dtype: torch.dtype) -> Tensor:
        """A parameter in the type of the activations."""
        return self.derived((name, dtype), lambda: self.get_parameter(name).to(dtype))

    def turned(self, name: str, dtype: torch.dtype) -> Tensor:
        """The same of a matrix, transposed and laid out so: its gradient is then the product that is quicker."""
        return self.derived(("turned", name, dtype), lambda: laid_out(self.get_parameter(name).T, dtype))


@dataclass(frozen=True)
class Target:
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


def project_in(site: Target, u: Tensor, weight: Tensor) -> Tensor:
    """(N, in) -> (N, k), whole on every rank, by a (k, in) weight that is cut as the site's inputs are."""
    y = F.linear(u, weight)
    return reduce_from_model_parallel_region(y) if site.cut == "in" else y


def reads_of(modules: Sequence["AdapterModule"]) -> list[Tensor]:
    """The weights (k, in) of all that they read."""
    return [weight for module in modules for weight in module.reads()]


def stacked(weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Weights (k, in), one above the other, in the type of what they are multiplied by."""
    return (weights[0] if len(weights) == 1 else torch.cat(weights)).to(dtype)


def shared_out(product: Tensor, modules: Sequence["AdapterModule"]) -> dict["AdapterModule", tuple[Tensor, ...]]:
    """A product (N, sum of k) with what all `modules` read, one after the other -> the products of each."""
    counts = [(module, [len(weight) for weight in module.reads()]) for module in modules]
    whole = [width for _, widths in counts for width in widths]
    parts = iter(product.split(whole, -1) if len(whole) > 1 else [product])
    return {module: tuple(next(parts) for _ in widths) for module, widths in counts}


def add_product(output: Tensor, site: Target, a: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """output (N, out) += scale * a W, in its place: a (N, k) is whole on every rank, W (k, out) and the output are cut
    as the site's outputs are. The output must be one that autograd does not keep, as a linear layer's."""
    if site.cut == "out":
        a = copy_to_model_parallel_region(a)
    a = a.to(weight.dtype)
    if weight.dtype != output.dtype:  # `narrow_type`
        return output.add_(a @ weight, alpha=scale)
    return output.addmm_(a, weight, alpha=scale)


def laid_out(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix in another type, its rows one after the other."""
    return weight.to(dtype, memory_format=torch.contiguous_format, copy=True)


def narrow_type(module: Deriving, a: Tensor) -> torch.dtype:
    """In which type a narrow product a W^T of a (N, k) is quickest: its own, but for the few rows of a decode step on a
    CPU, where bf16 kernels take longer to start than float32's to finish."""
    return torch.float32 if a.device.type == "cpu" and few(module, a) else a.dtype


def few(module: Deriving, a: Tensor) -> bool:
    """Whether a (N, ...) are the few tokens of a decode step."""
    return module.stands_still and len(a) <= FEW


def weigh(a: Tensor, gate: Tensor, width: int) -> Tensor:
    """a (N, E width), or (N, width) of all experts, times the gates (N, E) of the experts -> (N, E width)."""
    if gate.shape[1] == 1:
        return a * gate
    return (a.unflatten(-1, (-1, width)) * gate[:, :, None]).flatten(1)


def wide_on_cpu(t: Tensor) -> Tensor:
    """In float32, on a CPU, what has two bytes a number."""
    return t.float() if t.device.type == "cpu" and t.dtype.itemsize < 4 else t
