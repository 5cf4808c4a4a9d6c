"""Memory of a run: estimated before it starts, fitted by recomputation, and explained where it runs out."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cli import out_of_memory
from llama.args import ModelArgs
from llama.machine import free_memory
from llama.model import Transformer
from moa.config import AdapterConfig
from training.config import BATCH_SIZE, CHECKPOINTING_MODES, LARGEST_BATCH_SIZE, TrainConfig
from training.estimate import fake_rank, longest_batch, memory_by_mode, meta_model

RESERVED = {"cpu": 2**30, "cuda": 2 * 2**30}  # bytes of free memory left to the libraries and to fragmentation


@dataclass
class MemoryEstimate:
    """Bytes of one process. by_mode: checkpointing mode -> bytes by what takes them (`training.estimate`).

    batch_size: rows of the micro-batch. requested: --activation_checkpointing. room: bytes that a step can have;
    infinite where that is not known.
    """

    by_mode: dict[str, dict[str, int]]
    batch_size: int
    requested: str
    room: float

    @property
    def mode(self) -> str:
        """What was requested; for "auto" the first mode that fits, else the one that needs least."""
        return (self.fitting() or CHECKPOINTING_MODES[-1:])[0] if self.requested == "auto" else self.requested

    def agree(self) -> None:
        """Become the estimate of the process that has least room. All processes must call it."""
        estimates = [self] * dist.get_world_size()
        dist.all_gather_object(estimates, self)
        vars(self).update(vars(min(estimates, key=lambda estimate: estimate.room)))

    def fitting(self) -> list[str]:
        return [mode for mode in CHECKPOINTING_MODES if self.by_mode[mode]["total"] <= self.room]

    def total(self, mode: str) -> str:
        return f"{self.by_mode[mode]['total'] / 2**30:.2f} GiB"

    def summary(self) -> str:
        """The total, and what takes it."""
        parts = ", ".join(f"{k} {v / 2**30:.2f}" for k, v in self.by_mode[self.mode].items() if k != "total")
        return f"{self.total(self.mode)} ({parts})"

    def report(self) -> str:
        """What a run says of it; on a second line why "auto" chose a mode other than "none"."""
        text = f"estimated memory {self.summary()}, micro-batches of up to {self.batch_size} rows"
        if self.requested == "auto" and self.mode != "none":
            free = f"{self.total('none')} without, of {max(0, self.room) / 2**30:.2f} GiB that are free"
            text += f"\n--activation_checkpointing {self.mode}: a step would take {free}"
            text += "" if self.fitting() else "; even so memory may not be enough"
        return text


def estimate_memory(flags: TrainConfig, args: ModelArgs, config: AdapterConfig, device: torch.device) -> MemoryEstimate:
    """Estimate what this process will need, before any process group or model exists. `bf16` must be decided."""
    with fake_rank(int(os.environ.get("WORLD_SIZE", 1)), flags.model_parallel_size):
        model = meta_model(args, config, flags.bf16, flags.quantize)
        return fit_memory(model, flags, device, room_of(device))


def room_of(device: torch.device) -> float:
    """Bytes that a step can have now; infinite where that is not known."""
    free = free_memory(device)
    return math.inf if free is None else free - RESERVED[device.type]


def fit_memory(model: Transformer, flags: TrainConfig, device: torch.device, room: float) -> MemoryEstimate:
    """Estimate a step of a model on the meta device; with --batch_size auto, of the largest micro-batches that fit.

    That is, with as little recomputation as --batch_size 4 needs, for this costs more time than small micro-batches do;
    then the number of micro-batches is doubled until they fit.
    """

    def estimate(rows: int) -> MemoryEstimate:
        by_mode = memory_by_mode(model, longest_batch(rows, flags.max_seq_len), device)
        return MemoryEstimate(by_mode, rows, flags.activation_checkpointing, room)

    if flags.batch_size is not None:
        return estimate(flags.batch_size)
    mode, micro_batches = estimate(BATCH_SIZE).mode, -(-flags.rows_per_rank // LARGEST_BATCH_SIZE)
    while True:
        chosen = estimate(-(-flags.rows_per_rank // micro_batches))
        if chosen.batch_size == 1 or chosen.by_mode[mode]["total"] <= room:
            return chosen
        micro_batches *= 2


@contextmanager
def oom_hint(flags: TrainConfig, estimate: MemoryEstimate) -> Iterator[None]:
    """Where memory runs out, raise a MemoryError that names the estimate and the flags that lower it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        problem = (str(error).splitlines() or ["out of memory"])[0].rstrip(".")
        hints = [f"lower --max_seq_len ({flags.max_seq_len})"]
        if estimate.batch_size > 1:
            hints.insert(
                0, f"lower --batch_size ({estimate.batch_size}; a larger --accum_iter keeps the rows of a step)"
            )
        lighter = CHECKPOINTING_MODES[CHECKPOINTING_MODES.index(estimate.mode) + 1 :]
        fitting = [f"{mode} ({estimate.total(mode)})" for mode in lighter if mode in estimate.fitting()]
        if fitting:
            hints.append(f"give --activation_checkpointing {' or '.join(fitting)}")
        hints.append(f"give --model_parallel_size above {flags.model_parallel_size} on as many GPUs")
        raise MemoryError(
            f"{problem}; by the estimate a step takes {estimate.summary()} on each process: {', '.join(hints[:-1])}, "
            f"or {hints[-1]}"
        ) from None
