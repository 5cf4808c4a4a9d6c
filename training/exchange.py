"""The sum of gradients over data-parallel ranks: adapters alone, in few large messages, under way while the backward
pass still runs. Where lanes share out a CPU's rows (`training.lanes`), gradients and so messages come after it."""

from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp
from torch import Tensor, nn

from llama.distributed import dp_size

BUCKET_BYTES = 25 * 2**20


class GradientSum:
    """`begin` before the last backward pass of a step, `finish` after it. Nothing happens on a single rank.

    Parameters are put together in buckets, the last layers' first, as the backward pass reaches them. A bucket travels
    when all its gradients are there and the one before has gone: the order is the same on all ranks, whether or not a
    rank has rows in this step or has used all its parameters.
    """

    def __init__(self, parameters: list[nn.Parameter], bucket_bytes: int = BUCKET_BYTES):
        self._buckets: list[list[nn.Parameter]] = []
        self._waiting: list[set[nn.Parameter]] = []  # of each bucket, whose gradients are still to come
        self._sent: list[tuple[Tensor, Any]] = []
        self._hooks: list[Any] = []
        if dp_size() == 1:
            return
        size = bucket_bytes
        for parameter in reversed(parameters):
            if size >= bucket_bytes:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(parameter)
            size += parameter.numel() * parameter.element_size()
            self._hooks.append(parameter.register_post_accumulate_grad_hook(self._ready))
        self._bucket_of = {parameter: i for i, bucket in enumerate(self._buckets) for parameter in bucket}

    def begin(self) -> None:
        self._waiting = [set(bucket) for bucket in self._buckets]

    def finish(self) -> None:
        """Wait until every parameter's gradient is the sum over all ranks; one that was not used counts with zeros."""
        self._send(all_left=True)
        for bucket, (flat, work) in zip(self._buckets, self._sent, strict=True):
            work.wait()
            begin = 0
            for parameter in bucket:
                parameter.grad = flat[begin : begin + parameter.numel()].view_as(parameter)
                begin += parameter.numel()
        self._sent, self._waiting = [], []

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _ready(self, parameter: nn.Parameter) -> None:
        if self._waiting:
            self._waiting[self._bucket_of[parameter]].discard(parameter)
            self._send()

    def _send(self, all_left: bool = False) -> None:
        while len(self._sent) < len(self._buckets) and (all_left or not self._waiting[len(self._sent)]):
            bucket = self._buckets[len(self._sent)]
            flat = torch.cat([p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in bucket])
            self._sent.append((flat, dist.all_reduce(flat, group=mp.get_data_parallel_group(), async_op=True)))
