"""The model-parallel group, seen from an adapter: its size, this process's rank, its parts of tensors, and exchanges.

Adapters are cut as the base layer beside them is. What a rank computes alone goes through one of two functions, each
the other's gradient: `copy_to_model_parallel_region` (forward: nothing; backward: sum over ranks) before a product with a shard of the
outputs, `reduce_from_model_parallel_region` (forward: sum; backward: nothing) after a product with a shard of the inputs. With one rank
both do nothing.

Where there are more ranks than key/value heads, each head is held by several neighbouring ranks (`Cut`). Their query
heads differ, so each rank's gradient of the shared part is only a share of it: `all_reduce_shared_grad` completes it.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp
from torch import Tensor


def mp_size() -> int:
    return mp.get_model_parallel_world_size() if mp.model_parallel_is_initialized() else 1


def mp_rank() -> int:
    return mp.get_model_parallel_rank() if mp.model_parallel_is_initialized() else 0


class Cut(NamedTuple):
    """Of a tensor: cut along `dim` into `parts` equal parts, each held by as many neighbouring ranks as it takes."""

    dim: int
    parts: int

    def part(self, rank: int) -> int:
        """Which part a rank of the group holds."""
        return rank * self.parts // mp_size()


def share(total: int, what: str, parts: int | None = None) -> int:
    """One of `parts` equal parts of `total` (default: one per rank); ValueError with both numbers where it does not
    divide."""
    parts = parts or mp_size()
    if total % parts:
        raise ValueError(f"{what} ({total}) cannot be cut into {parts} equal parts: choose another model_parallel_size")
    return total // parts


def num_kv_shards(n_kv_heads: int) -> int:
    """Into how many parts key/value heads are cut: one per rank, or one per head where several ranks share each.
    ValueError with both numbers where neither divides the other."""
    size = mp_size()
    if n_kv_heads % size and size % n_kv_heads:
        raise ValueError(
            f"n_kv_heads ({n_kv_heads}) cannot be cut into {size} equal parts, nor each be held by equally many of "
            f"{size} ranks: choose another model_parallel_size"
        )
    return min(n_kv_heads, size)


# fairscale's own mappings reduce in place, which corrupts a gradient that autograd has shared with another branch;
# these reduce a copy.
def all_reduce(x: Tensor) -> Tensor:
    """The sum over the ranks. No gradient."""
    x = x.contiguous().clone()
    dist.all_reduce(x, group=mp.get_model_parallel_group())
    return x


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return all_reduce(grad)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return all_reduce(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad


def copy_to_model_parallel_region(x: Tensor) -> Tensor:
    return _Copy.apply(x) if mp_size() > 1 else x


def reduce_from_model_parallel_region(x: Tensor) -> Tensor:
    return _Sum.apply(x) if mp_size() > 1 else x


def all_reduce_shared_grad(x: Tensor, cut: Cut) -> Tensor:
    """The sum of a part's gradients over the ranks that hold it; every rank of the group must call it.

    All parts travel, zeros where they are not this rank's: a part is small, and no groups of holders are needed.
    """
    parts = x.new_zeros(cut.parts, *x.shape)
    parts[cut.part(mp_rank())] = x
    dist.all_reduce(parts, group=mp.get_model_parallel_group())
    return parts[cut.part(mp_rank())].clone()


def gather(x: Tensor, cut: Cut) -> Tensor:
    """The whole tensor from its parts; every rank of the group must call it. No gradient."""
    held = [torch.empty_like(x) for _ in range(mp_size())]
    dist.all_gather(held, x.contiguous(), group=mp.get_model_parallel_group())
    return torch.cat(held[:: mp_size() // cut.parts], cut.dim)


def shard(x: Tensor, cut: Cut) -> Tensor:
    """This rank's part of a whole tensor."""
    return x.chunk(cut.parts, cut.dim)[cut.part(mp_rank())]
