"""Text and JSON from files that may be damaged or hostile, and values shown in messages. Needs no torch."""

import json
import math
from pathlib import Path
from typing import Any, NoReturn

MAX_DEPTH = 100  # of nested JSON: nothing of ours has ten levels, and deeper values could not be written again
MAX_DIGITS = 4000  # Python itself reads no more than 4300


def short_repr(value: Any, length: int = 60) -> str:
    """A value as a message can show it: its repr, cut. Never large, slow or an error, whatever the value holds."""
    if isinstance(value, str):
        text = repr(value[: 2 * length])
    elif isinstance(value, int) and abs(value) >= 10**20:
        text = f"a number of {int(value.bit_length() * math.log10(2)) + 1} digits"
    elif isinstance(value, bool | int | float | None):
        text = repr(value)
    elif isinstance(value, list | tuple) and len(value) <= 4 and not any(isinstance(v, list | dict) for v in value):
        text = f"[{', '.join(short_repr(v, length // 4) for v in value)}]"
    else:
        text = f"a {type(value).__name__}"
    return text if len(text) <= length else text[: length - 3] + "..."


def safe_name(name: str) -> str:
    """A name from a file as a message can show it: as it is where it is short and printable."""
    return name if len(name) <= 60 and name.isprintable() else short_repr(name)


def read_text(path: Path) -> str:
    """A text file's content, in UTF-8. ValueError naming the file where it is not there or is not text; OSError."""
    if not path.is_file():  # a pipe would make us wait, a device never end
        kind = "is a folder, expected a file" if path.is_dir() else "no such file"
        raise ValueError(f"{path}: {'not a regular file' if path.exists() and not path.is_dir() else kind}")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None


def parse_json(text: str, where: str) -> Any:
    """A JSON value. ValueError, beginning with `where`, for what is no JSON, and for what JSON readers do not agree
    about or cannot hold: NaN and infinities, a key that stands twice, very long numbers, very deep nesting."""
    try:
        value = json.loads(
            text, parse_int=_integer, parse_float=_number, parse_constant=_no_constant, object_pairs_hook=_object
        )
        if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
            raise RecursionError
    except RecursionError:
        raise ValueError(f"{where}: not valid JSON (nested too deep)") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _number(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {short_repr(text)} is too large")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {short_repr(next(n for n in names if names.count(n) > 1))} stands there twice")
    return value


def _depth(value: Any) -> int:
    depth, level = 0, [value]
    while level:
        depth += 1
        inside = [one for one in level if isinstance(one, dict | list)]
        level = [v for one in inside for v in (one.values() if isinstance(one, dict) else one)]
    return depth
