"""Tasks that are answered with a number: the two metrics."""

import math
import re
from collections.abc import Iterator
from typing import Any

from evaluate.answer_statements import LEAD, Statement, answer_parts, first_sentence, statements
from evaluate.metrics import Extraction, Metric
from evaluate.normalize import normalize
from evaluate.read_numbers import TOLERANCE, Number, numbers
from moa.reading import short_repr

_ANSWER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d*)?(?:[eE][+-]?\d{1,3})?", re.ASCII)


def read_answer(value: Any) -> float:
    """Read a row's "answer": a finite number, or a text that is just one ("1,450", "0.125")."""
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    if isinstance(value, str) and _ANSWER.fullmatch(value.strip()):
        number = float(value.replace(",", ""))
    if number is None or not math.isfinite(number):
        raise ValueError(f"a finite number, got {short_repr(value)}")
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
    """Take the first number of the stated final answer, else the last number of the text that stands alone.

    A range and "5 or 6" are no answer.
    """
    readings = (number for part in answer_parts(text) for number in _readings(normalize(part)))
    number = next(filter(None, readings), None)
    return number.extraction if number and not number.undecided else None


PUBLISHED = Metric(published_number, is_correct)
ROBUST = Metric(robust_number, is_correct)


_LEAD = re.compile(LEAD)
# Behind an answer that a text begins with: "18 eggs, because", or an empty line behind a bare "18".
_WHY = re.compile(r"(?: [a-z]+){0,2}\W{0,3}[.,;:\n-]\W{0,3}(?:because|since|as)\b|[^\w\n]{0,4}\n\s{0,4}\n", re.I)
_CALLED_RIGHT = re.compile(r"[^.,\n]{0,30}? is (?:the|our) (?:final |correct |right )?answer\b", re.I)
# What follows explains or checks an answer that was given before.
_ASIDE = re.compile(
    r"^\W{0,6}(?:note|check|verification|proof)\b\W{0,3}:"
    r"|\bexplanation\b\W{0,3}:|\blet['’]?s (?:verify|double[- ]check)\b",
    re.I | re.M,
)
_IN_BRACKETS = re.compile(r"(?<=\d)[^\s()]{0,3}(?: [a-z]+){0,2} \([^()\n]{1,80}\)")  # "18 eggs (3 boxes)"


def _readings(text: str) -> Iterator[Number | None]:
    """Yield what each way to read an answer makes of a text, the one to believe first."""
    stated = [stated_number(statement) for statement in statements(text)]
    yield from sorted(filter(None, stated), key=lambda number: number.undecided)
    listed = numbers(text)
    if listed and _LEAD.fullmatch(text, 0, listed[0].start) and _WHY.match(text, listed[0].end):
        yield listed[0]
    yield next((number for number in listed if _CALLED_RIGHT.match(text, number.end)), None)
    if aside := _ASIDE.search(text):
        listed = [number for number in listed if number.end <= aside.start()] or listed
    brackets = [match.span() for match in _IN_BRACKETS.finditer(text)]
    listed = [number for number in listed if not any(a < number.start < b for a, b in brackets)] or listed
    # "18 eggs on the 3rd day" and "18, not 17" end in 18
    yield max(listed, key=lambda number: (not number.negated, not number.ordinal, number.start), default=None)


def stated_number(statement: Statement) -> Number | None:
    """Return the first number of a statement, or the result of plain arithmetic ("4 + 16 + 20 = 40")."""
    tail = statement.tail
    first = next((number for number in numbers(tail) if not number.negated), None)
    if first is None or (statement.label and not _LEAD.fullmatch(tail, 0, first.start)):
        return None
    return _result(first_sentence(tail[first.start :])) or first


_OPERAND = r"[(\[]*-?[\d,.]*\d[%!a-z]*(?: [a-z]+){0,4}(?: ?/ ?[a-z]+)?[)\]]*"  # "3 boxes", "8 pints / gallon"
_OPERATOR = r"(?: ?[-+*/×^] ?| x | (?:plus|minus|times|divided by|multiplied by|of) |(?=\())"
_ARITHMETIC = re.compile(rf"(?:{_OPERAND},? or )?{_OPERAND}(?:{_OPERATOR}{_OPERAND})+ *", re.I)
_PLAIN = re.compile(_OPERAND, re.I)
_EQUALS = re.compile(r"=|,? (?:which |that )?(?:is|equals|makes|gives) ")


def _result(sentence: str) -> Number | None:
    """Return what a sentence that begins with arithmetic says it equals; None for "14 = 20 - 6" and for words."""
    expression, *sides = _EQUALS.split(sentence)
    if not _ARITHMETIC.fullmatch(expression):
        return None
    result = None
    for side in sides:
        if not _ARITHMETIC.match(side.strip()):  # of "20 - 6 = 7 * 2 = 14" the last
            result = next(iter(numbers(side)), result)
            if not _PLAIN.fullmatch(side.strip()):  # "18, as 2 * 3"
                break
    return result
