"""Tasks that are answered with a number: the two metrics, and how a number is read from a text."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from evaluate.answer_statements import Statement, first_sentence, normalize, statements
from evaluate.metrics import Extraction, Metric
from evaluate.rows import shorten

TOLERANCE = 0.001
ROUNDED_TOLERANCE = 0.005  # of a number that is written with exactly two decimals: 0.33 for a third

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
    text = normalize(text)
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


@dataclass(frozen=True)
class Number:
    """A number in a text: text[start:end]. ordinal: "6th"."""

    extraction: Extraction
    start: int
    end: int
    ordinal: bool


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


_NUMBER = re.compile(
    r"(?:[1-9]\d{0,2}(?:(?:,\d{3}){1,8}|(?:,\d{2}){1,5},\d{3})(?!,?\d)|[1-9]\d{0,2}(?: \d{3}){1,8}(?! ?\d)|\d+)"
    r"(?P<decimals>\.\d+)?"
    r"|(?<![\w.])(?P<bare>\.\d+)"
)
_MIXED = re.compile(r" (?:and )?(\d{1,9}) ?/ ?(\d{1,9})(?![\d/])")
_OVER = re.compile(r" ?/ ?(\d{1,9}(?:\.\d{1,9})?)(?![\d/])")
_EXPONENT = re.compile(r"[eE]([+-]?\d{1,3})(?!\w)")
_TIMES_POWER = re.compile(r" ?[×x*] ?10 ?\^ ?\{?([+-]?\d{1,3})\}?(?!\d)")
_POWER = re.compile(r" ?\^ ?\{?([+-]?\d{1,3})\}?(?!\d)")
_SCALE = re.compile(r" ?(?:%|(percent|(?:dozen|hundred|thousand|million|billion|trillion)s?)\b)", re.I)
_SCALES = {"percent": 0.01, "dozen": 12.0, "hundred": 1e2, "thousand": 1e3}
_SCALES |= {"million": 1e6, "billion": 1e9, "trillion": 1e12}
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b", re.I)


def numbers(text: str) -> Iterator[Number]:
    """Yield the numbers of a normalized text that stand alone: not part of a word (x2), no exponent, no subscript."""
    position = 0
    while match := _NUMBER.search(text, position):
        position = match.end()
        before = text[max(0, match.start() - 2) : match.start()]
        if before[-1:].isalnum() or before[-1:] in ("_", "^") or before in ("^{", "_{", "^-", "_-"):
            continue
        if before[-1:] == "." and before[:1].isdigit():  # the tail of 1.2.3
            continue
        number = _number_at(text, match)
        position = number.end
        yield number


def _number_at(text: str, match: re.Match[str]) -> Number:
    """Read the number whose digits `match` holds, with its sign, fraction, power of ten and scale word."""
    start, end = match.start(), match.end()
    value = float(match[0].replace(",", "").replace(" ", ""))
    decimals = match["decimals"] or match["bare"] or ""
    rounded = len(decimals) == 3 and abs(value) >= 0.1
    if not decimals and (mixed := _MIXED.match(text, end)) and int(mixed[1]) < int(mixed[2]):
        value, end = value + int(mixed[1]) / int(mixed[2]), mixed.end()
    elif (over := _OVER.match(text, end)) and float(over[1]) and text[start - 1 : start] != "/":
        value, end, rounded = value / float(over[1]), over.end(), False
    elif power := _EXPONENT.match(text, end) or _TIMES_POWER.match(text, end):
        value, end, rounded = value * float(f"1e{power[1]}"), power.end(), False
    elif match[0] == "10" and (power := _POWER.match(text, end)):
        value, end = float(f"1e{power[1]}"), power.end()
    if _is_sign(text, start - 1):
        start, value = start - 1, -value
    candidates: tuple[float, ...] = (value,)
    ordinal = bool(_ORDINAL.match(text, end))
    if scale := _SCALE.match(text, end):
        factor = _SCALES[(scale[1] or "percent").lower().removesuffix("s")]
        candidates, end, rounded = (value, value * factor), scale.end(), False
    tolerance = (ROUNDED_TOLERANCE if rounded else TOLERANCE) + 1e-9
    return Number(Extraction(text[start:end], candidates, tolerance), start, end, ordinal)


def _is_sign(text: str, position: int) -> bool:
    """Tell whether the "-" there is a sign: not between two operands ("5-3", "5 -3") and not a hyphen ("step-3")."""
    if position < 0 or text[position] != "-":
        return False
    before = text[max(0, position - 8) : position]
    operand = before.rstrip(" ")[-1:]
    return not (before[-1:].isalnum() or before.endswith("-") or operand.isdigit() or (operand and operand in ")]}%"))
