"""A batch without padding: the tokens of all rows laid end to end, and which token belongs to which row.

Shapes used throughout: N tokens of the batch, R rows, D model width.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


def async_to_device(numbers: Sequence | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of numbers that the CPU knows, on a GPU without waiting for what is still under way there."""
    tensor = torch.as_tensor(numbers, dtype=dtype)
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy from anywhere else waits
    return tensor.to(device, non_blocking=True)


class PackedBatch:
    """The rows of one forward pass.

    lengths: tokens of each row in this pass. starts: how many tokens of each row came before, in a cache (default 0).
    prompt_lens: how many of a row's tokens, counted from its first, are prompt (default: all of them). positions: where
    they are on the device already.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        device: torch.device | str,
        prompt_lens: Sequence[int] | None = None,
        starts: Sequence[int] | None = None,
        positions: Tensor | None = None,
    ):
        assert lengths and min(lengths) > 0, f"every row needs a token: {lengths}"
        self.lengths = list(lengths)
        self.device = torch.device(device)
        self.starts = list(starts) if starts is not None else [0] * len(lengths)
        self.prompt_lens = [int(n) for n in prompt_lens] if prompt_lens is not None else self.lengths
        if positions is not None:
            self.positions = positions
        assert len(self.starts) == len(self.prompt_lens) == len(self.lengths)
        assert all(1 <= p <= n for p, n in zip(self.prompt_lens, self.lengths, strict=True)), (prompt_lens, lengths)

    @property
    def uniform(self) -> bool:
        """All rows are of one length, so (N, ...) can be viewed as (R, T, ...)."""
        return min(self.lengths) == max(self.lengths)

    @cached_property
    def spans(self) -> list[tuple[int, int]]:
        """(begin, end) of each row within the batch."""
        return [(end - n, end) for end, n in zip(accumulate(self.lengths), self.lengths, strict=True)]

    @cached_property
    def positions(self) -> Tensor:
        """(N,) position of each token within its row."""
        parts = [torch.arange(s, s + n) for s, n in zip(self.starts, self.lengths, strict=True)]
        return async_to_device(torch.cat(parts), self.device)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(R + 1,) int32: where rows begin, and N; what variable-length attention kernels call cu_seqlens."""
        return async_to_device([0] + [end for _, end in self.spans], self.device, torch.int32)

    def prompt_means(self, x: Tensor) -> Tensor:
        """x (N, D) -> (R, D) float32: the mean over the tokens of each row's prompt."""
        wide = x.float()
        return self._averages.to(wide.dtype) @ wide

    def per_token(self, values: Tensor) -> Tensor:
        """One value per row, (R, ...), for each of its tokens, (N, ...)."""
        return values[self._owners]

    @cached_property
    def _averages(self) -> Tensor:
        """(R, N) float32: what each token has in the mean over its row's prompt."""
        shares = torch.zeros(len(self.lengths), sum(self.lengths))
        for row, (begin, _), n in zip(shares, self.spans, self.prompt_lens, strict=True):
            row[begin : begin + n] = 1 / n
        return async_to_device(shares, self.device)

    @cached_property
    def _owners(self) -> Tensor:
        """(N,) the row of each token."""
        return async_to_device([row for row, n in enumerate(self.lengths) for _ in range(n)], self.device)
