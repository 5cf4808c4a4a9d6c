"""Prediction files: JSON lines, or one JSON list, of test rows that each have a "generate" field."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moa.reading import numbered_rows, read_text, require_text_fields, short_repr


@dataclass(frozen=True)
class Row:
    """A row of a prediction file.

    line: where it stands, for people ("line 3" of JSON lines, "row 3" of a list). texts: what was generated, one or
    more samples. answer: what the task reads from the fields, to compare these with.
    """

    line: str
    fields: dict[str, Any]
    texts: tuple[str, ...]
    answer: Any

    @property
    def has_samples(self) -> bool:
        """Whether "generate" is a list, even one of a single text."""
        return isinstance(self.fields["generate"], list)


def read_rows(
    path: str | Path, read_answer: Callable[[dict[str, Any], str], Any] = lambda fields, where: None
) -> list[Row]:
    """Read all rows of a prediction file; read_answer(fields, where) makes each row's `answer`.

    Raises ValueError, which names file, line and field of the first thing wrong, and OSError.
    """
    rows = []
    for line, fields in numbered_rows(read_text(Path(path)), str(path)):
        where, fields = f"{path}: {line}", {"instruction": ""} | fields
        several = isinstance(fields.get("generate"), list)
        require_text_fields(fields, ["instruction"] + ["generate"] * (not several), where)
        texts = texts_field(fields, "generate", where) if several else (fields["generate"],)
        rows.append(Row(line, fields, texts, read_answer(fields, where)))
    return rows


def texts_field(fields: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    """Return a field that must be a list of texts, at least one."""
    texts = fields.get(name)
    if not (isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts)):
        raise ValueError(f"{where}: field {name!r}: expected a list of at least one text, got {short_repr(texts)}")
    return tuple(texts)
