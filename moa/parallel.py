"""The model-parallel group, seen from an adapter: its size, this process's rank, and the two exchanges.

Adapters are cut as the base layer beside them is. What a rank computes alone goes through one of two functions, each
the other's gradient: `copy_to_ranks` (forward: nothing; backward: sum over ranks) before a product with a shard of the
outputs, `sum_over_ranks` (forward: sum; backward: nothing) after a product with a shard of the inputs. With one rank
both do nothing.
"""

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp
from torch import Tensor


def mp_size() -> int:
    return mp.get_model_parallel_world_size() if mp.model_parallel_is_initialized() else 1


def mp_rank() -> int:
    return mp.get_model_parallel_rank() if mp.model_parallel_is_initialized() else 0


def share(total: int, what: str) -> int:
    """This rank's part of `total`; ValueError with both numbers where it does not divide."""
    if total % mp_size():
        raise ValueError(
            f"{what} ({total}) cannot be cut into {mp_size()} equal parts: choose another model_parallel_size"
        )
    return total // mp_size()


# fairscale's own mappings reduce in place, which corrupts a gradient that autograd has shared with another branch;
# these reduce a copy.
def _all_reduce(x: Tensor) -> Tensor:
    x = x.contiguous().clone()
    dist.all_reduce(x, group=mp.get_model_parallel_group())
    return x


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _all_reduce(grad)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _all_reduce(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def copy_to_ranks(x: Tensor) -> Tensor:
    return _Copy.apply(x) if mp_size() > 1 else x


def sum_over_ranks(x: Tensor) -> Tensor:
    return _Sum.apply(x) if mp_size() > 1 else x


def gather(x: Tensor, dim: int) -> Tensor:
    """The whole tensor from its shards along `dim`; every rank of the group must call it. No gradient."""
    parts = [torch.empty_like(x) for _ in range(mp_size())]
    dist.all_gather(parts, x.contiguous(), group=mp.get_model_parallel_group())
    return torch.cat(parts, dim)


def shard(x: Tensor, dim: int) -> Tensor:
    """This rank's part of a whole tensor along `dim`."""
    return x.chunk(mp_size(), dim)[mp_rank()]
