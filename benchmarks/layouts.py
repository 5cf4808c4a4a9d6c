"""What layouts of LLaMA-3.1 over GPUs hold and send, computed from the models' sizes alone. No weight, no GPU.

    python -m benchmarks.layouts [--json FILE]

Training as in the published runs on math_14k: bf16 base, rows of 300 tokens, 32 rows a step, here in micro-batches of
4. Figures are of one GPU; all are alike.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

import training.memory
from benchmarks.common import LLAMA_3_1, Cell, Figures, number, table
from benchmarks.models import config_of
from cli import cli_errors, flag, parse
from llama import ModelArgs, Transformer
from llama.engine import decode
from moa.files import write_json
from training.config import CHECKPOINTING_MODES as MODES
from training.estimate import (
    Message,
    cache_bytes,
    comm_bytes,
    comm_bytes_of_step,
    fake_rank,
    longest_batch,
    memory_by_mode,
    meta_model,
    peak_temporary_bytes,
    trace_step,
)

METHODS = ("soft_moa", "molora")
HELD = ("base", "adapters", "gradients", "optimizer")  # all the time
LENGTH, ROWS_PER_STEP, BATCH_SIZE = 300, 32, 4
ANSWERS, ANSWER_LENGTH = 32, 512  # generated at once: generate.py's defaults
MIB, GIB = 2**20, 2**30
RESERVED = training.memory.RESERVED["cuda"]
MOST_ROWS = 4096  # of a micro-batch, in search of the most that fit
GPU = torch.device("cuda")


class Layout(NamedTuple):
    """GPUs of `card` GiB, `share` of which share each copy of the model. As text: with replicas x ranks of each."""

    model: str
    gpus: int
    card: int
    share: int

    def __str__(self) -> str:
        return f"{self.model} on {self.gpus} x {self.card} GB, {self.gpus // self.share} x {self.share}"


LAYOUTS = (
    Layout("8B", 1, 24, 1),
    Layout("8B", 1, 80, 1),
    Layout("8B", 8, 80, 1),
    Layout("8B", 8, 80, 4),
    Layout("70B", 8, 80, 8),
    Layout("70B", 16, 80, 8),
    Layout("405B", 16, 80, 16),
)


class Memory(NamedTuple):
    """Of one GPU, in bytes, by mode of --activation_checkpointing."""

    parts: dict[str, dict[str, int]]  # of a step of BATCH_SIZE rows, by what takes them
    total: Callable[[int, str], int]  # of a step of so many rows, in a mode
    kv_cache: int


def model_of(model: str, method: str) -> Transformer:
    args = ModelArgs(**LLAMA_3_1[model])
    return meta_model(args, config_of(method, args.n_layers), bf16=True)


@cache
def memory_of(model: str, share: int, method: str) -> Memory:
    """The same whatever the number of replicas. A row more always takes the same activations."""
    with fake_rank(share, share):
        rank = model_of(model, method)
        parts, more = (memory_by_mode(rank, longest_batch(n, LENGTH), GPU) for n in (BATCH_SIZE, BATCH_SIZE + 1))
        kv_cache = cache_bytes(rank, ANSWERS, ANSWER_LENGTH)

    def total(n_rows: int, mode: str) -> int:
        a_row = more[mode]["activations"] - parts[mode]["activations"]
        temporary = peak_temporary_bytes(rank, longest_batch(n_rows, LENGTH), GPU) - parts[mode]["temporary"]
        return parts[mode]["total"] + (n_rows - BATCH_SIZE) * a_row + temporary

    return Memory(parts, total, kv_cache)


def largest_batch_size(memory: Memory, mode: str, room: int) -> int:
    """Return the most rows whose step fits so many bytes; 0 where a single one does not."""
    return bisect_left(range(1, MOST_ROWS), True, key=lambda n: memory.total(n, mode) > room)


@torch.no_grad()
def decode_messages(model: Transformer, messages: list[Message]) -> list[Message]:
    """What a rank exchanges in a decode step of `ANSWERS` rows. messages: the list of `fake_rank`."""
    cache, begin = model.eval().new_cache(ANSWERS, 2), len(messages)
    cache.allocate([1] * ANSWERS)
    decode(model, cache, torch.empty(ANSWERS, dtype=torch.int64, device="meta"))
    return messages[begin:]


def compute(layout: Layout, method: str) -> Figures:
    """All figures of one GPU, in bytes; messages within a model are those of a micro-batch without checkpointing."""
    memory = memory_of(layout.model, layout.share, method)
    micro_batches = ROWS_PER_STEP // (BATCH_SIZE * layout.gpus // layout.share)
    steps = {}
    with fake_rank(layout.gpus, layout.share) as messages:
        model = model_of(layout.model, method)
        for mode in MODES:
            model.activation_checkpointing = mode
            steps[mode] = comm_bytes_of_step(
                *trace_step(model, longest_batch(BATCH_SIZE, LENGTH), messages), micro_batches
            )
        decode_step = comm_bytes(decode_messages(model, messages))
    parts, room = memory.parts["none"], layout.card * GIB - RESERVED
    return {
        **{"layout": str(layout), "method": method, "card": layout.card, "micro_batches": micro_batches},
        **{name: parts[name] for name in (*HELD, "temporary")},
        **{name: {mode: memory.parts[mode][name] for mode in MODES} for name in ("activations", "total")},
        "largest_batch_size": {mode: largest_batch_size(memory, mode, room) for mode in MODES},
        **{f"gradients_{name}": size for name, size in steps["none"]["gradients"].items()},
        **{f"micro_batch_{name}": size for name, size in steps["none"]["micro_batch"].items()},
        "sent": {mode: step["sent_bytes"] for mode, step in steps.items()},
        "kv_cache": memory.kv_cache,
        "generation": parts["base"] + parts["adapters"] + memory.kv_cache,
        **{f"decode_{name}": size for name, size in decode_step.items()},
    }


def by_mode(name: str, digits: int = 0, unit: float = 1) -> Cell:
    """Return what makes a cell of a figure of each mode."""
    return lambda figures: " / ".join(f"{n / unit:,.{digits}f}" if n else "-" for n in figures[name].values())


HEAD = [("layout", lambda figures: figures["layout"]), ("method", lambda figures: figures["method"])]
MEMORY = [
    *[(name, number(name, 2, GIB)) for name in HELD],
    ("activations", by_mode("activations", 2, GIB)),
    ("temporary", number("temporary", 2, GIB)),
    ("total", by_mode("total", 2, GIB)),
    ("card", number("card", 0)),
    ("largest batch_size", by_mode("largest_batch_size")),
]
SENT = [
    ("gradients: messages", number("gradients_messages", 0)),
    ("size", number("gradients_bytes", 1, MIB)),
    ("micro-batches", number("micro_batches", 0)),
    ("messages of each", number("micro_batch_messages", 0)),
    ("their size", number("micro_batch_bytes", 1, MIB)),
    ("sent by a GPU", by_mode("sent", 1, MIB)),
]
GENERATION = [
    ("KV cache", number("kv_cache", 2, GIB)),
    ("base, adapters and cache", number("generation", 2, GIB)),
    ("messages", number("decode_messages", 0)),
    ("sent", number("decode_sent_bytes", 1, MIB)),
]
TABLES = {
    f"Training, GiB of one GPU, batch_size {BATCH_SIZE}. 2 x 4: two replicas, each shared by four GPUs. With slashes: "
    "--activation_checkpointing none / selective / full. The largest batch_size is the most rows that fit when "
    f"{RESERVED / GIB:.0f} GiB of a card are left to the libraries.": MEMORY,
    f"Sent in an optimizer step of {ROWS_PER_STEP} rows, MiB: between replicas, once; within a model, in each "
    "micro-batch. The last column is all that a GPU sends, in a ring.": SENT,
    f"Generation, {ANSWERS} rows of up to {ANSWER_LENGTH} tokens at once: GiB of one GPU, and MiB that it sends for "
    "one more token of each row.": GENERATION,
}


def markdown(figures: list[Figures]) -> str:
    """Three tables: memory in training, what is sent in a step, generation."""
    return "\n\n".join(f"{title}\n\n{table([*HEAD, *columns], figures)}" for title, columns in TABLES.items())


@dataclass(frozen=True)
class Flags:
    json: str | None = flag(None, help="write the figures, in bytes, to this file too")


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(Flags, argv, prog="python -m benchmarks.layouts", description=__doc__)
    with cli_errors():
        figures = [compute(layout, method) for layout in LAYOUTS for method in METHODS]
        if flags.json:
            write_json(Path(flags.json), figures)
        print(markdown(figures))


if __name__ == "__main__":
    main()
