"""The rows of a study: to train on, to choose a learning rate by, and to test on. No question stands in two of them."""

import json
from pathlib import Path
from typing import Any

from demo.problems import Draw, make_problems, normalised

SPLITS = ("train", "val", "test")
SEED = 20250605


def write_rows(folder: Path, file: str | None, flags: Any, tokenizer: Any) -> Path:
    """Write FOLDER/train.json, val.json and test.json, and return the folder.

    file: training rows, of which all three are drawn; None: the demo's problems are made, half of the tests in wordings
    that are not trained. ValueError where the file has too few rows, or where other rows stand in the folder.
    """
    from moa.files import atomic_write

    tests = max(flags.test_rows, flags.demo_rows) if file is None else flags.test_rows
    if file is None:
        rows, test = make_problems(flags.train_rows + flags.val_rows, tests)
    else:
        rows = _draw(file, flags.train_rows + flags.val_rows + tests, flags.max_seq_len, tokenizer)
        rows, test = rows[tests:], rows[:tests]
    parts = dict(zip(SPLITS, (rows[: flags.train_rows], rows[flags.train_rows :], test), strict=True))
    questions = [_question(row) for part in parts.values() for row in part]
    assert len({*questions}) == len(questions), "a question stands in two of the parts"
    for split, part in parts.items():
        path, content = folder / f"{split}.json", ("[\n" + ",\n".join(map(json.dumps, part)) + "\n]\n").encode()
        if path.is_file() and path.read_bytes() != content and not flags.redo:
            raise ValueError(f"{path}: holds other rows than these flags give; give --redo, or another --out")
        atomic_write(path, content)
    return folder


def _draw(file: str, count: int, max_seq_len: int, tokenizer: Any) -> list[dict[str, Any]]:
    """Rows in an order that any Python draws alike, each question once, none longer than `max_seq_len`."""
    from llama.data import encode_example
    from llama.templates import ALPACA
    from training.data import read_training_rows

    every_row, chosen = read_training_rows(file, ALPACA), {}
    for _, row in Draw(SEED).shuffled(every_row):
        if len(chosen) == count:
            break
        if _question(row) not in chosen and encode_example(tokenizer, row, max_seq_len) is not None:
            chosen[_question(row)] = row
    if len(chosen) < count:
        raise ValueError(
            f"{file}: {count} rows are wanted (--train_rows, --val_rows, --test_rows), but {len(chosen)} of "
            f"{len(every_row)} ask something of their own and fit --max_seq_len {max_seq_len}"
        )
    return list(chosen.values())


def _question(row: dict[str, Any]) -> str:
    return normalised(f"{row['instruction']} {row['input']}")
