"""The passes of a micro-batch: on a CPU its rows are shared out over two lanes, which run side by side.

A second thread helps a product of a few hundred tokens less than it should, and the many small operations beside it not
at all; half of the rows each keep both threads at work. Rows meet in three places alone: the loss, the sum of the
adapters' gradients, and load-balancing losses, which are of all the tokens of a micro-batch.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from llama.model import Losses, Transformer
from llama.packing import PackedBatch
from moa.adapter import AdapterModule
from moa.parallel import mp_size
from training.schedule import share_out

Batch = tuple[Tensor, Tensor, PackedBatch]  # tokens (N,), labels (N,), rows
In, Out = TypeVar("In"), TypeVar("Out")

LANES = 2  # more would wait for each other: Python runs one at a time
LONGER = 0.7  # of the tokens: all threads are 1.3 to 1.5 times as fast as half of them (measured with two)


def lanes_of(lengths: Sequence[int], threads: int) -> list[list[int]]:
    """Which rows, of these lengths in tokens, each lane takes: one lane where there are not rows and threads for two,
    or the one with more tokens would take as long."""
    lanes = share_out(lengths, LANES)
    longer = max(sum(lengths[i] for i in lane) for lane in lanes)
    if min(threads, len(lengths)) < LANES or longer > LONGER * sum(lengths):
        return [list(range(len(lengths)))]
    return lanes


def threads_of(model: Transformer, device: torch.device) -> int:
    """How many threads lanes can share out. On a GPU, in a model of several parts, whose ranks must exchange in one
    order, and with adapters that draw random numbers, all rows are one lane: 1."""
    draws = any(module.draws for module in model.modules() if isinstance(module, AdapterModule))
    return 1 if device.type != "cpu" or mp_size() > 1 or draws else torch.get_num_threads()


class Passes:
    """Forward and backward passes of `model`, whose gradients go to these parameters. As many threads take part as
    torch has when this is made. A forward hook is called by each lane, in a thread of its own."""

    def __init__(self, model: Transformer, parameters: Sequence[Tensor]):
        self._model, self._parameters = model, list(parameters)
        self._threads = threads_of(model, self._parameters[0].device)
        self._pool = ThreadPoolExecutor(LANES, "lane")  # starts its threads when there is work

    def close(self) -> None:
        """Returns when no lane runs any more, whatever has become of another."""
        self._pool.shutdown()

    def run(self, batch: Batch, n_labels: int, n_tokens: int) -> Tensor:
        """Add a micro-batch's gradients to the parameters'. Returns (2,), its parts of a step's loss over `n_labels`
        labels and of its auxiliary loss, to which each micro-batch counts by its share of the `n_tokens` tokens."""
        tokens, _, rows = batch
        lanes = lanes_of(rows.lengths, self._threads)
        if len(lanes) == 1:
            parts = _of_step(self._model.losses(*batch), n_labels, len(tokens) / n_tokens)
            parts.sum().backward()
            return parts.detach()
        self._model.reach(max(rows.lengths), rows.device)  # or lanes would, each on its own
        shares = [_rows_of(batch, lane) for lane in lanes]
        found = self._side_by_side(lambda share: self._model.losses(*share), shares)
        found = self._balanced(found, [len(share[0]) / len(tokens) for share in shares])
        parts = [_of_step(losses, n_labels, len(tokens) / n_tokens) for losses in found]
        for parameter, *of_lanes in zip(self._parameters, *self._side_by_side(self._gradients, parts), strict=True):
            for gradient in of_lanes:  # always in the same order
                if gradient is not None:
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    parameter.grad += gradient
        return torch.stack([part.detach() for part in parts]).sum(0)

    def _side_by_side(self, work: Callable[[In], Out], given: Sequence[In]) -> list[Out]:
        """What `work` makes of each, by as many threads each as there are for it."""

        def lane(one: In) -> Out:
            torch.set_num_threads(self._threads // LANES)  # for this thread's operations
            return work(one)

        return list(self._pool.map(lane, given))

    def _balanced(self, found: list[Losses], shares: list[float]) -> list[Losses]:
        """The lanes' losses, with the auxiliary ones such that their sum is that of the whole micro-batch. shares: of
        its tokens."""
        if found[0].balance is None:
            return found
        load = sum(share * losses.balance.load for share, losses in zip(shares, found, strict=True))
        return [
            losses._replace(auxiliary=share * self._model.auxiliary(losses.balance._replace(load=load)))
            for share, losses in zip(shares, found, strict=True)
        ]

    def _gradients(self, parts: Tensor) -> Sequence[Tensor | None]:
        return torch.autograd.grad(parts.sum(), self._parameters, allow_unused=True)


def _of_step(losses: Losses, n_labels: int, share: float) -> Tensor:
    return torch.stack([losses.labels / n_labels, losses.auxiliary * share])


def _rows_of(batch: Batch, chosen: Sequence[int]) -> Batch:
    """Some rows of a packed batch, packed."""
    tokens, labels, rows = batch
    spans = [rows.spans[i] for i in chosen]
    tokens, labels = (torch.cat([t[begin:end] for begin, end in spans]) for t in (tokens, labels))
    return tokens, labels, PackedBatch([b - a for a, b in spans], rows.device, [rows.prompt_lens[i] for i in chosen])
