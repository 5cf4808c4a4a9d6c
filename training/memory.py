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
from moa.config import AdapterConfig
from training.config import CHECKPOINTING_MODES, TrainConfig
from training.estimate import fake_rank, longest_batch, memory_by_mode, meta_model

RESERVED = {"cpu": 2**30, "cuda": 2 * 2**30}  # bytes of free memory left to the libraries and to fragmentation


@dataclass
class MemoryEstimate:
    """Bytes of one process. by_mode: checkpointing mode -> bytes by what takes them (`training.estimate`).

    requested: --activation_checkpointing. room: bytes that a step can have; infinite where that is not known.
    """

    by_mode: dict[str, dict[str, int]]
    requested: str
    room: float

    @property
    def mode(self) -> str:
        """What was requested; for "auto" the first mode that fits, else the one that needs least."""
        return (self.fitting() or CHECKPOINTING_MODES[-1:])[0] if self.requested == "auto" else self.requested

    def agree_on_mode(self) -> str:
        """`mode` with the room of the process that has least. All processes must call it."""
        rooms = [self.room] * dist.get_world_size()
        dist.all_gather_object(rooms, self.room)
        self.room = min(rooms)
        return self.mode

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
        text = f"estimated memory {self.summary()}"
        if self.requested == "auto" and self.mode != "none":
            free = f"{self.total('none')} without, of {max(0, self.room) / 2**30:.2f} GiB that are free"
            text += f"\n--activation_checkpointing {self.mode}: a step would take {free}"
            text += "" if self.fitting() else "; even so memory may not be enough"
        return text


def estimate_memory(flags: TrainConfig, args: ModelArgs, config: AdapterConfig, device: torch.device) -> MemoryEstimate:
    """Estimate what this process will need, before any process group or model exists. `bf16` must be decided."""
    with fake_rank(int(os.environ.get("WORLD_SIZE", 1)), flags.model_parallel_size):
        model = meta_model(args, config, flags.bf16, flags.quantize)
        by_mode = memory_by_mode(model, longest_batch(flags.batch_size, flags.max_seq_len), device)
    free = free_memory(device)
    room = math.inf if free is None else free - RESERVED[device.type]
    return MemoryEstimate(by_mode, flags.activation_checkpointing, room)


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
        if flags.batch_size > 1:
            hints.insert(0, f"lower --batch_size ({flags.batch_size}; a larger --accum_iter keeps the rows of a step)")
        lighter = CHECKPOINTING_MODES[CHECKPOINTING_MODES.index(estimate.mode) + 1 :]
        fitting = [f"{mode} ({estimate.total(mode)})" for mode in lighter if mode in estimate.fitting()]
        if fitting:
            hints.append(f"give --activation_checkpointing {' or '.join(fitting)}")
        hints.append(f"give --model_parallel_size above {flags.model_parallel_size} on as many GPUs")
        raise MemoryError(
            f"{problem}; by the estimate a step takes {estimate.summary()} on each process: {', '.join(hints[:-1])}, "
            f"or {hints[-1]}"
        ) from None
