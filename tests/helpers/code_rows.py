"""Prediction files for the tests of `evaluate`, with small problems in the formats of HumanEval and MBPP."""

import json
from pathlib import Path
from typing import Any

import pytest

from evaluate.__main__ import main

DATA = Path(__file__).resolve().parent.parent / "data"
# Small problems, made for these tests, in the formats of the two suites
PROBLEMS, MBPP = (json.loads((DATA / "code_suites" / f"{name}.json").read_text()) for name in ("HumanEval", "MBPP"))


def predicted(problem: dict[str, Any], generate: str | list[str]) -> dict[str, Any]:
    return problem | {"instruction": problem.get("prompt", ""), "input": "", "output": "", "generate": generate}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(answer: Any, generate: Any, **others: Any) -> dict[str, Any]:
    return {"instruction": "How many?", "input": "", "output": "", "answer": answer, "generate": generate} | others


def answers(name: str) -> list[Any]:
    """Rows of tests/data/answers: a text and what a person (a rule) reads as its answer, None for nothing."""
    sections = json.loads((DATA / "answers" / f"{name}.json").read_text(encoding="utf-8"))
    return [row for rows in sections.values() for row in rows]


def refusal(capsys: pytest.CaptureFixture[str], status: int, *argv: object, suite: str | None = None) -> str:
    """What a command that must fail with that status says on stderr."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in argv], suite)
    out, err = capsys.readouterr()
    assert stopped.value.code == status
    assert out == "" and err.startswith("error: ") and err.count("error: ") == 1
    return err
