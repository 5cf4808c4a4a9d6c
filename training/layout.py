"""One process of a layout without the others: for computing what each holds and sends, in a single plain process.

The model is built as the rank builds it, so what cannot be cut is refused in the same words as in a run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist

from llama.distributed import destroy_distributed, init_distributed, init_single_process

BACKEND = "notebook"


class Message(NamedTuple):
    """An exchange as one of its `ranks` takes part in it. kind: all_reduce or all_gather; bytes: of its tensor."""

    kind: str
    ranks: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that the rank sends, as many as it receives, where the ranks stand in a ring."""
        part = (self.ranks - 1) / self.ranks
        return 2 * part * self.bytes if self.kind == "all_reduce" else (self.ranks - 1) * self.bytes


class _Done(dist.Work):
    """An exchange of tensors without contents is over at once."""

    def wait(self, timeout: Any = None) -> bool:
        return True


class _Notebook(dist.ProcessGroup):
    """A process group whose other members are not there: notes what is to be sent, and changes no tensor."""

    notes: ClassVar[list[Message]] = []

    def allreduce(self, tensors: list[torch.Tensor], options: Any = None) -> dist.Work:
        return self._note("all_reduce", tensors)

    def allgather(self, outputs: Any, tensors: list[torch.Tensor], options: Any = None) -> dist.Work:
        return self._note("all_gather", tensors)

    def getBackendName(self) -> str:
        return BACKEND

    def _note(self, kind: str, tensors: list[torch.Tensor]) -> dist.Work:
        self.notes.extend(Message(kind, self.size(), t.numel() * t.element_size()) for t in tensors)
        return _Done()


@contextmanager
def first_rank(processes: int, model_parallel_size: int) -> Iterator[list[Message]]:
    """Be the first of so many processes, of which `model_parallel_size` share each copy of the model. Yields the list
    in which all that it would send is noted. Tensors must be on the meta device.

    ValueError where the sizes do not divide.
    """
    alone = dist.is_initialized()
    assert not alone or dist.get_world_size() == 1, "a real group of processes stands already"
    destroy_distributed()
    _Notebook.notes.clear()
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, lambda _, rank, size, __: _Notebook(rank, size), devices=["cpu", "cuda"])
    try:
        dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=processes)
        init_distributed(torch.device("cpu"), model_parallel_size)
        yield _Notebook.notes
    finally:
        destroy_distributed()
        if alone:
            init_single_process()
            init_distributed(torch.device("cpu"))
