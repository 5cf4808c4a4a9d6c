"""Check that the copies of a tensor on several processes are equal, to the bit, as they are by construction.

Replicated adapter parameters and norms are held by all processes, sharded ones by those of each replica that hold the
same shard: the same model-parallel rank in every data-parallel replica, and ranks that share a key/value head.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn

from moa.adapter import AdapterModule
from moa.parallel import Shard, mp_size
from moa.state import adapter_parameters

REPLICATED = Shard(0, 1)


def assert_replicas_equal(model: nn.Module) -> None:
    """ValueError, on all processes, naming the first tensor whose copies differ, and the processes that hold them.

    All processes must call it. It looks at all adapter parameters and at the base's replicated tensors; the base's
    sharded ones never change.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    tensors = {key: (shard, tuple(tensor.shape), _digest(tensor)) for key, shard, tensor in _replicated(model)}
    by_rank: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(by_rank, tensors)
    if others := [rank for rank, theirs in enumerate(by_rank) if theirs.keys() != by_rank[0].keys()]:
        raise ValueError(f"{_processes(others)} another model or other adapters than process 0")
    for key, (shard, *_) in by_rank[0].items():
        holders: dict[int, list[int]] = {}  # shard -> ranks
        for rank in range(len(by_rank)):
            holders.setdefault(shard.index(rank % mp_size()), []).append(rank)
        for first, *rest in holders.values():
            if others := [rank for rank in rest if by_rank[rank][key] != by_rank[first][key]]:
                raise ValueError(f"{key}: {_processes(others)} other values than process {first}; they must be equal")


def _replicated(model: nn.Module) -> Iterator[tuple[str, Shard, Tensor]]:
    """(key, how it is sharded, this process's shard) of all tensors that several processes may hold."""
    for key, (parameter, spec, _) in adapter_parameters(model, untrained=True).items():
        yield key, spec.shard or REPLICATED, parameter
    for path, module in model.named_modules():
        if not isinstance(module, (AdapterModule, ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            for name, parameter in module.named_parameters(recurse=False):
                yield f"{path}.{name}", REPLICATED, parameter


def _digest(tensor: Tensor) -> bytes:
    """A hash of a tensor's bits."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()).digest()


def _processes(ranks: list[int]) -> str:
    """ "process 1 has", "processes 1, 3 have"."""
    return f"process{'es' * (len(ranks) > 1)} {', '.join(map(str, ranks))} {'have' if len(ranks) > 1 else 'has'}"
