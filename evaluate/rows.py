"""Prediction files: JSON lines, or one JSON list, of test rows that each have a "generate" field."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa.reading import numbered_rows, read_text, short_repr


@dataclass(frozen=True)
class Row:
    """A row of a prediction file.

    index: from 0. line: where it stands, for people ("line 3" of JSON lines, "row 3" of a list). texts: what was
    generated, one or more samples. answer: what `read_rows` was asked to read from the fields.
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


def read_rows(path: str | Path, read_answer: Callable[[dict[str, Any]], Any] = lambda fields: None) -> list[Row]:
    """Read all rows of a prediction file; read_answer(fields) makes each row's `answer`.

    Raises ValueError, which names file, line and field of the first thing wrong, and OSError.
    """
    rows = []
    for index, (line, fields) in enumerate(numbered_rows(read_text(Path(path)), str(path))):
        try:
            text_field({"instruction": ""} | fields, "instruction")
            several = isinstance(fields.get("generate"), list)
            texts = texts_field(fields, "generate") if several else (text_field(fields, "generate"),)
            rows.append(Row(index, line, fields, texts, read_answer(fields)))
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{path}: {line}: {error}") from None
    return rows


def text_field(fields: dict[str, Any], name: str) -> str:
    """Return a field that must be a text."""
    if name not in fields:
        raise ValueError(f"field {name!r} is missing")
    if not isinstance(fields[name], str):
        raise ValueError(f"field {name!r}: expected a text, got {short_repr(fields[name])}")
    return fields[name]


def texts_field(fields: dict[str, Any], name: str) -> tuple[str, ...]:
    """Return a field that must be a list of texts, at least one."""
    texts = fields.get(name)
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        raise ValueError(f"field {name!r}: expected a list of at least one text, got {short_repr(texts)}")
    return tuple(texts)
