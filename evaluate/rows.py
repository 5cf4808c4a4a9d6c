"""Prediction files: JSONL, or one JSON list, of test rows that each have a "generate" field."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn


@dataclass(frozen=True)
class Row:
    """A row of a prediction file.

    index: from 0. line: where it stands, for people ("line 3" of JSONL, "row 3" of a list). texts: what was generated,
    one or more samples. answer: what `read_rows` was asked to read from the fields.
    """

    index: int
    line: str
    fields: dict[str, Any]
    texts: tuple[str, ...]
    answer: Any

    @property
    def has_samples(self) -> bool:
        """Whether "generate" is a list, even one of a single text."""
        return isinstance(self.fields["generate"], list)


def shorten(value: Any, length: int = 60) -> str:
    """Return a value's repr, cut for use in a message."""
    shown = repr(value[: 2 * length] if isinstance(value, str) else value)
    return shown if len(shown) <= length else shown[: length - 3] + "..."


def read_rows(path: str | Path, read_answer: Callable[[dict[str, Any]], Any] = lambda fields: None) -> list[Row]:
    """Read all rows of a prediction file; read_answer(fields) makes each row's `answer`.

    Raises ValueError, which names file, line and field of the first thing wrong, and OSError.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if text.lstrip().startswith("["):
        values = [(f"row {number}", value) for number, value in enumerate(_parse(text, str(path)), 1)]
    else:  # split("\n"), since splitlines() also cuts at characters that JSON allows in a text, such as U+2028
        lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        values = [(number, _parse(line, f"{path}: {number}")) for number, line in lines]
    if not values:
        raise ValueError(f"{path}: expected prediction rows, the file is empty")
    rows = []
    for index, (line, fields) in enumerate(values):
        try:
            rows.append(Row(index, line, fields, _generated(fields), read_answer(fields)))
        except ValueError as error:
            raise ValueError(f"{path}: {line}: {error}") from None
    return rows


def text_field(fields: dict[str, Any], name: str, default: str | None = None) -> str:
    """Return a field that must be a text; without a default it must be there."""
    value = fields.get(name, default)
    if name not in fields and default is None:
        raise ValueError(f"field {name!r} is missing")
    if not isinstance(value, str):
        raise ValueError(f"field {name!r}: expected a text, got {shorten(value)}")
    return value


def texts_field(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    """Return a field that must be a list of texts, at least one."""
    if name not in fields:
        raise ValueError(f"field {name!r} is missing")
    values = fields[name]
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"field {name!r}: expected a list of at least one text, got {shorten(values)}")
    return tuple(values)


def _generated(fields: Any) -> tuple[str, ...]:
    """Check a row's shape and return its generated texts."""
    if not isinstance(fields, dict):
        raise ValueError(f"expected an object with the row's fields, got {shorten(fields)}")
    for name in ("instruction", "input", "output"):
        text_field(fields, name, default="")
    if isinstance(fields.get("generate"), list):
        return texts_field(fields, "generate")
    return (text_field(fields, "generate"),)


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, parse_int=_integer, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error.msg} at {_position(error)}") from None
    except RecursionError:
        raise ValueError(f"{where}: not valid JSON: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None


def _position(error: json.JSONDecodeError) -> str:
    return f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"


def _integer(digits: str) -> int | float:
    """Read an integer; beyond a float's range it becomes infinite, which no answer may be (int() limits the digits)."""
    return int(digits) if len(digits) < 300 else float(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")
