"""Memory of a run: what it will take, told before, what is worked out again where it would not fit, and what to turn
down when it is not enough."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist

from cli import out_of_memory
from llama.args import ModelArgs
from llama.distributed import bf16_is_fast
from llama.free_memory import free_memory
from training.config import RECOMPUTED, RunConfig
from training.estimate import estimates, uneven
from training.layout import first_rank
from training.rehearsal import unfilled_model

RESERVED = 2**30  # bytes of free memory that are left to the libraries and to what allocators lose


class Needed(NamedTuple):
    """Bytes that a process will take, by what takes them (`training.estimate`), for each choice of what is worked out
    again; asked: --activation_checkpointing; free: bytes that the process can have (None: not known)."""

    parts: dict[str, dict[str, int]]
    asked: str
    free: int | None

    @property
    def choice(self) -> str:
        """What was asked for; of "auto" the first that fits, or else the one that needs least."""
        return (self.fitting() or RECOMPUTED[-1:])[0] if self.asked == "auto" else self.asked

    def fitting(self) -> list[str]:
        return [c for c in RECOMPUTED if self.free is None or self.parts[c]["total"] + RESERVED <= self.free]

    def total(self, choice: str) -> str:
        return _gib(self.parts[choice]["total"])

    def in_words(self) -> str:
        """The estimate on one line."""
        parts = self.parts[self.choice]
        names = ("base", "adapters", "gradients", "optimizer", "activations", "temporary")
        listed = ", ".join(f"{name} {parts[name] / 2**30:.2f}" for name in names)
        return f"{self.total(self.choice)} ({listed})"

    def why(self) -> str | None:
        """What "auto" has come to, in one line, where it is not "off"."""
        if self.asked != "auto" or self.choice == "off":
            return None
        has = f"{_gib(self.free)} are free, of which {_gib(RESERVED)} are left to the libraries"
        enough = "" if self.fitting() else "; that may not be enough"
        return (
            f"--activation_checkpointing {self.choice}: a step would take {self.total('off')} by the estimate, {has}; "
            f"so it takes {self.total(self.choice)}{enough}"
        )


def needed(settings: RunConfig, args: ModelArgs, device: torch.device) -> Needed:
    """What this process will take, and has. No process group may stand, and no model. ValueError as the run would raise
    it."""
    flags = settings.train
    bf16 = bf16_is_fast(device) if flags.bf16 is None else flags.bf16
    lengths = uneven(flags.batch_size, flags.max_seq_len)
    with first_rank(int(os.environ.get("WORLD_SIZE", 1)), flags.model_parallel_size):
        model = unfilled_model(args, settings.config(args), bf16)
        parts = estimates(model, lengths, device)
    return Needed(parts, flags.activation_checkpointing, free_memory(device))


def needed_by_all(mine: Needed) -> Needed:
    """The same on all processes: free is what the one with the least has. All must call it."""
    free: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(free, mine.free)
    return mine._replace(free=min((n for n in free if n is not None), default=None))


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


@contextmanager
def advice(settings: RunConfig, memory: Needed) -> Iterator[None]:
    """Where memory runs out: a MemoryError that says what to turn down, with the estimate beside it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        flags = settings.train
        said = (str(error).splitlines() or ["no more can be had"])[0].rstrip(".")
        ways = [f"lower --max_seq_len ({flags.max_seq_len})"]
        if flags.batch_size > 1:
            ways.insert(0, f"lower --batch_size ({flags.batch_size}; a larger --accum_iter keeps the rows of a step)")
        lighter = RECOMPUTED[RECOMPUTED.index(memory.choice) + 1 :]
        fitting = [f"{choice} ({memory.total(choice)})" for choice in lighter if choice in memory.fitting()]
        if fitting:
            ways.append(f"give --activation_checkpointing {' or '.join(fitting)}")
        ways.append(f"give --model_parallel_size above {flags.model_parallel_size} on as many GPUs")
        told = f"{said}; by the estimate a step takes {memory.in_words()} on each process: {', '.join(ways[:-1])}"
        raise MemoryError(f"{told}, or {ways[-1]}") from None
