"""Scores of a prediction file under a task's two rules, with the score of every text kept."""

import math
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

from evaluate.rows import Row, read_rows
from evaluate.sandbox import Sandbox
from evaluate.statements import Extraction
from evaluate.tasks import Task, task_named, task_of_file

RULES = ("published", "robust")
Z_95 = 1.959963984540054  # two-sided 95 % of a normal distribution


def wilson_half_width(share: float, rows: int) -> float:
    """Return half the width of the 95 % Wilson interval for a share (0 to 1) over `rows` rows, as a share."""
    z2 = Z_95**2
    return Z_95 / (1 + z2 / rows) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2))


def pass_at(k: int, samples: int, passed: int) -> float:
    """Return the unbiased estimate of pass@k, 1 - C(samples - passed, k) / C(samples, k).

    It is the chance (0 to 1) that one of k samples passes, drawn from these without replacement.
    """
    assert 0 < k <= samples and 0 <= passed <= samples
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


@dataclass(frozen=True)
class SampleScore:
    """What a rule took from one text, None where it found no answer, and whether that is correct.

    why: of a program that was run, "passed" or why it failed.
    """

    extraction: Extraction | None
    is_correct: bool
    why: str = ""


@dataclass(frozen=True)
class ScoredRow(Row):
    """A row with its scores under both rules, one per sample."""

    published: tuple[SampleScore, ...]
    robust: tuple[SampleScore, ...]

    @property
    def wrong(self) -> bool:
        """Whether some sample is wrong under some rule."""
        return not all(score.is_correct for score in self.published + self.robust)


@dataclass(frozen=True)
class RuleScore:
    """A file's score under one rule.

    percent: mean over rows, each the mean over its samples. half_width: of the 95 % Wilson interval, in percentage
    points. missing: samples in which the rule saw no answer (they count as wrong).
    """

    percent: float
    half_width: float
    missing: int

    @classmethod
    def of(cls, rows: list[tuple[SampleScore, ...]]) -> "RuleScore":
        share = math.fsum(sum(score.is_correct for score in row) / len(row) for row in rows) / len(rows)
        missing = sum(score.extraction is None for row in rows for score in row)
        return cls(100 * share, 100 * wilson_half_width(share, len(rows)), missing)


@dataclass(frozen=True)
class Score:
    """The scores of one prediction file; `rows` holds the score of every text beside it."""

    task: Task
    path: str
    rows: list[ScoredRow]

    @cached_property
    def published(self) -> RuleScore:
        return RuleScore.of([row.published for row in self.rows])

    @cached_property
    def robust(self) -> RuleScore:
        return RuleScore.of([row.robust for row in self.rows])

    @property
    def samples(self) -> list[int]:
        """How many samples each row has."""
        return [len(row.texts) for row in self.rows]

    def pass_at(self, rule: str) -> dict[int, float]:
        """Return pass@k in percent, the mean over rows, for each k of 1, 5, 10 that the samples allow.

        A k above 1 needs as many samples in every row. rule: "published" or "robust".
        """
        passed = [sum(score.is_correct for score in getattr(row, rule)) for row in self.rows]
        most = self.samples[0] if len(set(self.samples)) == 1 else 1
        shares = {k: map(partial(pass_at, k), self.samples, passed) for k in (1, 5, 10) if k <= most}
        return {k: 100 * math.fsum(share) / len(passed) for k, share in shares.items()}


def score_file(path: str | Path, task: Task | str | None = None, sandbox: Sandbox | None = None) -> Score:
    """Score a prediction file.

    task: a task or its name; None takes it from the file's name (OUT/AddSub.jsonl). sandbox: where the programs of
    HumanEval and MBPP are run; without one, these are refused before the file is read. Raises ValueError (bad input,
    naming file, line and field) and OSError.
    """
    if not isinstance(task, Task):
        task = task_of_file(path) if task is None else task_named(task)
    if task.runs_code and sandbox is None:
        raise ValueError(f"{task.name} runs generated code: allow it by score_file(path, sandbox=Sandbox())")
    rows = read_rows(path, task.answer_of)
    extractions = [[[getattr(task, rule)(text, row.fields) for text in row.texts] for rule in RULES] for row in rows]
    outcomes = {}
    if task.runs_code and sandbox:
        programs = list({taken.candidates[0]: None for taken in chain(*chain(*extractions)) if taken})
        outcomes = dict(zip(programs, sandbox.run(programs), strict=True))

    def score(extraction: Extraction | None, answer: Any) -> SampleScore:
        if extraction is None:
            return SampleScore(None, False)
        if task.runs_code:
            outcome = outcomes[extraction.candidates[0]]
            return SampleScore(extraction, outcome.passed, outcome.why)
        return SampleScore(extraction, extraction.is_correct(answer))

    scored = []
    for row, by_rule in zip(rows, extractions, strict=True):
        published, robust = (tuple(score(taken, row.answer) for taken in samples) for samples in by_rule)
        scored.append(ScoredRow(**vars(row), published=published, robust=robust))
    return Score(task, str(path), scored)
