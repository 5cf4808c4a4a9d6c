"""Whether a file of rows is what the catalogue says: number of rows, fields and answers."""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus.catalogue import DataSet
from moa.reading import read_rows, short_repr

# Names of patterns of answers, in the catalogue: the pattern, and how a message says it
ANSWERS = {
    "number": (r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d*)?", "a number"),
    "letter": ("[A-E]", "a letter A to E"),
}


@dataclass(frozen=True)
class Checked:
    """rows: how many, 0 where the file cannot be read. repeated: rows whose instruction and input stand earlier in the
    file. unanswered: rows without an output. faults: what is wrong, a sentence each. sha256: of the file, in hex."""

    data_set: DataSet
    rows: int
    repeated: int
    unanswered: int
    sha256: str
    faults: tuple[str, ...]


def check_file(data_set: DataSet, path: str | Path) -> Checked:
    """Check one file. `faults` has what is wrong with it, also that it cannot be read; OSError."""
    try:
        rows = read_rows(path)
    except ValueError as error:
        return Checked(data_set, 0, 0, 0, "", (str(error).removeprefix(f"{path}: "),))
    return check_rows(data_set, rows, hashlib.sha256(Path(path).read_bytes()).hexdigest())


def check_rows(data_set: DataSet, rows: Sequence[dict[str, Any]], sha256: str = "") -> Checked:
    numbers: dict[str, list[int]] = {}  # fault -> the rows that have it
    for number, row in enumerate(rows, 1):
        for fault in _faults(data_set, row):
            numbers.setdefault(fault, []).append(number)
    faults = [fault + _where(found) for fault, found in numbers.items()]
    if not data_set.rows * (1 - data_set.partial) <= len(rows) <= data_set.rows:
        faults.insert(0, f"{len(rows)} rows, expected {data_set.rows}")
    questions = {json.dumps([row.get("instruction"), row.get("input")]) for row in rows}
    unanswered = sum(is_blank(row.get("output")) for row in rows)
    return Checked(data_set, len(rows), len(rows) - len(questions), unanswered, sha256, tuple(faults))


def is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _faults(data_set: DataSet, row: dict[str, Any]) -> Iterator[str]:
    for name in ("instruction", "input", "output", *data_set.fields):
        if name not in row:
            yield f"field {name!r} is missing"
        elif not isinstance(row[name], str):
            yield f"field {name!r} must be text, not {type(row[name]).__name__}"
    # Some published tests have no worked answer, and nothing reads it.
    for name in ("instruction", "output") if data_set.split == "train" else ("instruction",):
        if is_blank(row.get(name)):
            yield f"{name} is empty"
    if data_set.answer and "answer" not in row:
        yield "field 'answer' is missing"
    elif data_set.answer:
        pattern, expected = ANSWERS.get(data_set.answer, (data_set.answer, data_set.answer))
        answer = row["answer"]
        if isinstance(answer, int | float) and not isinstance(answer, bool):
            right = data_set.answer == "number" and math.isfinite(answer)
        else:
            right = isinstance(answer, str) and re.fullmatch(pattern, answer, re.ASCII) is not None
        if not right:
            yield f"answer {short_repr(answer, 40)}, expected {expected}"


def _where(numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers[:3])) + (", ..." if len(numbers) > 3 else "")
    return f" (row {listed})" if len(numbers) == 1 else f" ({len(numbers)} rows: {listed})"
