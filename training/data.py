"""Training rows as tokens, and the packed micro-batches of a step."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from llama.data import IGNORE_INDEX, Example, encode_example
from llama.packing import PackedBatch, async_to_device, balance_by_length
from llama.templates import ALPACA, CHAT_TEMPLATES, require_template
from llama.tokenizer import Tokenizer
from moa.reading import numbered_rows, read_text, require_text_fields
from training.config import TrainConfig

FIELDS = ("instruction", "input", "output")
Row = TypeVar("Row")
MicroBatch = tuple[Tensor, Tensor, PackedBatch]  # tokens (N,), labels (N,) on the CPU, their sequences


def load_examples(
    path: str | Path,
    tokenizer: Tokenizer,
    max_seq_len: int,
    train_on_input: bool = False,
    quiet: bool = False,
    template: str = ALPACA,
) -> list[Example]:
    """All training rows that fit `max_seq_len`; those that do not are counted aloud. ValueError where none is left."""
    require_template(tokenizer, template)
    rows = read_training_rows(path, template)
    examples = []
    for number, row in rows:
        try:
            examples.append(encode_example(tokenizer, row, max_seq_len, train_on_input, template))
        except ValueError as error:
            raise ValueError(f"{path}: {number}: {error}") from None
    too_long = [i for i, example in enumerate(examples, 1) if example is None]
    if len(too_long) == len(rows):
        raise ValueError(f"{path}: none of the {len(rows)} rows fits --max_seq_len {max_seq_len}")
    if too_long and not quiet:
        listed = ", ".join(map(str, too_long[:5])) + (", ..." if len(too_long) > 5 else "")
        count = f"{len(too_long)} of {len(rows)} rows are longer than --max_seq_len {max_seq_len} and left out"
        print(f"{path}: {count} (rows {listed})", file=sys.stderr)
    return [example for example in examples if example is not None]


def load_train_and_validation(
    flags: TrainConfig, tokenizer: Tokenizer, quiet: bool = False
) -> tuple[list[Example], list[Example]]:
    """The rows to train on, and those to validate on: of `val_data_path`, a share of the training rows, or none."""
    encoding = (tokenizer, flags.max_seq_len, flags.train_on_input, quiet, flags.template)
    examples = load_examples(flags.data_path, *encoding)
    if flags.val_data_path is not None:
        return examples, load_examples(flags.val_data_path, *encoding)
    return split_rows(examples, flags.val_share, flags.seed)


def split_rows(rows: Sequence[Row], share: float | None, seed: int) -> tuple[list[Row], list[Row]]:
    """Take a share of the rows out, chosen by the seed -> the rows that stay and those taken, in their order."""
    if share is None:
        return list(rows), []
    count = max(1, round(share * len(rows)))
    if count == len(rows):
        raise ValueError(f"--val_share {share:g} of {len(rows)} rows leaves none to train on")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2**40 + seed)).tolist()
    return [rows[i] for i in sorted(order[count:])], [rows[i] for i in sorted(order[:count])]


def read_training_rows(path: str | Path, template: str) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a file with their numbers; of Alpaca's template with its three fields."""
    rows = numbered_rows(read_text(Path(path)), str(path))
    if template == ALPACA:
        if "messages" in rows[0][1] or "conversations" in rows[0][1]:
            raise ValueError(f"{path}: {rows[0][0]} is a chat; give --template {' or '.join(CHAT_TEMPLATES)}")
        for number, row in rows:
            require_text_fields(row, FIELDS, f"{path}: {number}")
    return rows


def label_count(example: Example) -> int:
    return sum(label != IGNORE_INDEX for label in example.labels)


def local_micro_batches(
    examples: Sequence[Example], batch_size: int, device: torch.device, rank: int, ranks: int
) -> Iterator[MicroBatch | None]:
    """The micro-batches of a step that are this data-parallel rank's, as many as on every other rank.

    None where an epoch's last step has too few rows to go round.
    """
    local = balance_by_length([len(example.tokens) for example in examples], ranks)[rank]
    count = -(-len(examples) // (ranks * batch_size))
    yield from micro_batches([examples[i] for i in local], batch_size, device, count)
    yield from [None] * (count - len(local))


def micro_batches(
    examples: Sequence[Example], batch_size: int, device: torch.device, count: int | None = None
) -> Iterator[MicroBatch]:
    """At most `batch_size` examples at a time, packed, in their order.

    count: how many micro-batches, where there are so many examples; by default as few as can be.
    """
    begin, to_come = 0, count or -(-len(examples) // batch_size)
    while begin < len(examples):
        to_come -= 1
        end = max(begin + 1, min(begin + batch_size, len(examples) - to_come))
        batch, begin = examples[begin:end], end
        tokens = async_to_device([t for example in batch for t in example.tokens], device)
        labels = torch.tensor([t for example in batch for t in example.labels])  # the model chooses by them on the CPU
        yield tokens, labels, PackedBatch([len(e.tokens) for e in batch], device, [e.prompt_len for e in batch])
