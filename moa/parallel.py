"""Model parallelism seen from an adapter: sizes, ranks, shards of tensors, and collectives with gradients.

Adapters are sharded as the base layer beside them. `copy_to_model_parallel_region` (forward: identity; backward:
all-reduce) stands before a product with a shard of the outputs, `reduce_from_model_parallel_region` (forward:
all-reduce; backward: identity) after a product with a shard of the inputs. With one rank both do nothing.

With more ranks than key/value heads, neighbouring ranks hold the same head (`Shard`). Their query heads differ, so each
rank's gradient of that shard is a part of it; `all_reduce_shared_grad` sums the parts.
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


class Shard(NamedTuple):
    """A tensor split along `dim` into `num_shards` equal shards, each held by equally many neighbouring ranks."""

    dim: int
    num_shards: int

    def index(self, rank: int) -> int:
        """The shard that a rank of the model-parallel group holds."""
        return rank * self.num_shards // mp_size()


def divide(total: int, what: str, num_shards: int | None = None) -> int:
    """total / num_shards (default: one shard per rank). ValueError with both numbers where it does not divide."""
    num_shards = num_shards or mp_size()
    if total % num_shards:
        raise ValueError(
            f"{what} ({total}) cannot be cut into {num_shards} equal parts: choose another model_parallel_size"
        )
    return total // num_shards


def num_kv_shards(n_kv_heads: int) -> int:
    """Shards of the key/value heads: one per rank, or one per head where several ranks hold each.

    ValueError with both numbers where neither divides the other.
    """
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
    """Sum over the model-parallel ranks, without a gradient."""
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


def all_reduce_shared_grad(grad: Tensor, shard: Shard) -> Tensor:
    """Sum a shard's gradient over the ranks that hold it. Every rank of the group must call it.

    All shards travel, zeros where they are not this rank's: they are small, and no further process groups are needed.
    """
    shards = grad.new_zeros(shard.num_shards, *grad.shape)
    shards[shard.index(mp_rank())] = grad
    dist.all_reduce(shards, group=mp.get_model_parallel_group())
    return shards[shard.index(mp_rank())].clone()


def gather(x: Tensor, shard: Shard) -> Tensor:
    """The whole tensor from its shards, without a gradient. Every rank of the group must call it."""
    pieces = [torch.empty_like(x) for _ in range(mp_size())]
    dist.all_gather(pieces, x.contiguous(), group=mp.get_model_parallel_group())
    return torch.cat(pieces[:: mp_size() // shard.num_shards], shard.dim)


def shard_of(x: Tensor, shard: Shard) -> Tensor:
    """This rank's shard of a whole tensor."""
    return x.chunk(shard.num_shards, shard.dim)[shard.index(mp_rank())]
