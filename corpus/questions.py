"""What a row asks, in a form in which two rows can be compared: words, numbers and options, without what all rows of a
suite have in common."""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Gram = tuple[str, ...]
NUMBER = "#"  # stands for every number of a question

# How the suites' instructions begin and end; none of it belongs to the question.
_LEAD = re.compile(r"^\s*Please (?:choose the correct|answer the following question)[^:\n]*:", re.I)
_FORMAT = re.compile(r"\s*Answer format:[\s\w/]*$", re.I)
# "Answer1: ... Answer2: ...", and AQuA's "Answer Choices: (A) ... (B) ..."
_NUMBERED = re.compile(r"(?:^|\s)(?:Answer|Solution|Ending|Option)\s?[1-9]\s?:", re.I)
_LETTERED = re.compile(r"\b(?:Answer Choices|Options)\s?:(?=\s*\(?[A-E]\))", re.I)
_LETTER = re.compile(r"(?:^|\s)\(?[A-E]\)")

# Numbers, words, and the signs that make another problem of the same numbers; a minus only before a number and not
# inside a word.
_NUMBERS = r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+"
_SIGNS = r"[+*/=<>^×÷√]|(?<![^\W\d_])[-−](?=\s?\d)"
_TOKEN = re.compile(rf"{_NUMBERS}|[^\W\d_]+|{_SIGNS}")
_SPELLED = "two three four five six seven eight nine ten eleven twelve".split()
_NUMBER_WORDS = {word: str(value) for value, word in enumerate(_SPELLED, 2)}
ONE = "one"  # a number in "one apple" and none in "each one"

# Words that a short question may lack and still be the same.
_SMALL = frozenset(
    "a an the this that these those some any of in on at to for from by with into as and or if than then so also "
    "is are was were be been being am do does did done has have had having can could will would shall should may "
    "might must it its he his him she her they their them you your we our i my me there here what which who whom "
    "whose s t".split()
)


@dataclass(frozen=True)
class Question:
    """words: what is asked, each number as NUMBER. numbers: the numbers behind these, in order. options: the words of
    each answer to choose from, sorted, with their numbers."""

    words: tuple[str, ...]
    numbers: tuple[str, ...]
    options: tuple[tuple[str, ...], ...] = ()

    @property
    def key(self) -> tuple:
        """Equal for questions that are the same but for case, punctuation, spacing and the order of the options."""
        return self.words, self.numbers, self.options

    @property
    def content(self) -> set[str]:
        """Its words that say what it is about."""
        return {word for word in self.words if word not in _SMALL and word != NUMBER}

    @property
    def amounts(self) -> Counter[str]:
        """Its numbers that a question has to share to be the same."""
        return Counter(number for number in self.numbers if number != ONE)

    def has_amounts(self, amounts: Counter[str]) -> bool:
        return amounts <= Counter("1" if number == ONE else number for number in self.numbers)

    def grams(self, n: int) -> set[Gram]:
        """The runs of `n` words of the question; all of it where it is shorter."""
        return _grams(self.words, n)

    def option_grams(self, n: int) -> set[Gram]:
        """The same of its options, none across two of them."""
        return {gram for option in self.options for gram in _grams(option, n)}


def question_text(row: Mapping[str, Any]) -> str | None:
    """What a row asks: its instruction and input, or the field that GSM8K, HumanEval and MBPP have in their place. That
    field comes first where a row has a task's id: the instruction made of it holds more than the question."""
    asked = [f"{row['instruction']}\n{row.get('input') or ''}"] if isinstance(row.get("instruction"), str) else []
    others = [row[name] for name in ("question", "prompt", "text") if isinstance(row.get(name), str)]
    texts = others + asked if "task_id" in row else asked + others
    return texts[0].strip() if texts else None


def parse_question(text: str) -> Question:
    """A question from its text."""
    text = _FORMAT.sub("", _LEAD.sub("", text, count=1))
    asked, options = _split(text)
    words, numbers = [], []
    for word in _words(asked):
        if word == ONE or _is_number(word):
            numbers.append(word)
            word = NUMBER
        words.append(word)
    return Question(tuple(words), tuple(numbers), tuple(sorted(tuple(_words(option)) for option in options)))


def _split(text: str) -> tuple[str, list[str]]:
    """The question and its options."""
    lettered = _LETTERED.search(text)
    if lettered:
        return text[: lettered.start()], _LETTER.split(text[lettered.end() :])[1:]
    asked, *options = _NUMBERED.split(text)
    return asked, options


def _words(text: str) -> list[str]:
    found = _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())
    return [_number(word) if _is_number(word) else _NUMBER_WORDS.get(word, word) for word in found]


def _is_number(word: str) -> bool:
    return word[0] in ".0123456789"


def _number(text: str) -> str:
    """One spelling of each number: 1,450 is 1450, 5.0 is 5, 0.5 is .5."""
    text = text.replace(",", "")
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return text.lstrip("0") or "0"


def _grams(words: tuple[str, ...], n: int) -> set[Gram]:
    if len(words) <= n:
        return {words} if words else set()
    return set(zip(*(words[i:] for i in range(n)), strict=False))
