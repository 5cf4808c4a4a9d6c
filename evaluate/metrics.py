"""What a task is scored by: a metric extracts an answer from a generated text and says whether it is correct."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Extraction:
    """What a metric took from a text as its answer.

    text: the answer as it is written, for people to read. candidates: the values that it can mean ("2 dozen" is 2 or
    24); a program has one, its sources. tolerance: how far a candidate may lie from a number.
    """

    text: str
    candidates: tuple[Any, ...]
    tolerance: float = 0.0


def is_candidate(extraction: Extraction, answer: Any) -> bool:
    return answer in extraction.candidates


@dataclass(frozen=True)
class Metric:
    """extract(text, row): the answer in a generated text, None where there is none; `row` is the prediction row.
    is_correct(extraction, answer): compares it with what the task's `read_answer` returned. Programs are run instead.
    """

    extract: Callable[[str, dict[str, Any]], Extraction | None]
    is_correct: Callable[[Extraction, Any], bool] = is_candidate


@dataclass(frozen=True)
class Program:
    """Sources in Python, and the tests that they must pass.

    candidate: run one after another in one module. tests: run after it, in a copy of its variables without those that
    hide a built-in function, except `names`, which the tests are about. seconds: of CPU time that it may take; None:
    the sandbox's limit. A program passes if nothing raises an error up to the end of the last test.
    """

    candidate: tuple[str, ...]
    tests: tuple[str, ...]
    names: tuple[str, ...] = ()
    seconds: float | None = None
