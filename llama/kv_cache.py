"""The KV cache of the sequences being generated.

Sequences occupy the first rows, without gaps: when one finishes, the last row moves into its place (`KVCache.free`), so
that a decode step works on one contiguous piece.
"""

import torch
from torch import Tensor

from llama.packing import async_to_device
from moa.routers import Gates


class KVCache:
    """Keys and values of up to max_rows sequences of up to max_len tokens, for every layer.

    kv: per layer (max_rows, max_len, 2 K, h), keys beside values; k, v: views of it. seq_lens: tokens
    held of each sequence. gates: per layer, the gates of a per-sequence router, (max_rows, 1) by slot.
    """

    def __init__(
        self, n_layers: int, max_rows: int, max_len: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, device
    ):
        shape = (max_rows, max_len, 2 * n_kv_heads, head_dim)
        self.kv = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]
        self.k, self.v = ([kv.chunk(2, 2)[i] for kv in self.kv] for i in (0, 1))
        self.gates: list[Gates] = [{} for _ in range(n_layers)]
        self.max_rows, self.max_len = max_rows, max_len
        self.seq_lens: list[int] = []

    def allocate(self, lengths: list[int]) -> list[int]:
        """Rows for new sequences of these many tokens, whose prefill follows."""
        first = len(self.seq_lens)
        assert first + len(lengths) <= self.max_rows and max(lengths) <= self.max_len
        self.seq_lens += lengths
        return list(range(first, len(self.seq_lens)))

    def prefill(self, layer: int, rows: list[int], spans: list[tuple[int, int]], k: Tensor, v: Tensor) -> None:
        """Store the packed keys and values (N, K, h) of newly allocated sequences."""
        for row, (begin, end) in zip(rows, spans, strict=True):
            self.k[layer][row, : end - begin] = k[begin:end]
            self.v[layer][row, : end - begin] = v[begin:end]

    def store_gates(self, layer: int, rows: list[int], gates: Gates) -> None:
        """Prefill: store the gates (R, 1) of newly allocated sequences."""
        for slot, gate in gates.items():
            stored = self.gates[layer].setdefault(slot, gate.new_zeros(self.max_rows, 1))
            stored[async_to_device(rows, stored.device)] = gate

    def load_gates(self, layer: int) -> Gates:
        """Decode: (R, 1) by slot."""
        return {slot: gate[: self._num_rows] for slot, gate in self.gates[layer].items()}

    def advance(self) -> list[int]:
        """Make room for one more token of every sequence -> their lengths, that token included."""
        self.seq_lens = [n + 1 for n in self.seq_lens]
        assert max(self.seq_lens) <= self.max_len
        return self.seq_lens

    def begin_step(self, seq_lens: Tensor, max_seqlen: int, equal_lengths: bool) -> None:
        """Start a decode step over the first R sequences.

        seq_lens (R,): tokens per sequence, the new one included. max_seqlen: their maximum. equal_lengths: no mask is
        needed.
        """
        self._num_rows, self._max_seqlen = len(seq_lens), max_seqlen
        self._last = torch.arange(len(seq_lens), device=seq_lens.device) * self.max_len + seq_lens - 1
        self.mask = None  # (R, 1, 1, T), added to the scores: hides what lies beyond a shorter sequence
        if not equal_lengths:
            width = -(-max_seqlen // 16) * 16  # a GPU's kernels would copy a mask whose rows begin elsewhere
            beyond = torch.arange(width, device=seq_lens.device) >= seq_lens[:, None, None, None]
            mask = torch.zeros(beyond.shape, dtype=self.kv[0].dtype, device=beyond.device)
            self.mask = mask.masked_fill_(beyond, -torch.inf)[..., :max_seqlen]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Decode: store one key and value (R, K, h) per sequence -> all held of them, (R, T, K, h) each."""
        return self.append_joint(layer, torch.cat([k, v], 1))

    def append_joint(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        """The same from keys beside values, (R, 2 K, h)."""
        cached = self.kv[layer]
        cached.view(-1, *kv.shape[1:]).index_copy_(0, self._last, kv)
        return cached[: self._num_rows, : self._max_seqlen].chunk(2, 2)

    @torch.inference_mode()  # as `store_gates`
    def fork(self, source: int, row: int, n: int | None = None) -> None:
        """Copy a sequence, or its first n tokens, from row `source` to `row`."""
        n = n or self.seq_lens[source]
        for tensor in self.kv:
            tensor[row, :n] = tensor[source, :n]
        for gate in (gate for layer in self.gates for gate in layer.values()):
            gate[row] = gate[source]
        self.seq_lens[row] = n

    def free(self, row: int) -> None:
        """Drop a finished sequence; the last one moves to its row."""
        last = len(self.seq_lens) - 1
        if row != last:
            self.fork(last, row)
        self.seq_lens.pop()
