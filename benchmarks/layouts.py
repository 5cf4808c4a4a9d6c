"""What layouts of LLaMA-3.1 over GPUs hold and send, computed from the models' sizes alone. No weight, no GPU.

    python -m benchmarks.layouts [--json FILE]

Training as in the published runs on math_14k: bf16 base, rows of 300 tokens, 32 rows a step, here in micro-batches of
4. Figures are of one GPU; all are alike.
"""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.common import LLAMA_3_1, table
from cli import cli_errors, flag, parse
from llama import ModelArgs, Transformer
from llama.engine import decode
from moa.config import AdapterConfig
from moa.files import write_json
from training.config import CHECKPOINTING_MODES
from training.estimate import (
    Message,
    cache_bytes,
    comm_bytes,
    comm_bytes_of_step,
    fake_rank,
    longest_batch,
    meta_model,
    peak_temporary_bytes,
    saved_activation_bytes,
    static_bytes,
    trace_step,
)

METHODS = ("soft_moa", "molora")
LENGTH, ROWS_PER_STEP, BATCH_SIZE = 300, 32, 4
ANSWERS, ANSWER_LENGTH = 32, 512  # generated at once: generate.py's defaults
RESERVED = 2 * 2**30  # of a GPU's memory: for CUDA, NCCL and what the allocator cannot use
MOST_ROWS = 4096  # of a micro-batch, in search of the most that fit
GPU = torch.device("cuda")


class Layout(NamedTuple):
    """GPUs of `card` GiB, `share` of which share each copy of the model. As text: with replicas x ranks of each."""

    model: str
    gpus: int
    card: int
    share: int

    def __str__(self) -> str:
        replicas = self.gpus // self.share
        return f"{self.model} on {self.gpus} x {self.card} GB, {replicas} x {self.share}"


LAYOUTS = (
    Layout("8B", 1, 24, 1),
    Layout("8B", 1, 80, 1),
    Layout("8B", 8, 80, 1),
    Layout("8B", 8, 80, 4),
    Layout("70B", 8, 80, 8),
    Layout("70B", 16, 80, 8),
    Layout("405B", 16, 80, 16),
)


@dataclass(frozen=True)
class Flags:
    """Flags of this command."""

    json: str | None = flag(None, help="write the figures, in bytes, to this file too")


class Memory(NamedTuple):
    """Of one GPU, in bytes. activations: of two rows and of three, by choice of --activation_checkpointing; a row more
    takes the same again."""

    held: dict[str, int]
    activations: dict[str, tuple[int, int]]
    temporary: Callable[[list[int]], int]  # of rows of these lengths
    cache: int

    def of(self, n_rows: int, name: str) -> int:
        """Activations of so many rows of LENGTH tokens; a single one counts as half of two."""
        two, three = self.activations[name]
        return two + (n_rows - 2) * (three - two)

    def total(self, n_rows: int, name: str) -> int:
        return sum(self.held.values()) + self.of(n_rows, name) + self.temporary([LENGTH] * n_rows)

    def largest_batch_size(self, name: str, card: int) -> int:
        """Return the most rows whose step fits `card` bytes; 0 where a single one does not."""
        return bisect_left(range(1, MOST_ROWS), True, key=lambda n: self.total(n, name) > card)


@cache
def memory_of(model: str, share: int, method: str) -> Memory:
    """The same whatever the number of replicas."""
    with fake_rank(share, share):
        rank = model_of(model, method)
        rows = [saved_activation_bytes(rank, longest_batch(n, LENGTH), GPU) for n in (2, 3)]
        activations = {choice: tuple(k.total(choice) for k in rows) for choice in CHECKPOINTING_MODES}
        temporary = partial(peak_temporary_bytes, rank, device=GPU)
        return Memory(static_bytes(rank), activations, temporary, cache_bytes(rank, ANSWERS, ANSWER_LENGTH))


def model_of(model: str, method: str) -> Transformer:
    args = ModelArgs(**LLAMA_3_1[model])
    return meta_model(args, AdapterConfig.from_dict({"method": method}, args.n_layers), bf16=True)


@torch.no_grad()
def decode_messages(model: Transformer, messages: list[Message]) -> list[Message]:
    """What a rank exchanges in a decode step of `ANSWERS` rows. messages: the list of `fake_rank`."""
    cache, begin = model.eval().new_cache(ANSWERS, 2), len(messages)
    cache.allocate([1] * ANSWERS)
    decode(model, cache, torch.empty(ANSWERS, dtype=torch.int64, device="meta"))
    return messages[begin:]


def compute(layout: Layout, method: str) -> dict[str, Any]:
    """All figures of one GPU, in bytes."""
    memory = memory_of(layout.model, layout.share, method)
    micro_batches = ROWS_PER_STEP // (BATCH_SIZE * layout.gpus // layout.share)
    figures: dict[str, Any] = {
        **layout._asdict(),
        "method": method,
        "batch_size": BATCH_SIZE,
        "micro_batches": micro_batches,
        "held": memory.held,
        "temporary": memory.temporary([LENGTH] * BATCH_SIZE),
    }
    with fake_rank(layout.gpus, layout.share) as notes:
        model = model_of(layout.model, method)
        for name in CHECKPOINTING_MODES:
            model.activation_checkpointing = name
            figures[name] = {
                "activations": memory.of(BATCH_SIZE, name),
                "total": memory.total(BATCH_SIZE, name),
                "largest_batch_size": memory.largest_batch_size(name, layout.card * 2**30 - RESERVED),
                "step": comm_bytes_of_step(trace_step(model, longest_batch(BATCH_SIZE, LENGTH), notes), micro_batches),
            }
        figures["generation"] = {
            "rows": ANSWERS,
            "length": ANSWER_LENGTH,
            "kv_cache": memory.cache,
            "total": memory.held["base"] + memory.held["adapters"] + memory.cache,
            "decode_step": comm_bytes(decode_messages(model, notes)),
        }
    return figures


def _gb(n: float) -> str:
    return f"{n / 2**30:.2f}"


def _mb(n: float) -> str:
    return f"{n / 2**20:,.1f}" if n else "-"


def markdown(figures: list[dict[str, Any]]) -> str:
    """Three tables: memory in training, what is sent in a step, generation."""

    def rows(cells: Callable[[dict[str, Any]], list[str]]) -> list[list[str]]:
        layouts = [str(Layout(**{name: f[name] for name in Layout._fields})) for f in figures]
        return [[layout, f["method"], *cells(f)] for layout, f in zip(layouts, figures, strict=True)]

    def by_choice(f: dict[str, Any], cell: Callable[[dict[str, Any]], str]) -> str:
        return " / ".join(cell(f[choice]) for choice in CHECKPOINTING_MODES)

    def memory(f: dict[str, Any]) -> list[str]:
        held = [_gb(size) for size in f["held"].values()]
        activations = by_choice(f, lambda mode: _gb(mode["activations"]))
        totals = by_choice(f, lambda mode: _gb(mode["total"]))
        largest = by_choice(f, lambda mode: f"{mode['largest_batch_size'] or 'none'}")
        return [*held, activations, _gb(f["temporary"]), totals, f"{f['card']}", largest]

    def sent(f: dict[str, Any]) -> list[str]:
        step = f["none"]["step"]
        once = [f"{step['gradients']['messages'] or '-'}", _mb(step["gradients"]["bytes"])]
        parts = step["micro_batch"].values()
        inside = [f"{part['messages']}, {_mb(part['bytes'])}" if part["messages"] else "-" for part in parts]
        in_all = by_choice(f, lambda mode: _mb(mode["step"]["sent_bytes"]))
        return [*once, f"{f['micro_batches']}", *inside, in_all]

    def generation(f: dict[str, Any]) -> list[str]:
        g, decode = f["generation"], f["generation"]["decode_step"]
        return [_gb(g["kv_cache"]), _gb(g["total"]), f"{decode['messages'] or '-'}", _mb(decode["sent_bytes"])]

    heads = ["layout", "method"]
    memory_heads = ["base", "adapters", "gradients", "optimizer", "activations", "temporary", "total", "card"]
    memory_heads.append("largest batch_size")
    sent_heads = ["gradients: messages", "size", "micro-batches", "forward", "loss", "backward", "sent by a GPU"]
    return "\n\n".join(
        [
            f"Training, GiB of one GPU, batch_size {BATCH_SIZE}. 2 x 4: two replicas, each shared by four GPUs. With "
            "slashes: --activation_checkpointing none / selective / full. The largest batch_size is the most rows that "
            f"fit when {RESERVED / 2**30:.0f} GiB of a card are left to the libraries.",
            table([*heads, *memory_heads], rows(memory)),
            f"Sent in an optimizer step of {ROWS_PER_STEP} rows, MiB: between replicas, once; within a model, in each "
            "micro-batch (messages, size). The last column is all that a GPU sends, in a ring.",
            table([*heads, *sent_heads], rows(sent)),
            f"Generation, {ANSWERS} rows of up to {ANSWER_LENGTH} tokens at once: GiB of one GPU, and MiB that it "
            "sends for one more token of each row.",
            table([*heads, "KV cache", "base, adapters and cache", "messages", "sent"], rows(generation)),
        ]
    )


def main(argv: list[str] | None = None) -> None:
    flags = parse(Flags, argv, prog="python -m benchmarks.layouts", description=__doc__)
    with cli_errors():
        figures = [compute(layout, method) for layout in LAYOUTS for method in METHODS]
        if flags.json:
            write_json(Path(flags.json), figures)
        print(markdown(figures))


if __name__ == "__main__":
    main()
