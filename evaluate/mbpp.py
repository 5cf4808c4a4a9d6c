"""MBPP: short programs in Python, to be written from a sentence, and run against assertions.

python -m evaluate.mbpp --predict_file OUT/MBPP.jsonl --allow_code_execution
"""

import re
from dataclasses import dataclass
from typing import Any

from evaluate import programs
from evaluate.rows import text_of, texts_of
from evaluate.suite import Found, Program, Rule, Suite


@dataclass(frozen=True)
class Problem:
    """names: what the reference defines and the tests use, so that the candidate has to define it."""

    names: tuple[str, ...]
    setup: tuple[str, ...]
    tests: tuple[str, ...]


_DEFINED = re.compile(r"^(?:def|class) +(\w+)", re.M)


def read_problem(fields: dict[str, Any]) -> Problem:
    """The row's tests, and what runs before the candidate: "test_setup_code", "test_imports", whichever there is."""
    tests = texts_of(fields, "test_list")
    if not tests:
        raise ValueError("field 'test_list': expected at least one test, got an empty list")
    used = set(re.findall(r"\w+", "\n".join(tests)))
    names = [name for name in _DEFINED.findall(text_of(fields, "code")) if name in used]
    setup = [text_of(fields, "test_setup_code")] if "test_setup_code" in fields else []
    setup += texts_of(fields, "test_imports") if "test_imports" in fields else []
    return Problem(tuple(names), tuple(setup), tests)


def program(found: Found, problem: Problem) -> Program:
    return Program((*problem.setup, *found.readings[0]), problem.tests, problem.names)


def _name(row: dict[str, Any]) -> str | None:
    names = read_problem(row).names
    return names[-1] if names else None


def _published(text: str, row: dict[str, Any]) -> Found | None:
    return programs.published(text, "", _name(row))


def _robust(text: str, row: dict[str, Any]) -> Found | None:
    return programs.robust(text, "", _name(row))


SUITE = Suite(
    "MBPP",
    problems=500,
    family="code",
    read_answer=read_problem,
    published=Rule(_published),
    robust=Rule(_robust),
    program=program,
)

if __name__ == "__main__":
    from evaluate.command import main

    main(SUITE)
