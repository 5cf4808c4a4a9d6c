"""Files of rows: read strictly, written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a JSON list or of JSON lines. ValueError names the file and the row (from 1) or line."""
    try:
        return parse_rows(Path(path).read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder, expected a file of rows") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_rows(data: bytes) -> list[dict[str, Any]]:
    """The same from a file's content; the ValueError names no file."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None
    try:
        if text.lstrip().startswith("["):
            rows, unit = json.loads(text), "row"
        else:  # not splitlines(): that also cuts at characters which JSON allows inside a string
            rows, unit = [json.loads(line) for line in text.split("\n") if line.strip()], "line"
    except json.JSONDecodeError as error:
        raise ValueError(f"neither a JSON list nor JSON lines ({error.msg}: {_excerpt(error.doc)})") from None
    except RecursionError:
        raise ValueError("not valid JSON: nested too deep") from None
    if not rows:
        raise ValueError("empty, expected rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise ValueError(f"{unit} {number}: expected an object, found {type(row).__name__}")
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSON list, one row a line, making the folders on the way."""
    write_text(path, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def write_text(path: Path, text: str) -> None:
    """Put a file in place whole or not at all, making the folders on the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):  # about the file that was asked for
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def _excerpt(text: str) -> str:
    """How a text begins, for a message: a web page in a file's place is told by it."""
    return repr(text.strip()[:40])
