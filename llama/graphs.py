"""Decode steps as CUDA graphs: a step's kernels are recorded once and then started together, which takes a GPU's
thousands of small kernels out of Python's hands.

A graph repeats the very same work on the very same memory. So what changes from step to step lies in a tensor that is
written over (`fed`), the cache is seen up to a multiple of `BLOCK` tokens, and rows are rounded up: idle ones work in
places of the cache that nobody holds. Hooks of Python are not part of it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.kv_cache import KVCache
from llama.packing import async_to_device

BLOCK = 128  # tokens
ROWS_AT_ONCE = 8  # from here on, rows are rounded up to a multiple


@dataclass
class _Captured:
    graph: torch.cuda.CUDAGraph
    fed: Tensor  # (2, R) int64
    logits: Tensor  # (R, V), written over by each step


class Graphs:
    """The decode steps of one run of generation: nothing that `step` reads but `fed` and the cache may change, and
    nothing may move. step: `llama.engine.decode_step` of a model and this cache."""

    def __init__(self, cache: KVCache, step: Callable[[Tensor, list[int], bool], Tensor]):
        self._cache, self._step = cache, step
        self._captured: dict[tuple[int, int], _Captured] = {}

    def decode(self, tokens: Tensor) -> Tensor:
        """As `llama.engine.decode`; the logits hold until the next step."""
        cache = self._cache
        lengths = cache.advance()
        rows = min(_rounded(len(tokens)), cache.max_rows)
        longest = min(-(-max(lengths) // BLOCK) * BLOCK, cache.max_len)
        idle = rows - len(tokens)
        ends = async_to_device(lengths + [1] * idle, tokens.device)
        if (rows, longest) not in self._captured:
            self._captured[rows, longest] = self._capture(torch.stack([torch.zeros_like(ends), ends]), longest)
        captured = self._captured[rows, longest]
        captured.fed[0, : len(tokens)] = tokens
        captured.fed[1] = ends
        captured.graph.replay()
        return captured.logits[: len(tokens)]

    def _capture(self, fed: Tensor, longest: int) -> _Captured:
        def work() -> Tensor:
            return self._step(fed, [longest] * fed.shape[1], False)

        # Once on its own, as is: what is worked out once per run must not lie in a graph's memory
        beside = side_stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            work()
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.graph.pool() for other in self._captured.values()), None)  # graphs run one after the other
        # Other threads, such as NCCL's, may ask the driver things meanwhile
        with torch.cuda.graph(graph, pool, stream=beside, capture_error_mode="thread_local"):
            logits = work()
        return _Captured(graph, fed, logits)


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace for every stream that it was ever used on."""
    return torch.cuda.Stream()


def _rounded(rows: int) -> int:
    """Up to a power of two below `ROWS_AT_ONCE`, above to a multiple of it."""
    if rows < ROWS_AT_ONCE:
        return 1 << (rows - 1).bit_length()
    return -(-rows // ROWS_AT_ONCE) * ROWS_AT_ONCE
