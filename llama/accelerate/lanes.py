"""Two lanes on a CPU: the sequences of a micro-batch are shared out over two threads that run side by side.

A second thread helps a product of a few hundred tokens less than it should, and the many small operations beside it not
at all; with half of the sequences each, both threads are at work. Sequences meet in the loss, in the sum of gradients
and in load-balancing losses, which are over all tokens of a micro-batch.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from llama.model import Transformer
from llama.packing import PackedBatch, balance_by_length
from moa.adapter import AdapterModule
from moa.parallel import mp_size
from moa.state import adapter_parameters

MicroBatch = tuple[Tensor, Tensor, PackedBatch]
ForwardBackward = Callable[[Transformer, MicroBatch, int, int], Tensor]
In, Out = TypeVar("In"), TypeVar("Out")

LANES = 2  # more would wait for each other: Python runs one at a time
LONGER_LANE = 0.7  # of the tokens: all threads are 1.3 to 1.5 times as fast as half of them (measured with two)


class Lanes:
    """`training.loop.forward_backward` in two lanes, where they help. A context manager: it ends its threads.

    forward_backward, expert_fraction: those of `training.loop`. load_balancing: the model has such a loss. A forward
    hook is called by each lane, in its thread.
    """

    def __init__(
        self,
        model: Transformer,
        forward_backward: ForwardBackward,
        expert_fraction: Callable[[Tensor, int], Tensor],
        load_balancing: bool,
    ):
        self._parameters = [entry.parameter for entry in adapter_parameters(model).values()]
        self._one_lane, self._expert_fraction = forward_backward, expert_fraction
        self._load_balancing = load_balancing
        self._threads = usable_threads(model, self._parameters[0].device)
        self._pool = ThreadPoolExecutor(LANES, "lane")  # starts its threads when there is work

    def __enter__(self) -> ForwardBackward:
        return self._forward_backward

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown()

    def _forward_backward(
        self, model: Transformer, micro_batch: MicroBatch, num_labels: int, num_tokens: int
    ) -> Tensor:
        tokens, _, batch = micro_batch
        lanes = split_lanes(batch.lengths, self._threads)
        if len(lanes) == 1:
            return self._one_lane(model, micro_batch, num_labels, num_tokens)
        model.extend_rope_cache(batch.max_seqlen, batch.device)  # or each lane would
        shares = [select_sequences(micro_batch, lane) for lane in lanes]
        results = self._parallel(lambda share: model(share[0], labels=share[1], batch=share[2]), shares)
        ce_losses = [result.ce_loss / num_labels for result in results]
        aux_losses = [torch.zeros_like(loss) for loss in ce_losses]
        if self._load_balancing:
            stats = [result.router_stats for result in results]
            fraction = self._expert_fraction(sum(s.tokens_per_expert for s in stats), len(tokens))
            aux_losses = [model.load_balancing_loss(s, fraction) / num_tokens for s in stats]
        losses = [torch.stack(pair) for pair in zip(ce_losses, aux_losses, strict=True)]
        for parameter, *grads in zip(self._parameters, *self._parallel(self._gradients, losses), strict=True):
            for grad in grads:  # always in the same order
                if grad is not None:
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                    parameter.grad += grad
        return torch.stack([loss.detach() for loss in losses]).sum(0)

    def _parallel(self, fn: Callable[[In], Out], inputs: Sequence[In]) -> list[Out]:
        def lane(value: In) -> Out:
            torch.set_num_threads(self._threads // LANES)  # of this thread's operations
            return fn(value)

        return list(self._pool.map(lane, inputs))

    def _gradients(self, losses: Tensor) -> Sequence[Tensor | None]:
        return torch.autograd.grad(losses.sum(), self._parameters, allow_unused=True)


def split_lanes(lengths: Sequence[int], threads: int) -> list[list[int]]:
    """The sequences of each lane. One lane where there are not sequences and threads for two, or where the lane with
    more tokens would take as long."""
    lanes = balance_by_length(lengths, LANES)
    longer = max(sum(lengths[i] for i in lane) for lane in lanes)
    if min(threads, len(lengths)) < LANES or longer > LONGER_LANE * sum(lengths):
        return [list(range(len(lengths)))]
    return lanes


def usable_threads(model: Transformer, device: torch.device) -> int:
    """Threads that lanes can share out.

    1 on a GPU, under model parallelism, whose ranks must exchange in one order, and with stochastic adapters.
    """
    stochastic = any(module.is_stochastic for module in model.modules() if isinstance(module, AdapterModule))
    return 1 if device.type != "cpu" or mp_size() > 1 or stochastic else torch.get_num_threads()


def select_sequences(micro_batch: MicroBatch, chosen: Sequence[int]) -> MicroBatch:
    """Some sequences of a packed batch, packed."""
    tokens, labels, batch = micro_batch
    spans = [batch.spans[i] for i in chosen]
    tokens, labels = (torch.cat([t[begin:end] for begin, end in spans]) for t in (tokens, labels))
    lengths, prompt_lens = [b - a for a, b in spans], [batch.prompt_lens[i] for i in chosen]
    return tokens, labels, PackedBatch(lengths, batch.device, prompt_lens)
