"""What a suite is: its name, its size, how its answers are read, and its two rules of scoring."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Found:
    """What a rule took from a text as its answer.

    text: as written, for people to look at. readings: the values it can mean, each compared with the row's answer
    ("2 dozen" is 2 or 24); of a program just one, its sources. tolerance: how far a reading may lie from a number.
    """

    text: str
    readings: tuple[Any, ...]
    tolerance: float = 0.0


@dataclass(frozen=True)
class Rule:
    """extract(text, row) finds the answer in a generated text, None where there is none; `row` is the prediction row.
    right(found, answer) compares it with what the suite's `read_answer` returned; a program is run to tell."""

    extract: Callable[[str, dict[str, Any]], Found | None]
    right: Callable[[Found, Any], bool] | None = None


@dataclass(frozen=True)
class Program:
    """Sources in Python. candidate: run one after another in one module. tests: run after it, in a copy of its
    variables without those that hide a built-in function, but for `names`, which the tests are about. Passed: no error
    up to the last test's end."""

    candidate: tuple[str, ...]
    tests: tuple[str, ...]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """name: the paper's spelling. problems: rows in the published test file. read_answer: a row's "answer" as the
    rules compare it, ValueError saying what was expected. published, robust: the two scores, always both. family: the
    suites that the paper averages together. aliases: other names that choose it, in any case. program: only of a suite
    whose answers are programs: what to run, of what was found and what `read_answer` made of the row's fields, all of
    them."""

    name: str
    problems: int
    read_answer: Callable[[Any], Any]
    published: Rule
    robust: Rule
    family: str = "math"
    aliases: tuple[str, ...] = ()
    program: Callable[[Found, Any], Program] | None = None

    @property
    def module(self) -> str:
        """The name of its module in `evaluate`."""
        return self.name.lower().replace("-", "_")
