"""What generation works out from a model's weights alone, and keeps for later runs."""

from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp
from torch import Tensor

from llama.copies import packs
from llama.free_memory import free_memory
from llama.model import Transformer
from llama.packing import PackedBatch
from moa.adapter import weights_stand_still
from moa.parallel import mp_size

COPIES_PAY_FROM = 32  # decode steps
COPIES_SHARE = 4  # the free memory must be so many times the size of the weights


class Derivations:
    """Of one model. On a CPU they last until a weight changes, once there are copies among them. On a GPU, where there
    are none, and in a model of several parts, which must all do the same, they are of one run."""

    def __init__(self, model: Transformer):
        self._model = model
        self._weights: list[Hashable] | None = None  # by what they are known again
        self._copied, self._known = False, {}

    @contextmanager
    def of_run(self, steps: int, ahead: bool) -> Iterator[None]:
        """A run of so many decode steps, for which the weights stand still. ahead: the model may be called to no other
        end than to have it derive things."""
        model = self._model
        weights = self._told_by() if self._copied or steps >= COPIES_PAY_FROM else None
        lasting = weights is not None and weights == self._weights
        there = lasting and self._copied
        copy = there or copies_pay(model, steps)
        if not lasting or copy != there:
            self._weights, self._copied, self._known = weights, copy, {}
        with weights_stand_still(model, copy, self._known if weights is not None else None):
            if copy and not there and ahead and packs(model.output.weight):
                derive_ahead(model)
            yield

    def _told_by(self) -> list[Hashable] | None:
        """Of each weight its place, its version and its sum: others may write where no version is counted."""
        if self._model.output.weight.device.type != "cpu" or mp_size() > 1:
            return None
        return [
            (w.data_ptr(), 0 if w.is_inference() else w._version, w.detach().sum(dtype=torch.float32).item())
            for w in self._model.parameters()
        ]


def copies_pay(model: Transformer, steps: int) -> bool:
    """Whether copies of the frozen weights in an order for a CPU's kernels make up for their making and find room. All
    ranks of a model take the same way, for what they send each other depends on it."""
    device = model.output.weight.device
    if device.type != "cpu" or steps < COPIES_PAY_FROM:
        return False
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    free = free_memory(device)
    fits = torch.tensor(int(free is not None and COPIES_SHARE * frozen <= free))
    if mp_size() > 1:
        dist.all_reduce(fits, dist.ReduceOp.MIN, group=mp.get_model_parallel_group())
    return bool(fits)


def derive_ahead(model: Transformer) -> None:
    """Have the layers derive what they will, as many at a time as there are threads, for one copy is packed by one
    thread: a token of which nothing comes goes through each of them alone. Not for a model of several parts."""
    if mp_size() > 1:
        return
    weight = model.output.weight
    x = torch.zeros(1, model.args.dim, dtype=weight.dtype, device=weight.device)
    step = model.step(PackedBatch([1], weight.device))

    @torch.inference_mode()
    def call(layer: Callable[..., Tensor], *inputs: object) -> None:
        layer(x, *inputs)

    with ThreadPoolExecutor(torch.get_num_threads(), "derive") as pool:
        calls = [pool.submit(call, model.output), *(pool.submit(call, block, step) for block in model.layers)]
    for made in calls:
        made.result()
