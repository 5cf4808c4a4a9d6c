"""Suites whose answers are numbers: the two rules, and how a number is read from a text."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from evaluate.final import Statement, plain, statements
from evaluate.rows import shorten
from evaluate.suite import Found, Rule

TOLERANCE = 0.001
ROUNDED_TOLERANCE = 0.005  # of a number written with exactly two decimals: 0.33 for a third


def read_answer(value: Any) -> float:
    """A row's "answer": a finite number, or a text that holds just one ("1,450", "0.125")."""
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    if isinstance(value, str) and _ANSWER.fullmatch(value.strip()):
        number = float(value.replace(",", ""))
    if number is None or not math.isfinite(number):
        raise ValueError(f"a finite number, got {shorten(value)}")
    return float(number)


_ANSWER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d*)?(?:[eE][+-]?\d{1,3})?", re.ASCII)


def right(found: Found, answer: float) -> bool:
    """Some reading lies within the found number's tolerance of the answer."""
    return any(abs(answer - reading) <= found.tolerance for reading in found.readings)


_PUBLISHED_NUMBER = re.compile(r"-?\d+\.?\d*")


def published_number(text: str, row: dict[str, Any]) -> Found | None:
    """The last match of `-?\\d+\\.?\\d*`, commas removed: comparable with the paper's tables."""
    found = _PUBLISHED_NUMBER.findall(text.replace(",", ""))
    return Found(found[-1], (float(found[-1]),), TOLERANCE) if found else None


def robust_number(text: str, row: dict[str, Any]) -> Found | None:
    """The first number of the stated final answer, else the last stand-alone number of the text."""
    text = plain(text)
    for statement in statements(text):
        number = stated_number(statement)
        if number is not None:
            return number.found
    last = None
    for number in numbers(text):
        if last is None or last.ordinal or not number.ordinal:  # "18 eggs on the 3rd day" ends in 18
            last = number
    return last.found if last else None


PUBLISHED = Rule(published_number, right)
ROBUST = Rule(robust_number, right)


@dataclass(frozen=True)
class Number:
    """A number in a text. start, end: its place there. ordinal: "6th"."""

    found: Found
    start: int
    end: int
    ordinal: bool


_SENTENCE_END = re.compile(r"[.!?;](?=\s|$|[A-Z])|\n")
_LEAD = re.compile(
    r"[^\w]*(?:(?:about|approximately|approx|around|roughly|exactly|only|just|rs|usd|[a-z] ?=)[^\w]*)*", re.I
)


def stated_number(statement: Statement) -> Number | None:
    """The first number of a statement; where an equation follows in its sentence ("4 + 16 + 20 = 40"), its result."""
    tail = statement.tail
    first = next(numbers(tail), None)
    if first is None or (statement.label and not _LEAD.fullmatch(tail, 0, first.start)):
        return None
    sentence_end = _SENTENCE_END.search(tail, first.end)
    sentence = tail[: sentence_end.start()] if sentence_end else tail
    equals = sentence.rfind("=", first.end)
    result = next(numbers(sentence[equals + 1 :]), None) if equals >= 0 else None
    return result or first


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
_SCALE = re.compile(
    r" ?(?:(?P<percent>%|percent\b)|(?P<word>dozen|hundred|thousand|million|billion|trillion)s?\b)", re.I
)
_SCALES = {"dozen": 12.0, "hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12}
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b", re.I)


def numbers(text: str) -> Iterator[Number]:
    """The stand-alone numbers of a text that `plain` returned: not part of a word (x2), no exponent, no subscript."""
    place = 0
    while match := _NUMBER.search(text, place):
        place = match.end()
        before = text[max(0, match.start() - 2) : match.start()]
        if before[-1:].isalnum() or before[-1:] in ("_", "^") or before in ("^{", "_{", "^-", "_-"):
            continue
        if before[-1:] == "." and before[:1].isdigit():  # the tail of 1.2.3
            continue
        number = _number_at(text, match)
        place = number.end
        yield number


def _number_at(text: str, match: re.Match[str]) -> Number:
    """The number whose digits `match` found, with its sign, fraction, power of ten and scale word."""
    start, end = match.start(), match.end()
    value = float(match[0].replace(",", "").replace(" ", ""))
    decimals = match["decimals"] or match["bare"] or ""
    rounded = len(decimals) == 3 and abs(value) >= 0.1
    if not decimals and (mixed := _MIXED.match(text, end)) and int(mixed[1]) < int(mixed[2]):
        value, end = value + int(mixed[1]) / int(mixed[2]), mixed.end()
    elif (over := _OVER.match(text, end)) and float(over[1]) and text[start - 1 : start] != "/":
        value, end, rounded = value / float(over[1]), over.end(), False
    elif power := _EXPONENT.match(text, end) or _TIMES_POWER.match(text, end):
        value, end, rounded = value * _ten_to(power[1]), power.end(), False
    elif match[0] == "10" and (power := _POWER.match(text, end)):
        value, end = _ten_to(power[1]), power.end()
    if _is_sign(text, start - 1):
        start, value = start - 1, -value
    readings: tuple[float, ...] = (value,)
    ordinal = bool(_ORDINAL.match(text, end))
    if scale := _SCALE.match(text, end):
        factor = 0.01 if scale["percent"] else _SCALES[scale["word"].lower()]
        readings, end, rounded = (value, value * factor), scale.end(), False
    tolerance = (ROUNDED_TOLERANCE if rounded else TOLERANCE) + 1e-9
    return Number(Found(text[start:end], readings, tolerance), start, end, ordinal)


def _ten_to(exponent: str) -> float:
    return float(f"1e{int(exponent)}")


def _is_sign(text: str, place: int) -> bool:
    """A "-" there is a sign: not between two operands ("5-3", "5 -3") and not a hyphen ("step-3")."""
    if place < 0 or text[place] != "-":
        return False
    before = text[max(0, place - 8) : place]
    operand = before.rstrip(" ")[-1:]
    touches = before[-1:]
    return not (touches.isalnum() or touches == "-" or operand.isdigit() or (operand and operand in ")]}%"))
