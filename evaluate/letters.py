"""Suites whose answers are choices A to E: the two rules."""

import re
from typing import Any

from evaluate.final import Statement, plain, statements
from evaluate.numeric import numbers, right, stated_number
from evaluate.rows import shorten
from evaluate.suite import Found, Rule

_LETTERS = "ABCDE"


def read_answer(value: Any) -> str:
    """A row's "answer": one capital letter A to E."""
    if not isinstance(value, str) or len(value) != 1 or value not in _LETTERS:
        raise ValueError(f"one letter A to E, got {shorten(value)}")
    return value


def _same_letter(found: Found, answer: str) -> bool:
    return answer in found.readings


def _letter(letter: str) -> Found:
    return Found(letter.upper(), (letter.upper(),))


_PUBLISHED_LETTER = re.compile("[A-E]")


def published_letter(text: str, row: dict[str, Any]) -> Found | None:
    """The first capital A to E anywhere, even inside a word: comparable with the paper's tables."""
    match = _PUBLISHED_LETTER.search(text)
    return _letter(match[0]) if match else None


# An article or the subject of a sentence that explains, not the choice (A): "A" before a word in lower case, but for
# the words that go on after a stated choice.
_ARTICLE = r"(?!(?<=A) (?!(?:because|since|as|and|or|is|which|with|for|by|so)\b)[a-z])"
_STAND_ALONE = re.compile(rf"(?<![\w'’°])([A-E]){_ARTICLE}(?![\w'’])")
_AT_ONCE = re.compile(
    rf"[\W_]*(?:(?:the|option|choice|letter|answer|alternative)\b[\W_]*)*(?:([A-E])(?![\w'’]){_ARTICLE}"
    r"|(?<=[(\[{])([a-e])(?=[)\]}])|([a-e])(?=\s*$|[).,:;]))"
)
_BRACKETED = re.compile(r"(?<!\w)[(\[{] ?([A-Ea-e]) ?[)\]}](?!\w)")
_NAMED = re.compile(r"\b(?i:option|choice|alternative) ?\(?([A-E])\b")
_CALLED_RIGHT = re.compile(r"(?<![\w'’°])([A-E])\b\)? is (?:the )?(?:correct|right|best|answer)\b")
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$|[A-Z])")
_LIST = re.compile(r"(?<![\w'’°(])\(?[A-E]\)?(?:, ?\(?[A-E]\)?){0,4},? (?:or|to) \(?[A-E](?:\)|(?![\w'’)]))")


def robust_letter(text: str, row: dict[str, Any]) -> Found | None:
    """The stated letter; else the stated value, if it is that of one choice only; else the last letter alone. "A or B"
    is no choice."""
    text = _LIST.sub(" ", plain(text))
    stated = list(statements(text))
    for statement in stated:
        if letter := _stated_letter(statement):
            return _letter(letter)
    if called_right := _CALLED_RIGHT.search(text):
        return _letter(called_right[1])
    choices = _choices(row.get("instruction", ""))
    for statement in stated:
        if found := _choice_of_value(statement, choices):
            return found
    letters = _STAND_ALONE.findall(text)
    return _letter(letters[-1]) if letters else _whole_text(text.strip(), choices)


PUBLISHED = Rule(published_letter, _same_letter)
ROBUST = Rule(robust_letter, _same_letter)


def _whole_text(text: str, choices: dict[str, str]) -> Found | None:
    """The answer of a text that is nothing but its answer: "d", "(d) 62 m", "62 m"."""
    if len(text) > 80 or "\n" in text:
        return None
    statement = Statement(text, label=True)
    letter = _stated_letter(statement)
    return _letter(letter) if letter else _choice_of_value(statement, choices)


def _sentence(statement: Statement) -> str:
    return _SENTENCE_END.split(statement.tail, maxsplit=1)[0]


def _stated_letter(statement: Statement) -> str | None:
    if match := _AT_ONCE.match(statement.tail):
        return match[1] or match[2] or match[3]
    if statement.label:
        return None
    sentence = _sentence(statement)
    match = _BRACKETED.search(sentence) or _NAMED.search(sentence)
    return match[1] if match else None


_CHOICE_MARK = re.compile(r"\(([A-E])\)")


def _choices(instruction: str) -> dict[str, str]:
    """The choices after "Answer Choices:", by letter; none where they are not (A), (B), ... in order."""
    _, found, listed = instruction.rpartition("Answer Choices:")
    parts = _CHOICE_MARK.split(plain(listed)) if found else []
    letters, values = parts[1::2], parts[2::2]
    return dict(zip(letters, values, strict=True)) if "".join(letters) == _LETTERS[: len(letters)] else {}


def _choice_of_value(statement: Statement, choices: dict[str, str]) -> Found | None:
    """The one choice that reads like the statement, or whose only number is the stated one."""
    sentence = _sentence(statement)
    same = [letter for letter, value in choices.items() if _bare(value) and _bare(value) == _bare(sentence)]
    number = stated_number(statement)
    if not same and number:
        for letter, value in choices.items():
            values = list(numbers(value))
            if len(values) == 1 and right(number.found, values[0].found.readings[0]):
                same.append(letter)
    if len(same) != 1:
        return None
    return Found(f"{same[0]} ({number.found.text if number else sentence.strip()})", (same[0],))


def _bare(value: str) -> str:
    return re.sub(r"[\s,]+", "", value).casefold().strip(".")
