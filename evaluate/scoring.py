"""Scores of a prediction file under a suite's two rules, with every verdict kept."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from evaluate.registry import suite_named, suite_of_file
from evaluate.rows import Row, read_rows
from evaluate.suite import Found, Rule, Suite

Z_95 = 1.959963984540054  # two-sided 95 % of a normal distribution


def wilson_half_width(share: float, rows: int) -> float:
    """Half the width of the 95 % Wilson interval for a share (0 to 1) seen over `rows` rows, as a share."""
    z2 = Z_95**2
    return Z_95 / (1 + z2 / rows) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2))


@dataclass(frozen=True)
class Verdict:
    """What a rule found in one text, None where it found nothing, and whether that is right."""

    found: Found | None
    right: bool


@dataclass(frozen=True)
class JudgedRow:
    """A row with its verdicts under both rules, one per sample."""

    row: Row
    published: tuple[Verdict, ...]
    robust: tuple[Verdict, ...]

    @property
    def wrong(self) -> bool:
        """Some sample is wrong under some rule."""
        return not all(verdict.right for verdict in self.published + self.robust)

    @property
    def disagree(self) -> bool:
        """The two rules differ about some sample."""
        return any(one.right != other.right for one, other in zip(self.published, self.robust, strict=True))


@dataclass(frozen=True)
class RuleScore:
    """percent: mean over rows, each the mean over its samples. half_width: of the 95 % Wilson interval, in percentage
    points. missing: samples in which the rule found no answer (they count as wrong)."""

    percent: float
    half_width: float
    missing: int

    @classmethod
    def of(cls, verdicts: list[tuple[Verdict, ...]]) -> "RuleScore":
        shares = [sum(verdict.right for verdict in samples) / len(samples) for samples in verdicts]
        share = math.fsum(shares) / len(shares)
        missing = sum(verdict.found is None for samples in verdicts for verdict in samples)
        return cls(100 * share, 100 * wilson_half_width(share, len(shares)), missing)


@dataclass(frozen=True)
class Score:
    """The scores of one prediction file; `rows` holds every verdict beside its text."""

    suite: Suite
    path: str
    rows: list[JudgedRow]

    @cached_property
    def published(self) -> RuleScore:
        return RuleScore.of([row.published for row in self.rows])

    @cached_property
    def robust(self) -> RuleScore:
        return RuleScore.of([row.robust for row in self.rows])

    @property
    def samples(self) -> int:
        return sum(len(row.row.texts) for row in self.rows)


def score_file(path: str | Path, suite: Suite | str | None = None) -> Score:
    """Score a prediction file. suite: a suite or its name; None takes it from the file's name (OUT/AddSub.jsonl).
    ValueError (bad input, naming file, line and field) and OSError."""
    if suite is None:
        suite = suite_of_file(path)
    elif isinstance(suite, str):
        suite = suite_named(suite)
    judged = []
    for row in read_rows(path):
        if "answer" not in row.fields:
            raise ValueError(f"{path}: {row.place}: field 'answer' is missing")
        try:
            answer = suite.read_answer(row.fields["answer"])
        except ValueError as error:
            raise ValueError(f"{path}: {row.place}: field 'answer': {suite.name} expects {error}") from None
        judged.append(JudgedRow(row, _judge(suite.published, row, answer), _judge(suite.robust, row, answer)))
    return Score(suite, str(path), judged)


def _judge(rule: Rule, row: Row, answer: object) -> tuple[Verdict, ...]:
    found = [rule.extract(text, row.fields) for text in row.texts]
    return tuple(Verdict(one, one is not None and rule.right(one, answer)) for one in found)
