"""Strict reading of prediction files: JSONL or one JSON list of test rows, each with a "generate" field."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

_MOST_LEVELS = 100  # of nested values: what is deeper could be read, but neither shown nor written


@dataclass(frozen=True)
class Row:
    """index: place in the file, from 0. place: the same for people ("line 3", "row 3"). texts: what was generated, one
    or more samples. sampled: "generate" was a list."""

    index: int
    place: str
    fields: dict[str, Any]
    texts: tuple[str, ...]
    sampled: bool


def shorten(value: Any, length: int = 60) -> str:
    """A value as a message can show it: its repr, cut."""
    shown = repr(value[: 2 * length] if isinstance(value, str) else value)
    return shown if len(shown) <= length else shown[: length - 3] + "..."


def read_rows(path: str | Path) -> list[Row]:
    """All rows of a prediction file. ValueError names file, line and field of the first thing wrong; OSError."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise ValueError(f"{path}: the file is empty, expected prediction rows")
    if text.lstrip().startswith("["):
        values = _load(text, str(path))
        if not values:
            raise ValueError(f"{path}: the list is empty, expected prediction rows")
        return [_row(value, index, f"row {index + 1}", path) for index, value in enumerate(values)]
    # Not splitlines(): that also cuts at characters which JSON allows inside a string, such as U+2028.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = []
    for index, (number, line) in enumerate(lines):
        place = f"line {number}"
        rows.append(_row(_load(line, f"{path}: {place}"), index, place, path))
    return rows


def text_of(fields: dict[str, Any], name: str) -> str:
    """A row's field that has to be a text; ValueError names it."""
    if name not in fields:
        raise ValueError(f"field {name!r} is missing")
    if not isinstance(fields[name], str):
        raise ValueError(f"field {name!r}: expected a text, got {shorten(fields[name])}")
    return fields[name]


def texts_of(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    """The same of a field that has to be a list of texts."""
    if name not in fields:
        raise ValueError(f"field {name!r} is missing")
    values = fields[name]
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise ValueError(f"field {name!r}: expected a list of texts, got {shorten(values)}")
    return tuple(values)


def _row(value: Any, index: int, place: str, path: str | Path) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {place}: expected an object with the row's fields, got {shorten(value)}")
    for name in ("instruction", "input", "output"):
        if not isinstance(value.get(name, ""), str):
            raise ValueError(f"{path}: {place}: field {name!r}: expected a text, got {shorten(value[name])}")
    if "generate" not in value:
        raise ValueError(f"{path}: {place}: field 'generate' is missing")
    generated = value["generate"]
    texts = generated if isinstance(generated, list) else [generated]
    if not texts:
        raise ValueError(f"{path}: {place}: field 'generate': expected at least one text, got an empty list")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(
                f"{path}: {place}: field 'generate': expected a text or a list of texts, got {shorten(text)}"
            )
    return Row(index, place, value, tuple(texts), isinstance(generated, list))


def _load(text: str, where: str) -> Any:
    try:
        value = json.loads(text, parse_int=_integer, parse_constant=_refuse_constant, object_pairs_hook=_object)
        if text.count("[") + text.count("{") > _MOST_LEVELS and _levels(value) > _MOST_LEVELS:
            raise RecursionError
        return value
    except json.JSONDecodeError as error:
        at = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"{where}: not valid JSON: {error.msg} at {at}") from None
    except RecursionError:
        raise ValueError(f"{where}: not valid JSON: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _levels(value: Any) -> int:
    levels, inside = 0, [value]
    while inside:
        levels += 1
        holders = [one for one in inside if isinstance(one, dict | list)]
        inside = [v for one in holders for v in (one.values() if isinstance(one, dict) else one)]
    return levels


def _integer(digits: str) -> int | float:
    """int() refuses thousands of digits; past a float's range the value is infinite, which no answer may be."""
    return int(digits) if len(digits) < 300 else float(digits)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"not valid JSON: {name} is no JSON value")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"field {shorten(name)} stands there twice")
        fields[name] = value
    return fields
