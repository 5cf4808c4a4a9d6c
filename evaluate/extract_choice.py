"""Tasks that are answered with a choice, A to E: the two metrics."""

import re
from collections.abc import Iterator
from typing import Any

from evaluate.answer_statements import LEAD, Statement, answer_parts, first_sentence, statements
from evaluate.extract_number import is_correct, stated_number
from evaluate.keyword_mentions import mentions_of
from evaluate.metrics import Extraction, Metric
from evaluate.normalize import normalize
from evaluate.read_numbers import numbers
from moa.reading import short_repr

_LETTERS = "ABCDE"


def read_answer(value: Any) -> str:
    """Read a row's "answer": one capital letter A to E."""
    if not isinstance(value, str) or len(value) != 1 or value not in _LETTERS:
        raise ValueError(f"one letter A to E, got {short_repr(value)}")
    return value


_PUBLISHED_LETTER = re.compile("[A-E]")


def published_letter(text: str, row: dict[str, Any]) -> Extraction | None:
    """Take the first capital A to E anywhere, even inside a word: comparable with the paper's tables."""
    match = _PUBLISHED_LETTER.search(text)
    return _letter(match[0]) if match else None


def robust_letter(text: str, row: dict[str, Any]) -> Extraction | None:
    """Take the stated letter; else the stated value, if only one choice has it; else the last letter that stands alone.

    "A or B" is no choice, nor is a letter that the row does not list.
    """
    choices = _choices(row.get("instruction", ""))
    readings = (extraction for part in answer_parts(text) for extraction in _readings(_without_lists(part), choices))
    extraction = next(filter(None, readings), None)
    return extraction if extraction and (not choices or extraction.candidates[0] in choices) else None


PUBLISHED = Metric(published_letter)
ROBUST = Metric(robust_letter)

_NO_WORD = r"(?![\w'’])"  # behind a letter: not "Ann", "A's"
# An article or the subject of a sentence that explains, not the choice (A): "A" before a word in lower case, except
# the words that follow a stated choice.
_ARTICLE = r"(?!(?<=A) (?!(?:because|since|as|and|or|is|which|with|for|by|so)\b)[a-z])"
_STAND_ALONE = re.compile(rf"(?<![\w'’°])([A-E]){_ARTICLE}{_NO_WORD}")  # not "Mr. D's", "25 °C", "10C2"
_AT_ONCE = re.compile(  # "the option B", "(b)", "d."
    rf"{LEAD}(?:([A-E]){_NO_WORD}{_ARTICLE}|(?<=[(\[{{])([a-e])(?=[)\]}}])|([a-e])(?=\s*$|[).,:;]))"
)
_LATER = (
    re.compile(r"(?<!\w)[(\[{] ?([A-Ea-e]) ?[)\]}](?!\w)"),  # "62 m (c)"
    re.compile(r"\b(?i:option|choice|alternative) ?\(?([A-E])\b"),  # "62 m, option C"
)
# An answer that the text begins with, then why: "B. The train", "(B)\n", "B, because".
_LEADING = re.compile(r"[\W_]*(?:(?:option|choice|answer) )?\(?([A-E])(?:[).](?!\w)|\s*\n|,? (?:because|since|as)\b)")
_LIST = re.compile(
    r"(?<![\w'’°(])\(?[A-E]\)?(?:, ?\(?[A-E]\)?){0,4}(?:,? (?:or|to|and) |/|-)\(?[A-E](?:\)|(?![\w'’)]))(?! is\b)"
)
_COPIED = re.compile(  # the choices, repeated
    r"\(?A[).:] [\s\S]{1,100}?\s\(?B[).:] [\s\S]{1,100}?\s\(?C[).:] "
    r"(?:[\s\S]{1,100}?\s\(?D[).:] )?(?:[\s\S]{1,100}?\s\(?E[).:] )?[^.\n]{0,100}"
)


def _without_lists(text: str) -> str:
    return _LIST.sub(" ", _COPIED.sub(" ", normalize(text)))


def _readings(text: str, choices: dict[str, str]) -> Iterator[Extraction | None]:
    """Yield what each way to read an answer makes of a text, the one to believe first."""
    stated = statements(text)
    mentions = list(mentions_of(_STAND_ALONE, text))
    yield from map(_stated_letter, stated)
    yield from (_letter(mention.answer) for mention in mentions if mention.chosen)
    if leading := _LEADING.match(text):
        yield _letter(leading[1])
    for statement in stated:
        yield _choice_of_value(statement, choices)
    yield from (_letter(mention.answer) for mention in reversed(mentions) if not mention.negated)
    if len(text.strip()) <= 80 and "\n" not in text.strip():  # the text is nothing else: "d", "(d) 62 m", "62 m"
        whole = Statement(text.strip(), label=True)
        yield _stated_letter(whole)
        yield _choice_of_value(whole, choices)


def _letter(letter: str) -> Extraction:
    return Extraction(letter.upper(), (letter.upper(),))


def _stated_letter(statement: Statement) -> Extraction | None:
    if match := _AT_ONCE.match(statement.tail):
        return _letter(match[1] or match[2] or match[3])
    sentence = "" if statement.label else first_sentence(statement.tail)
    return next((_letter(match[1]) for pattern in _LATER if (match := pattern.search(sentence))), None)


_CHOICE_MARK = re.compile(r"\(([A-E])\)")


def _choices(instruction: str) -> dict[str, str]:
    """Return the choices after "Answer Choices:" by letter; none where they are not (A), (B), ... in order."""
    _, mark, listed = instruction.rpartition("Answer Choices:")
    parts = _CHOICE_MARK.split(normalize(listed)) if mark else []
    letters, values = parts[1::2], parts[2::2]
    return dict(zip(letters, values, strict=True)) if "".join(letters) == _LETTERS[: len(letters)] else {}


def _choice_of_value(statement: Statement, choices: dict[str, str]) -> Extraction | None:
    """Find the one choice that reads like the statement, or whose only number is the stated one."""
    sentence = first_sentence(statement.tail)
    same = [letter for letter, value in choices.items() if _bare(value) and _bare(value) == _bare(sentence)]
    number = stated_number(statement)
    if not same and number and not number.undecided:
        for letter, value in choices.items():
            values = numbers(value)
            if len(values) == 1 and is_correct(number.extraction, values[0].extraction.candidates[0]):
                same.append(letter)
    if len(same) != 1:
        return None
    return Extraction(f"{same[0]} ({number.extraction.text if number else sentence.strip()})", (same[0],))


def _bare(value: str) -> str:
    return re.sub(r"[\s,]+", "", value).casefold().strip(".")
