"""Text and JSON from files, and values as error messages show them. Needs no torch."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def short_repr(value: Any, length: int = 60) -> str:
    """The repr of a value on one line, cut to `length` characters."""
    text = " ".join(repr(value).split())
    return text if len(text) <= length else text[: length - 3] + "..."


def safe_name(name: str) -> str:
    """A name as it is where it is short and printable, else its `short_repr`."""
    return name if len(name) <= 60 and name.isprintable() else short_repr(name)


def require_file(path: Path) -> None:
    """ValueError unless there is such a file."""
    if not path.is_file():
        raise ValueError(f"{path}: {'is not a regular file' if path.exists() else 'no such file'}")


def read_text(path: Path) -> str:
    """The content of a UTF-8 file. ValueError naming the file where it is not there or not text; OSError."""
    require_file(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None


def parse_json(text: str | bytes, where: str) -> Any:
    """A JSON value. ValueError, beginning with `where`, for what is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None


def read_rows(path: str | Path, fields: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Rows of a JSON list or of JSON lines, each with these text fields. ValueError names the file, row and field.

    Rows count from 1 (JSON lines: the line's number).
    """
    return parse_rows(read_text(Path(path)), str(path), fields)


def parse_rows(text: str, where: str, fields: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a text as `read_rows` reads them from a file; messages begin with `where`."""
    rows = numbered_rows(text, where)
    for number, row in rows:
        require_text_fields(row, fields, f"{where}: {number}")
    return [row for _, row in rows]


def require_text_fields(row: dict[str, Any], fields: Sequence[str], where: str) -> None:
    """ValueError, beginning with `where`, naming the field of a row that is missing or no text."""
    for field in fields:
        if field not in row:
            raise ValueError(f"{where}: field {field!r} is missing")
        if not isinstance(row[field], str):
            raise ValueError(f"{where}: field {field!r} must be text, not {type(row[field]).__name__}")


def numbered_rows(text: str, where: str) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a text, each with its number for people: "row 3" of a JSON list, "line 3" of JSON lines."""
    if text.lstrip().startswith("["):
        rows = [(f"row {i}", row) for i, row in enumerate(parse_json(text, where), 1)]
    else:  # split("\n"), since splitlines() also cuts at characters that JSON allows in a text
        lines = [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        if len(lines) > 1 and _is_json(text):
            raise ValueError(f"{where}: one JSON value over several lines, not a list of rows nor a row on each")
        rows = [(number, parse_json(line, f"{where}: {number}")) for number, line in lines]
    if not rows:
        raise ValueError(f"{where}: empty, expected rows")
    for number, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: {number}: expected an object, found {type(row).__name__}")
    return rows


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
