"""Scoring of prediction files, standard library only: `python -m evaluate --help`, or from Python

    from evaluate import SUITES, score_file
    score = score_file("OUT/AddSub.jsonl")
    score.published.percent, score.robust.percent

and of a suite whose answers are programs, which are run: `score_file("OUT/HumanEval.jsonl", sandbox=Sandbox())`.
The names load on first use: a suite's module must not be imported before `python -m evaluate.<suite>` runs it.
"""

from typing import Any

__all__ = ["SUITES", "Program", "Sandbox", "score_file"]


def __getattr__(name: str) -> Any:
    if name == "SUITES":
        from evaluate.registry import SUITES

        return SUITES
    if name == "score_file":
        from evaluate.scoring import score_file

        return score_file
    if name == "Sandbox":
        from evaluate.sandbox import Sandbox

        return Sandbox
    if name == "Program":
        from evaluate.suite import Program

        return Program
    raise AttributeError(f"module 'evaluate' has no attribute {name!r}")
