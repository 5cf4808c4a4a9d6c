"""Where a text states its final answer: shared by the robust metrics of all tasks that are answered in words.

Every pattern is bounded, so that the time to read a text is linear in its length.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

# The template's next problem, which a model that misses its end of text runs on into. Four hashes are GSM8K's answer.
_RUN_ON = re.compile(r"(?<!#)###(?!#)|Below is an instruction")

_VERB = r"\b(?:is|was|are|equals|(?:would|will|should|must) be|comes (?:out )?to)\b *:?"
_ABOUT = r"[^.:=\n]{0,80}?"  # "The answer to the question" before " is"
_NO_STATEMENT = r"(?! *(?:not|worth)\b)"
_ANSWER = r"\b(?:answer|(?:correct|right|best) (?:option|choice))\b"
_MARKS = (  # the more deliberate form wins over the others; within one form the first wins, since a run-on follows
    re.compile(rf"\\(?:boxed|fbox)\b|(?<!#)####(?!#)|\bfinal answer\b{_ABOUT}(?:{_VERB}|[:=]){_NO_STATEMENT}", re.I),
    re.compile(rf"{_ANSWER}{_ABOUT}{_VERB}{_NO_STATEMENT}", re.I),
    re.compile(rf"{_ANSWER}(?: ?\([^)\n]{{0,40}}\))? *[:=]", re.I),
)
_NO_FINAL_ANSWER = re.compile(r"\b(?:to|each|every|per|any|an|other|wrong|incorrect)(?: correct)? $", re.I)
_TAIL = re.compile(r"\s{0,20}([^\n]{0,200})")
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$|[A-Z])")


@dataclass(frozen=True)
class Statement:
    """A statement of a final answer.

    tail: what follows "The answer is" in its line, or stands in the box. label: whether it is a bare "Answer:" or
    "####", which may also head a whole solution, so that only what follows at once counts.
    """

    tail: str
    label: bool


def first_sentence(text: str) -> str:
    return _SENTENCE_END.split(text, maxsplit=1)[0]


def truncate_run_on(text: str, run_on: re.Pattern[str] = _RUN_ON) -> str:
    """Cut a text at the first match of `run_on` ("### ", or the template's first words) with something before it."""
    for match in run_on.finditer(text):
        if text[: match.start()].strip():
            return text[: match.start()]
    return text


def statements(text: str) -> Iterator[Statement]:
    """Yield the statements of a final answer in a text that `normalize` returned, the one to believe first."""
    for rank, mark in enumerate(_MARKS):
        for match in mark.finditer(text):
            if _NO_FINAL_ANSWER.search(text, max(0, match.start() - 20), match.start()):
                continue
            tail = _TAIL.match(text, match.end())
            assert tail is not None
            boxed = match[0].startswith("\\") and tail[1].startswith("{")
            yield Statement(_in_braces(tail[1]) if boxed else tail[1], label=rank == 2 or match[0] == "####")


def _in_braces(text: str) -> str:
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:position]
    return text[1:]


_SAME_CHARACTER = str.maketrans("\u2212\u2013\ufe63\uff0d\u00a0\u202f\u2009", "----   ")  # minus signs, special spaces
_REPLACED = (
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,!;:]"), ""),
    (re.compile(r"\\([$%#&_])"), r"\1"),
    (re.compile(r"\\(?:left|right|displaystyle)\b"), ""),
    (re.compile(r"\\(?:times|cdot)\b"), "×"),
    (re.compile(r"\\approx\b|[≈≃]"), "="),
    (re.compile(r"\\(?:text[a-z]{0,6}|math[a-z]{0,6}) ?\{([^{}]{0,200})\}"), r" \1 "),
    (re.compile(r"(?<=\d)\\[dt]?frac(?=\{)"), r" \\frac"),
    (re.compile(r"\\[dt]?frac\{ ?(-?[\d.,]{1,40}) ?\}\{ ?([\d.,]{1,40}) ?\}"), r"\1/\2"),
    (re.compile(r"\\[()\[\]]|\*\*|`"), " "),
    (re.compile(r"(?<!\w)_{1,2}(?=[\w$(-])|_{1,2}(?!\w)"), " "),
    (re.compile(r"(?<=-) ?[$€£¥₹]"), ""),
    (re.compile(r"[$€£¥₹]"), " "),
)
_FRACTION_CHARACTER = re.compile("[¼½¾⅐-⅞]")


def normalize(text: str) -> str:
    """Return a text without run-on, Markdown emphasis, LaTeX wrappers and currency signs.

    Writes "½" as "1/2" and every minus sign as "-".
    """
    text = _FRACTION_CHARACTER.sub(_spell_fraction, truncate_run_on(text).translate(_SAME_CHARACTER))
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return text


def _spell_fraction(match: re.Match[str]) -> str:
    fraction = unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/")
    follows_digit = match.string[match.start() - 1 : match.start()].isdigit()
    return f" {fraction}" if follows_digit else fraction
