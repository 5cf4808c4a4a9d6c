"""The KV cache of a set of rows being generated.

Rows occupy the first places, without gaps: when one finishes, the last row moves into its place (`KVCache.drop`), so that
a decode step always works on one contiguous piece.
"""

import torch
from torch import Tensor

from llama.packing import async_to_device
from moa.routers import Gates


class KVCache:
    """Keys and values of up to `max_rows` rows of up to `max_len` tokens each, for every layer.

    k, v: one (max_rows, K, max_len, h) tensor per layer; on a CPU the keys' tokens lie innermost in memory, as its
    product with a query wants them. lengths: tokens held of each row. gates: per layer, those that its router gave a
    row for good, (max_rows, 1) by slot.
    """

    def __init__(
        self, n_layers: int, max_rows: int, max_len: int, n_kv_heads: int, head_dim: int, dtype: torch.dtype, device
    ):
        def zeros(*shape: int) -> list[Tensor]:
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(n_layers)]

        self.v = zeros(max_rows, n_kv_heads, max_len, head_dim)
        if torch.device(device).type == "cpu":
            self.k = [k.mT for k in zeros(max_rows, n_kv_heads, head_dim, max_len)]
        else:
            self.k = zeros(max_rows, n_kv_heads, max_len, head_dim)
        self.gates: list[Gates] = [{} for _ in range(n_layers)]
        self.max_rows, self.max_len = max_rows, max_len
        self.lengths: list[int] = []

    def admit(self, lengths: list[int]) -> list[int]:
        """Places for new rows of these many tokens, whose prefill follows."""
        first = len(self.lengths)
        assert first + len(lengths) <= self.max_rows and max(lengths) <= self.max_len
        self.lengths += lengths
        return list(range(first, len(self.lengths)))

    def fill(self, layer: int, places: list[int], spans: list[tuple[int, int]], k: Tensor, v: Tensor) -> None:
        """Prefill: put the packed keys and values (N, K, h) of newly admitted rows into their places."""
        for place, (begin, end) in zip(places, spans, strict=True):
            self.k[layer][place, :, : end - begin] = k[begin:end].transpose(0, 1)
            self.v[layer][place, :, : end - begin] = v[begin:end].transpose(0, 1)

    def keep_gates(self, layer: int, places: list[int], gates: Gates) -> None:
        """Prefill: put the gates (R, 1) of newly admitted rows into their places."""
        for slot, gate in gates.items():
            kept = self.gates[layer].setdefault(slot, gate.new_zeros(self.max_rows, 1))
            kept[async_to_device(places, kept.device)] = gate

    def kept_gates(self, layer: int) -> Gates:
        """Decode: (R, 1) by slot."""
        return {slot: gate[: self._n_rows] for slot, gate in self.gates[layer].items()}

    def advance(self) -> list[int]:
        """Room for one more token of every row -> the tokens of each, that one included."""
        self.lengths = [n + 1 for n in self.lengths]
        assert max(self.lengths) <= self.max_len
        return self.lengths

    def at(self, ends: Tensor, longest: int, even: bool) -> None:
        """Decode: `append`, `filled` and `kept_gates` refer from now on to the first R rows, of `ends` (R,) tokens and
        none more than `longest`; even: all of so many."""
        self._n_rows, self._longest = len(ends), longest
        self._last = [_last_tokens(t, ends) for t in (self.k[0], self.v[0])]
        self.mask = None
        if not even:
            beyond = torch.arange(longest, device=ends.device) >= ends[:, None, None, None]
            # In the type of the scores that it is added to: a CPU's are float32 (`cached_attention`)
            dtype = torch.float32 if ends.device.type == "cpu" else self.v[0].dtype
            self.mask = torch.zeros(beyond.shape, dtype=dtype, device=ends.device).masked_fill_(beyond, -torch.inf)

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Decode: one key and value (R, K, h) per row, in the place of its last token."""
        for held, last, new in zip((self.k[layer], self.v[layer]), self._last, (k, v), strict=True):
            held.as_strided((held.numel(),), (1,)).index_copy_(0, last, new.flatten())

    def filled(self, layer: int) -> tuple[Tensor, Tensor]:
        """(R, K, T, h) keys and values up to the longest row; `mask` (R, 1, 1, T), to be added to scores, hides what
        lies beyond a shorter one."""
        return tuple(t[layer][: self._n_rows, :, : self._longest] for t in (self.k, self.v))

    @torch.inference_mode()  # what `keep_gates` made, it made in this mode
    def copy(self, source: int, place: int, n: int | None = None) -> None:
        """What is held of the row at `source`, of its first n tokens or all, to `place`."""
        n = n or self.lengths[source]
        for tensor in (*self.k, *self.v):
            tensor[place, :, :n] = tensor[source, :, :n]
        for gate in (gate for layer in self.gates for gate in layer.values()):
            gate[place] = gate[source]
        self.lengths[place] = n

    def drop(self, place: int) -> None:
        """A row is finished: the last row moves to its place."""
        last = len(self.lengths) - 1
        if place != last:
            self.copy(last, place)
        self.lengths.pop()


def _last_tokens(held: Tensor, ends: Tensor) -> Tensor:
    """Where in the memory of `held` (max_rows, K, max_len, h) the numbers of each row's last token lie, (R K h,). To
    places numbered so a CPU copies in half the time that it takes for places in several dimensions."""

    def along(dim: int, n: int) -> Tensor:
        return torch.arange(n, device=ends.device) * held.stride(dim)

    tokens = along(0, len(ends)) + (ends - 1) * held.stride(2)
    heads, width = along(1, held.shape[1]), along(3, held.shape[3])
    return (tokens[:, None, None] + heads[:, None] + width).flatten()
