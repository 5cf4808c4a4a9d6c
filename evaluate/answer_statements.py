"""Find where a text states its final answer: for the robust metrics of all tasks answered in words.

Every pattern is bounded, so that the time to read a text is linear in its length.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

# The template's next problem, which a model that misses its end of text runs on into. Four hashes are GSM8K's answer.
_RUN_ON = re.compile(r"(?<!#)###(?!#)|Below is an instruction")


@dataclass(frozen=True)
class Statement:
    """A statement of a final answer.

    tail: what follows "The answer is" in its line, or stands in the box. label: whether it is a bare "Answer:" or
    "####", which may also head a whole solution, so that only what follows at once counts.
    """

    tail: str
    label: bool


class Form(NamedTuple):
    """A form of statement: `example` states 18. A lower rank is more deliberate and wins over a higher one."""

    rank: int
    label: bool
    pattern: str
    example: str


_ANSWER = r"\b(?:answer|(?:correct|right|best) (?:option|choice))\b"
_ABOUT = r"[^.:=\n]{0,80}?"  # "The answer to the question" before " is"
_VERB = r"\b(?:is|was|are|equals|(?:would|will|should|must) be|comes (?:out )?to)\b *:?"
_NO_STATEMENT = r"(?! *(?:not|worth)\b)"
FORMS = (
    Form(0, False, r"\\(?:boxed|fbox)\b", r"\boxed{18}"),
    Form(0, True, r"(?<!#)####(?!#)", "#### 18"),
    Form(0, False, rf"\bfinal answer\b{_ABOUT}(?:{_VERB}|[:=]){_NO_STATEMENT}", "Final answer: 18"),
    Form(1, False, rf"{_ANSWER}{_ABOUT}{_VERB}{_NO_STATEMENT}", "The best choice for her is 18"),
    Form(2, True, rf"{_ANSWER}(?: ?\([^)\n]{{0,40}}\))? *[:=]", "Answer (in eggs): 18"),
)
_COMPILED = [(form, re.compile(form.pattern, re.I)) for form in FORMS]
_NO_FINAL_ANSWER = re.compile(r"\b(?:to|each|every|per|any|an|other|wrong|incorrect)(?: correct)? $", re.I)
_TAIL = re.compile(r"\s{0,20}([^\n]{0,200})")
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$|[A-Z])")


def truncate_run_on(text: str, run_on: re.Pattern[str] = _RUN_ON) -> str:
    """Cut a text at the first match of `run_on` ("### ", or the template's first words) with something before it."""
    for match in run_on.finditer(text):
        if text[: match.start()].strip():
            return text[: match.start()]
    return text


def first_sentence(text: str) -> str:
    return _SENTENCE_END.split(text, maxsplit=1)[0]


def statements(text: str) -> Iterator[Statement]:
    """Yield the statements of a final answer in a text that `normalize` returned, the one to believe first.

    Of one rank the first wins, since a model may run on into another problem.
    """
    matches = [(form.rank, match.start(), form, match) for form, mark in _COMPILED for match in mark.finditer(text)]
    for _, start, form, match in sorted(matches, key=lambda each: each[:2]):
        if not _NO_FINAL_ANSWER.search(text, max(0, start - 20), start):
            tail = _TAIL.match(text, match.end())
            assert tail is not None
            boxed = match[0].startswith("\\") and tail[1].startswith("{")
            yield Statement(_in_braces(tail[1]) if boxed else tail[1], form.label)


def _in_braces(text: str) -> str:
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:position]
    return text[1:]
