"""Tasks that are answered with a number: the two rules, and how numbers are read from a text.

A number may have a sign, thousands separators, a fraction, a power of ten and a word like "dozen".
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from evaluate.statements import LEAD, Extraction, Statement, answer_parts, first_sentence, statements
from moa.reading import short_repr

TOLERANCE = 0.001
ROUNDED_TOLERANCE = 0.005  # of a number that is written with exactly two decimals: 0.33 for a third
_ANSWER = re.compile(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d*)?(?:[eE][+-]?\d{1,3})?", re.ASCII)


def read_answer(value: Any) -> float:
    """Read a row's "answer": a finite number, or a text that is just one ("1,450", "0.125")."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(value, str) and _ANSWER.fullmatch(value.strip()):
        value, is_number = value.replace(",", ""), True
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"a finite number, got {short_repr(value)}")
    return number


_PUBLISHED_NUMBER = re.compile(r"-?\d+\.?\d*")


def published(text: str, row: dict[str, Any]) -> Extraction | None:
    """Take the last match of `-?\\d+\\.?\\d*`, commas removed: comparable with the paper's tables."""
    matches = _PUBLISHED_NUMBER.findall(text.replace(",", ""))
    return Extraction(matches[-1], (float(matches[-1]),), TOLERANCE) if matches else None


def robust(text: str, row: dict[str, Any]) -> Extraction | None:
    """Take the first number of the stated final answer, else the last number of the text that stands alone.

    A range and "5 or 6" are no answer.
    """
    number = next(filter(None, (number for part in answer_parts(text) for number in _readings(part))), None)
    return number.extraction if number and not number.undecided else None


@dataclass(frozen=True)
class Number:
    """A number in a text: text[start:end].

    ordinal: "6th". negated: "not 6". undecided: one of "5 or 6", or an end of a range.
    """

    extraction: Extraction
    start: int
    end: int
    ordinal: bool
    negated: bool
    undecided: bool = False


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


_DIGITS = re.compile(
    r"""
      [1-9]\d{0,2} (?: (?:,\d{3}){1,8} | (?:,\d{2}){1,5},\d{3} ) (?!,?\d) (?:\.\d+)?  # 1,234,567.5; 12,34,567
    | [1-9]\d{0,2} (?:[ ]\d{3}){1,8} (?![ ]?\d) (?:\.\d+)?                            # 118 000
    | \d+ (?:\.\d+)?
    | (?<![\w.]) \.\d+
    """,
    re.VERBOSE,
)
_MIXED = re.compile(r" (?:and )?(\d{1,9}) ?/ ?(\d{1,9})(?![\d/])")  # 1 1/2
_OVER = re.compile(r" ?/ ?(\d{1,9}(?:\.\d{1,9})?)(?![\d/])")  # 1/2
_EXPONENT = re.compile(r"[eE]([+-]?\d{1,3})(?!\w)")  # 1.5e3
_SCALE = re.compile(
    r" ?(?:(%)|((?i:percent|dozen|hundred|thousand|million|billion|trillion))s?\b|(万|亿))|(k|K|M|mn|bn|B)\b"
)
_SCALES = {"%": 0.01, "percent": 0.01, "dozen": 12.0, "hundred": 1e2, "thousand": 1e3, "万": 1e4, "亿": 1e8}
_SCALES |= {"million": 1e6, "billion": 1e9, "trillion": 1e12, "k": 1e3, "m": 1e6, "mn": 1e6, "bn": 1e9, "b": 1e9}
_ORDINAL = re.compile(r"(?:st|nd|rd|th)\b", re.I)
_NEGATED = re.compile(r"(?:\bnot|n['’]t|\brather than|\binstead of) \W{0,3}$", re.I)


def numbers(text: str) -> list[Number]:
    """Return the numbers of a normalized text that stand alone: not part of a word (x2), no exponent, no subscript."""
    listed = list(_each_number(text))
    for index, (first, second) in enumerate(pairwise(listed)):
        if _is_undecided(text, first, second):
            listed[index : index + 2] = [replace(number, undecided=True) for number in (first, second)]
    return listed


def _each_number(text: str) -> Iterator[Number]:
    position = 0
    while match := _DIGITS.search(text, position):
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
    start, end = match.span()
    digits, _, decimals = match[0].replace(",", "").replace(" ", "").partition(".")
    value = float(f"{digits}.{decimals}")
    rounded = len(decimals) == 2 and value >= 0.1
    if not decimals and (mixed := _MIXED.match(text, end)) and int(mixed[1]) < int(mixed[2]):
        value, end = value + int(mixed[1]) / int(mixed[2]), mixed.end()
    elif (over := _OVER.match(text, end)) and float(over[1]) and text[start - 1 : start] != "/":
        value, end, rounded = value / float(over[1]), over.end(), False
    elif power := _EXPONENT.match(text, end):
        value, end, rounded = value * float(f"1e{power[1]}"), power.end(), False
    if _is_sign(text, start - 1):
        start, value = start - 1, -value
    candidates: tuple[float, ...] = (value,)
    ordinal = bool(_ORDINAL.match(text, end))
    if scale := _SCALE.match(text, end):
        candidates = (value, value * _SCALES[scale[scale.lastindex or 0].lower()])
        end, rounded = scale.end(), False
    tolerance = (ROUNDED_TOLERANCE if rounded else TOLERANCE) + 1e-9
    negated = bool(_NEGATED.search(text, max(0, start - 20), start))
    return Number(Extraction(text[start:end], candidates, tolerance), start, end, ordinal, negated)


def _is_sign(text: str, position: int) -> bool:
    """Tell whether the "-" there is a sign: not between two operands ("5-3", "5 -3") and not a hyphen ("step-3")."""
    if position < 0 or text[position] != "-":
        return False
    before = text[max(0, position - 8) : position]
    operand = before.rstrip(" ")[-1:]
    return not (before[-1:].isalnum() or before.endswith("-") or operand.isdigit() or (operand and operand in ")]}%"))


_OR = re.compile(r"(?: (\w+))?,? or (?:even |about )?")  # "5 or 6", "5 apples or 6 apples"
_OPERATOR_BEFORE = re.compile(r"[-+*/×^=] ?$")
_OPERATOR_AFTER = re.compile(r" ?(?:[-+*/×^=(]|x \d)")


def _is_undecided(text: str, first: Number, second: Number) -> bool:
    """Tell whether two neighbours are "5 or 6" or a range ("5-10", "5 to 10", "between 5 and 10"), so that none counts.

    "0.50 or 50 cents" and "1/2 or 50%" are one number in two forms.
    """
    before = text[max(0, first.start - 10) : first.start].lower()
    if _OPERATOR_BEFORE.search(before) or _OPERATOR_AFTER.match(text, second.end):  # "5 / 5 or 20 = x"
        return False
    gap = text[first.end : second.start]
    if match := _OR.fullmatch(gap):
        unit = match[1]
        return not _are_same(first, second) and (not unit or text.startswith(f" {unit}", second.end))
    is_range = (
        gap == "-"
        or (gap == " to " and not before.endswith(("from ", "to ")))
        or (gap == " and " and before.endswith("between "))
    )
    return is_range and first.extraction.candidates[0] < second.extraction.candidates[0]


def _are_same(first: Number, second: Number) -> bool:
    return any(
        math.isclose(a, b) or math.isclose(100 * a, b)
        for a in first.extraction.candidates
        for b in second.extraction.candidates
    )
