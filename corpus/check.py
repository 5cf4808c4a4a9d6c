"""Whether a file of rows is what the catalogue says: number of rows, and their fields."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from corpus.catalogue import DataSet
from moa.reading import read_rows


class Checked(NamedTuple):
    """rows: how many, 0 where the file cannot be read. repeated: rows whose instruction and input stand earlier in the
    file. unanswered: rows without an output. faults: what is wrong, a sentence each. sha256: of the file, in hex."""

    rows: int = 0
    repeated: int = 0
    unanswered: int = 0
    faults: tuple[str, ...] = ()
    sha256: str = ""


def check_file(data_set: DataSet, path: Path) -> Checked:
    """Check one file. `faults` has what is wrong with it, also that it cannot be read; OSError."""
    try:
        rows = read_rows(path)
    except ValueError as error:
        return Checked(faults=(str(error).removeprefix(f"{path}: "),))
    return check_rows(data_set, rows)._replace(sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def check_rows(data_set: DataSet, rows: Sequence[dict[str, Any]]) -> Checked:
    """Check rows as they are to stand in the file."""
    faulty: dict[str, list[str]] = {}  # fault -> the numbers of the rows that have it
    for number, row in enumerate(rows, 1):
        for fault in _faults(data_set, row):
            faulty.setdefault(fault, []).append(str(number))
    faults = []
    if not data_set.rows * (1 - data_set.partial) <= len(rows) <= data_set.rows:
        faults.append(f"{len(rows)} rows, expected {data_set.rows}")
    for fault, numbers in faulty.items():
        faults.append(f"{fault} (rows: {', '.join(numbers[:3] + ['...'] * (len(numbers) > 3))})")
    questions = {json.dumps([row.get("instruction"), row.get("input")]) for row in rows}
    unanswered = sum(is_blank(row.get("output")) for row in rows)
    return Checked(len(rows), len(rows) - len(questions), unanswered, tuple(faults))


def is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _faults(data_set: DataSet, row: dict[str, Any]) -> Iterator[str]:
    for name in ("instruction", "input", "output", *data_set.fields):
        if name not in row:
            yield f"field {name!r} is missing"
        elif name != "answer" and not isinstance(row[name], str):
            yield f"field {name!r} must be text, not {type(row[name]).__name__}"
    # Some published tests have no worked answer, and nothing reads it
    for name in ("instruction", "output") if data_set.split == "train" else ("instruction",):
        if is_blank(row.get(name)):
            yield f"{name} is empty"
