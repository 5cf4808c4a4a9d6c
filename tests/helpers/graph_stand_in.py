"""A stand-in for CUDA graphs: it records every operation with the tensors it works on, and replays these. What a step
reads from anywhere else stays as it was."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama.accelerate import cuda_graphs


class Graph:
    """Of `torch.cuda.CUDAGraph`: what `llama.accelerate.cuda_graphs` uses."""

    def __init__(self):
        self.tape: list[tuple[Any, tuple, dict, Any]] = []
        self.replays = 0
        self.memory: object = self

    def pool(self) -> object:
        return self.memory

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, results in self.tape:
            for old, new in zip(tree_leaves(results), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.untyped_storage()._cdata != new.untyped_storage()._cdata:
                    old.copy_(new)


class Recording(TorchDispatchMode):
    def __init__(self, graph: Graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = func(*args, **(kwargs or {}))
        self.graph.tape.append((func, args, kwargs or {}, results))
        return results


def stand_in_for_graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """The graphs that are recorded from now on."""
    recorded: list[Graph] = []

    @contextmanager
    def record(graph: Graph, pool: object, **_: Any) -> Iterator[None]:
        graph.memory = pool or graph
        recorded.append(graph)
        with monkeypatch.context() as patch, Recording(graph):
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            yield

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(cuda_graphs, "side_stream", lambda: stream)
    stand_ins = {"CUDAGraph": Graph, "graph": record, "current_stream": lambda: stream, "stream": nullcontext}
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return recorded
