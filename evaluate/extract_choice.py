"""Tasks that are answered with a choice, A to E: the two metrics."""

import re
from typing import Any

from evaluate.answer_statements import Statement, first_sentence, normalize, statements
from evaluate.extract_number import is_correct, numbers, stated_number
from evaluate.metrics import Extraction, Metric
from evaluate.rows import shorten

_LETTERS = "ABCDE"


def read_answer(value: Any) -> str:
    """Read a row's "answer": one capital letter A to E."""
    if not isinstance(value, str) or len(value) != 1 or value not in _LETTERS:
        raise ValueError(f"one letter A to E, got {shorten(value)}")
    return value


_PUBLISHED_LETTER = re.compile("[A-E]")


def published_letter(text: str, row: dict[str, Any]) -> Extraction | None:
    """Take the first capital A to E anywhere, even inside a word: comparable with the paper's tables."""
    match = _PUBLISHED_LETTER.search(text)
    return _letter(match[0]) if match else None


# An article or the subject of a sentence that explains, not the choice (A): "A" before a word in lower case, except
# the words that follow a stated choice.
_ARTICLE = r"(?!(?<=A) (?!(?:because|since|as|and|or|is|which|with|for|by|so)\b)[a-z])"
_STAND_ALONE = re.compile(rf"(?<![\w'’°])([A-E]){_ARTICLE}(?![\w'’])")
_AT_ONCE = re.compile(
    rf"[\W_]*(?:(?:the|option|choice|letter|answer|alternative)\b[\W_]*)*(?:([A-E])(?![\w'’]){_ARTICLE}"
    r"|(?<=[(\[{])([a-e])(?=[)\]}])|([a-e])(?=\s*$|[).,:;]))"
)
_BRACKETED = re.compile(r"(?<!\w)[(\[{] ?([A-Ea-e]) ?[)\]}](?!\w)")
_NAMED = re.compile(r"\b(?i:option|choice|alternative) ?\(?([A-E])\b")
_CALLED_RIGHT = re.compile(r"(?<![\w'’°])([A-E])\b\)? is (?:the )?(?:correct|right|best|answer)\b")
_LIST = re.compile(r"(?<![\w'’°(])\(?[A-E]\)?(?:, ?\(?[A-E]\)?){0,4},? (?:or|to) \(?[A-E](?:\)|(?![\w'’)]))")


def robust_letter(text: str, row: dict[str, Any]) -> Extraction | None:
    """Take the stated letter; else the stated value, if only one choice has it; else the last letter that stands alone.
    "A or B" is no choice."""
    text = _LIST.sub(" ", normalize(text))
    stated = list(statements(text))
    for statement in stated:
        if letter := _stated_letter(statement):
            return _letter(letter)
    if called_right := _CALLED_RIGHT.search(text):
        return _letter(called_right[1])
    choices = _choices(row.get("instruction", ""))
    for statement in stated:
        if extraction := _choice_of_value(statement, choices):
            return extraction
    if letters := _STAND_ALONE.findall(text):
        return _letter(letters[-1])
    whole = Statement(text.strip(), label=True)  # "d", "(d) 62 m", "62 m"
    if len(whole.tail) > 80 or "\n" in whole.tail:
        return None
    letter = _stated_letter(whole)
    return _letter(letter) if letter else _choice_of_value(whole, choices)


PUBLISHED = Metric(published_letter)
ROBUST = Metric(robust_letter)


def _letter(letter: str) -> Extraction:
    return Extraction(letter.upper(), (letter.upper(),))


def _stated_letter(statement: Statement) -> str | None:
    if match := _AT_ONCE.match(statement.tail):
        return match[1] or match[2] or match[3]
    if statement.label:
        return None
    sentence = first_sentence(statement.tail)
    match = _BRACKETED.search(sentence) or _NAMED.search(sentence)
    return match[1] if match else None


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
    if not same and number:
        for letter, value in choices.items():
            values = list(numbers(value))
            if len(values) == 1 and is_correct(number.extraction, values[0].extraction.candidates[0]):
                same.append(letter)
    if len(same) != 1:
        return None
    return Extraction(f"{same[0]} ({number.extraction.text if number else sentence.strip()})", (same[0],))


def _bare(value: str) -> str:
    return re.sub(r"[\s,]+", "", value).casefold().strip(".")
