"""What several processes hold of the same tensor must stay the same, to the bit. By construction it does; this checks.

Replicated adapter parameters and norms are held by all processes, cut ones by those of each replica that hold the same
part: the same model-parallel rank in every data-parallel replica, and ranks that share a key/value head.
"""

import hashlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn

from moa.adapter import AdapterModule
from moa.parallel import Cut, mp_size
from moa.state import adapter_parameters

WHOLE = Cut(0, 1)


def assert_replicas_equal(model: nn.Module) -> None:
    """ValueError, on all processes, naming the first tensor that differs between processes that hold the same part of
    it, and these processes. All processes must call it; two small exchanges. Does nothing where there is one process.

    Looks at all adapter parameters and at the base's replicated tensors; the base's cut ones never change.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    keys, tensors, cuts = zip(*_replicated(model), strict=True)
    layout = hashlib.sha256(repr((keys, cuts, [(t.shape, t.dtype) for t in tensors])).encode()).digest()
    layouts = _from_all(torch.tensor([int.from_bytes(layout[:8], "little", signed=True)], device=tensors[0].device))
    if others := [rank for rank, theirs in enumerate(layouts) if theirs != layouts[0]]:
        raise ValueError(f"{_processes(others)} another model or other adapters than process 0")
    digests = _from_all(torch.stack([_digest(tensor) for tensor in tensors]))
    for i, (key, cut) in enumerate(zip(keys, cuts, strict=True)):
        holders: dict[int, list[int]] = {}  # of each part
        for rank in range(len(digests)):
            holders.setdefault(cut.part(rank % mp_size()), []).append(rank)
        for first, *rest in holders.values():
            if others := [rank for rank in rest if digests[rank][i] != digests[first][i]]:
                raise ValueError(f"{key}: {_processes(others)} other values than process {first}; they must be equal")


def _replicated(model: nn.Module) -> Iterator[tuple[str, Tensor, Cut]]:
    """(key, this process's part, how it is cut) of all tensors that several processes may hold."""
    for key, (parameter, declared, _) in adapter_parameters(model).items():
        yield key, parameter.detach(), declared.cut or WHOLE
    for path, module in model.named_modules():
        if not isinstance(module, (AdapterModule, ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            for name, parameter in module.named_parameters(recurse=False):
                yield f"{path}.{name}", parameter.detach(), WHOLE


def _digest(tensor: Tensor) -> Tensor:
    """An int64 of a tensor's bits and their places, other for any one bit changed (weights are odd, sums wrap)."""
    bits = tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]).flatten()
    return (bits.long() * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()


def _from_all(mine: Tensor) -> list[list[int]]:
    """An int64 vector of every process, in their order."""
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return [vector.tolist() for vector in found]


def _processes(ranks: list[int]) -> str:
    """ "process 1 has", "processes 1, 3 have"."""
    return f"process{'es' * (len(ranks) > 1)} {', '.join(map(str, ranks))} {'have' if len(ranks) > 1 else 'has'}"
