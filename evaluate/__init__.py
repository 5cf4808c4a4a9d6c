"""Scoring of prediction files. `python -m evaluate --help` is the command line; from Python:

    from evaluate import TASKS, score_file
    score = score_file("OUT/AddSub.jsonl")
    score.published.percent, score.robust.percent

A task whose answers are programs runs them: `score_file("OUT/HumanEval.jsonl", sandbox=Sandbox())`.
"""

from evaluate.sandbox import Program, Sandbox
from evaluate.scoring import score_file
from evaluate.tasks import TASKS

__all__ = ["TASKS", "Program", "Sandbox", "score_file"]
