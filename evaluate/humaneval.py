"""HumanEval: functions in Python, to be written from their signature and docstring, and run against tests.

python -m evaluate.humaneval --predict_file OUT/HumanEval.jsonl --allow_code_execution
"""

from typing import Any

from evaluate import programs
from evaluate.rows import text_of
from evaluate.suite import Found, Program, Rule, Suite


def read_problem(fields: dict[str, Any]) -> tuple[str, str]:
    """(the name of the function, the tests: a function `check` of the candidate)."""
    text_of(fields, "prompt")
    name = text_of(fields, "entry_point")
    if not name.isidentifier():
        raise ValueError(f"field 'entry_point': expected the name of a function, got {name[:60]!r}")
    return name, text_of(fields, "test")


def program(found: Found, problem: tuple[str, str]) -> Program:
    name, tests = problem
    return Program(found.readings[0], (tests, f"check({name})"), (name,))


def _published(text: str, row: dict[str, Any]) -> Found | None:
    return programs.published(text, row["prompt"], row["entry_point"])


def _robust(text: str, row: dict[str, Any]) -> Found | None:
    return programs.robust(text, row["prompt"], row["entry_point"])


SUITE = Suite(
    "HumanEval",
    problems=164,
    family="code",
    read_answer=read_problem,
    published=Rule(_published),
    robust=Rule(_robust),
    program=program,
)

if __name__ == "__main__":
    from evaluate.command import main

    main(SUITE)
