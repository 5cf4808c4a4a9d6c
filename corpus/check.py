"""Whether a file of rows is what the catalogue says: count, fields, answers; and what it is like."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus.catalogue import LETTER, NUMBER, DataSet
from corpus.rows import read_rows

_FORMS = {NUMBER: "a number", LETTER: "a letter A to E"}  # the other patterns speak for themselves


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
    """Check one file. What is wrong with it is in `faults`, also that it cannot be read; OSError."""
    try:
        rows = read_rows(path)
    except ValueError as error:
        return Checked(data_set, 0, 0, 0, "", (str(error).removeprefix(f"{path}: "),))
    return check_rows(data_set, rows, hashlib.sha256(Path(path).read_bytes()).hexdigest())


def check_rows(data_set: DataSet, rows: Sequence[dict[str, Any]], sha256: str = "") -> Checked:
    found: dict[str, list[int]] = {}  # what is wrong with a row -> the rows
    for number, row in enumerate(rows, 1):
        for fault in _faults(data_set, row):
            found.setdefault(fault, []).append(number)
    faults = [fault + _where(numbers) for fault, numbers in found.items()]
    if abs(len(rows) - data_set.rows) > data_set.slack * data_set.rows:
        about = "about " if data_set.slack else ""
        faults.insert(0, f"{len(rows)} rows, expected {about}{data_set.rows}")
    asked = {json.dumps([row.get("instruction"), row.get("input")]) for row in rows}
    unanswered = sum(_empty(row.get("output")) for row in rows)
    return Checked(data_set, len(rows), len(rows) - len(asked), unanswered, sha256, tuple(faults))


def _faults(data_set: DataSet, row: dict[str, Any]) -> list[str]:
    faults = []
    for name in ("instruction", "input", "output", *data_set.fields):
        if name not in row:
            faults.append(f"field {name!r} is missing")
        elif not isinstance(row[name], str):
            faults.append(f"field {name!r} must be text, not {type(row[name]).__name__}")
    # Test files have problems whose worked answer is empty, and nothing reads it; nor do they all ask in words.
    needed = ("instruction", "output") if data_set.kind == "train" else ("instruction",)
    faults += [f"{name} is empty" for name in needed if _empty(row.get(name))]
    if data_set.answer:
        if "answer" not in row:
            faults.append("field 'answer' is missing")
        elif not _is_answer(data_set.answer, row["answer"]):
            form = _FORMS.get(data_set.answer, data_set.answer)
            faults.append(f"answer {_shown(row['answer'])}, expected {form}")
    return faults


def _is_answer(pattern: str, value: Any) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return pattern == NUMBER and math.isfinite(value)
    return isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII) is not None


def _empty(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _where(numbers: Sequence[int]) -> str:
    listed = ", ".join(map(str, numbers[:3])) + (", ..." if len(numbers) > 3 else "")
    return f" (row {listed})" if len(numbers) == 1 else f" ({len(numbers)} rows: {listed})"


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
