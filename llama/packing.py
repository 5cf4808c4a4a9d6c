"""A packed batch: the tokens of all sequences laid end to end, without padding.

Shapes: N tokens of the batch, R sequences, D model width.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


def async_to_device(data: Sequence | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy host data to `device` without waiting for it (through pinned memory on CUDA)."""
    tensor = torch.as_tensor(data, dtype=dtype)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class PackedBatch:
    """The sequences of one forward pass.

    lengths: tokens of each sequence in this pass.
    prompt_lens: how many of a sequence's tokens, from its first, are prompt (default: all).
    spans: (begin, end) of each sequence among the N tokens.
    cu_seqlens: (R + 1,) int32, where sequences begin, and N.
    positions: (N,) of each token in its sequence. sequence_ids: (N,) the sequence of each token.
    """

    def __init__(
        self, lengths: Sequence[int], device: torch.device | str, prompt_lens: Sequence[int] | None = None
    ) -> None:
        assert lengths and min(lengths) > 0, f"every sequence needs a token: {lengths}"
        self.lengths, self.device = list(lengths), torch.device(device)
        self.prompt_lens = self.lengths if prompt_lens is None else [int(n) for n in prompt_lens]
        assert all(1 <= p <= n for p, n in zip(self.prompt_lens, self.lengths, strict=True)), (prompt_lens, lengths)
        ends = list(accumulate(self.lengths))
        self.spans = list(zip([0, *ends[:-1]], ends, strict=True))
        self.max_seqlen = max(self.lengths)
        self.equal_lengths = min(self.lengths) == self.max_seqlen
        positions = torch.cat([torch.arange(n) for n in self.lengths])
        sequence_ids = torch.repeat_interleave(torch.tensor(self.lengths))
        self.positions, self.sequence_ids = async_to_device(torch.stack([positions, sequence_ids]), self.device)
        self.cu_seqlens = async_to_device([0, *ends], self.device, torch.int32)
        self._prompt_lens = async_to_device(self.prompt_lens, self.device)

    def mean_over_prompt(self, x: Tensor) -> Tensor:
        """x (N, D) -> (R, D) float32, the mean over each sequence's prompt tokens."""
        sequences = torch.arange(len(self.lengths), device=x.device)[:, None]
        prompt = (self.sequence_ids == sequences) & (self.positions < self._prompt_lens[:, None])  # (R, N)
        x = x.float()
        return (prompt / self._prompt_lens[:, None]).to(x.dtype) @ x

    def expand_to_tokens(self, values: Tensor) -> Tensor:
        """One value per sequence, (R, ...) -> one per token, (N, ...)."""
        return values[self.sequence_ids]


def balance_by_length(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Split sequences of these lengths into shares of equally many sequences and about equally many tokens.

    Returns the indices of each share, in order. Rounds deal out the longest first; in each round the share with the
    fewest tokens so far gets the longest.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    for begin in range(0, len(lengths), num_shares):
        shares.sort(key=lambda share: sum(lengths[i] for i in share))
        for share, i in zip(shares, longest_first[begin : begin + num_shares], strict=False):
            share.append(i)
    return [sorted(share) for share in shares]
