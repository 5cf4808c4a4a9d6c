"""Tasks that are answered with a number: the two metrics."""

import math
import re
from typing import Any

from evaluate.answer_statements import Statement, first_sentence, statements, truncate_run_on
from evaluate.metrics import Extraction, Metric
from evaluate.normalize import normalize
from evaluate.read_numbers import TOLERANCE, Number, numbers
from evaluate.rows import shorten

_ANSWER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d*)?(?:[eE][+-]?\d{1,3})?", re.ASCII)


def read_answer(value: Any) -> float:
    """Read a row's "answer": a finite number, or a text that is just one ("1,450", "0.125")."""
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    if isinstance(value, str) and _ANSWER.fullmatch(value.strip()):
        number = float(value.replace(",", ""))
    if number is None or not math.isfinite(number):
        raise ValueError(f"a finite number, got {shorten(value)}")
    return float(number)


def is_correct(extraction: Extraction, answer: float) -> bool:
    """Tell whether some candidate lies within the tolerance of the answer."""
    return any(abs(answer - candidate) <= extraction.tolerance for candidate in extraction.candidates)


_PUBLISHED_NUMBER = re.compile(r"-?\d+\.?\d*")


def published_number(text: str, row: dict[str, Any]) -> Extraction | None:
    """Take the last match of `-?\\d+\\.?\\d*`, commas removed: comparable with the paper's tables."""
    matches = _PUBLISHED_NUMBER.findall(text.replace(",", ""))
    return Extraction(matches[-1], (float(matches[-1]),), TOLERANCE) if matches else None


def robust_number(text: str, row: dict[str, Any]) -> Extraction | None:
    """Take the first number of the stated final answer, else the last number of the text that stands alone."""
    text = normalize(truncate_run_on(text))
    for statement in statements(text):
        if number := stated_number(statement):
            return number.extraction
    last = None
    for number in numbers(text):
        if last is None or last.ordinal or not number.ordinal:  # "18 eggs on the 3rd day" ends in 18
            last = number
    return last.extraction if last else None


PUBLISHED = Metric(published_number, is_correct)
ROBUST = Metric(robust_number, is_correct)


# What may stand between a label ("Answer:") and its number.
_LEAD = re.compile(
    r"[^\w]*(?:(?:about|approximately|approx|around|roughly|exactly|only|just|rs|usd|[a-z] ?=)[^\w]*)*", re.I
)


def stated_number(statement: Statement) -> Number | None:
    """Return the first number of a statement, or the result of the equation in its sentence ("4 + 16 + 20 = 40")."""
    tail = statement.tail
    first = next(numbers(tail), None)
    if first is None or (statement.label and not _LEAD.fullmatch(tail, 0, first.start)):
        return None
    _, equals, result = first_sentence(tail[first.end :]).rpartition("=")
    return (next(numbers(result), None) if equals else None) or first
