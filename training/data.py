"""Training rows as tokens, and the packed micro-batches of a step."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llama.data import IGNORE_INDEX, Example, encode_example
from llama.packing import PackedBatch, async_to_device
from llama.tokenizer import Tokenizer
from moa.reading import read_rows

FIELDS = ("instruction", "input", "output")


def load_examples(path: str | Path, tokenizer: Tokenizer, max_seq_len: int, quiet: bool = False) -> list[Example]:
    """All training rows that fit `max_seq_len`; those that do not are counted aloud. ValueError where none is left."""
    rows = read_rows(path, FIELDS)
    examples = [encode_example(tokenizer, row, max_seq_len) for row in rows]
    fitting = [example for example in examples if example is not None]
    if not fitting:
        raise ValueError(f"{path}: none of the {len(rows)} rows fits --max_seq_len {max_seq_len}")
    if len(fitting) < len(rows) and not quiet:
        out = [i for i, example in enumerate(examples, 1) if example is None]
        listed = ", ".join(map(str, out[:5])) + (", ..." if len(out) > 5 else "")
        print(
            f"{path}: {len(out)} of {len(rows)} rows are longer than --max_seq_len {max_seq_len} and left out "
            f"(rows {listed})",
            file=sys.stderr,
        )
    return fitting


def label_count(example: Example) -> int:
    return sum(label != IGNORE_INDEX for label in example.labels)


def micro_batches(
    examples: Sequence[Example], batch_size: int, device: torch.device, count: int | None = None
) -> Iterator[tuple[Tensor, Tensor, PackedBatch]]:
    """(tokens (N,), labels (N,), rows) of at most `batch_size` examples at a time, packed, in their order; labels
    stay on the CPU, where the model chooses by them.

    count: how many micro-batches, where there are so many examples; by default as few as can be.
    """
    begin, to_come = 0, count or -(-len(examples) // batch_size)
    while begin < len(examples):
        to_come -= 1
        end = max(begin + 1, min(begin + batch_size, len(examples) - to_come))
        batch, begin = examples[begin:end], end
        tokens = async_to_device([t for example in batch for t in example.tokens], device)
        labels = torch.tensor([t for example in batch for t in example.labels])
        yield tokens, labels, PackedBatch([len(e.tokens) for e in batch], device, [e.prompt_len for e in batch])
