"""Decode steps as CUDA graphs: a step's kernels are recorded once and then launched together.

A graph repeats the same work on the same memory. What changes from step to step lies in a tensor that is written over,
the cache is seen up to a multiple of `SEQ_LEN_BUCKET` tokens, and the number of sequences is rounded up; idle ones work
in rows of the cache that nobody holds. Python's hooks are not part of a graph.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.kv_cache import KVCache
from llama.model import Transformer
from llama.packing import async_to_device

SEQ_LEN_BUCKET = 128  # tokens
BATCH_BUCKET = 8  # from here on, sequences are rounded up to a multiple


@dataclass
class CapturedGraph:
    graph: torch.cuda.CUDAGraph
    static_inputs: Tensor  # (2, R) int64: newest tokens, and lengths of their sequences
    logits: Tensor  # (R, V), written over by each step


class CUDAGraphRunner:
    """The decode steps of one run of generation, in which nothing else may change or move."""

    def __init__(self) -> None:
        self._captured: dict[tuple[int, int], CapturedGraph] = {}

    def decode(self, model: Transformer, cache: KVCache, tokens: Tensor) -> Tensor:
        """As `llama.engine.decode`; the logits hold until the next step."""
        lengths = cache.advance()
        rows = min(bucket(len(tokens)), cache.max_rows)
        max_seqlen = min(-(-max(lengths) // SEQ_LEN_BUCKET) * SEQ_LEN_BUCKET, cache.max_len)
        idle = rows - len(tokens)
        seq_lens = async_to_device(lengths + [1] * idle, tokens.device)
        if (rows, max_seqlen) not in self._captured:
            inputs = torch.stack([torch.zeros_like(seq_lens), seq_lens])
            self._captured[rows, max_seqlen] = self._capture(model, cache, inputs, max_seqlen)
        captured = self._captured[rows, max_seqlen]
        captured.static_inputs[0, : len(tokens)] = tokens
        captured.static_inputs[1] = seq_lens
        captured.graph.replay()
        return captured.logits[: len(tokens)]

    def _capture(self, model: Transformer, cache: KVCache, inputs: Tensor, max_seqlen: int) -> CapturedGraph:
        def step() -> Tensor:
            return model.decode(inputs[0], cache, inputs[1], max_seqlen, equal_lengths=False)

        # Once without recording: what is cached for the run must not lie in a graph's memory
        stream = side_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        pool = next((other.graph.pool() for other in self._captured.values()), None)  # graphs run one after the other
        # Other threads, such as NCCL's, may call the driver meanwhile
        with torch.cuda.graph(graph, pool, stream=stream, capture_error_mode="thread_local"):
            logits = step()
        return CapturedGraph(graph, inputs, logits)


@functools.cache
def side_stream() -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace for every stream that it was used on."""
    return torch.cuda.Stream()


def bucket(rows: int) -> int:
    """Rounded up to a power of two below `BATCH_BUCKET`, to a multiple of it above."""
    if rows < BATCH_BUCKET:
        return 1 << (rows - 1).bit_length()
    return -(-rows // BATCH_BUCKET) * BATCH_BUCKET
