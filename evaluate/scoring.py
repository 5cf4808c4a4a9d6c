"""Scores of a prediction file under a suite's two rules, with every verdict kept."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluate.registry import suite_named, suite_of_file
from evaluate.rows import Row, read_rows
from evaluate.suite import Found, Program, Rule, Suite

if TYPE_CHECKING:  # most suites run nothing
    from evaluate.sandbox import Sandbox

Z_95 = 1.959963984540054  # two-sided 95 % of a normal distribution


def wilson_half_width(share: float, rows: int) -> float:
    """Half the width of the 95 % Wilson interval for a share (0 to 1) seen over `rows` rows, as a share."""
    z2 = Z_95**2
    return Z_95 / (1 + z2 / rows) * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2))


@dataclass(frozen=True)
class Verdict:
    """What a rule found in one text, None where it found nothing, and whether that is right. why: of a program that was
    run, "passed" or why not."""

    found: Found | None
    right: bool
    why: str = ""


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


def pass_at(k: int, samples: int, passed: int) -> float:
    """The probability (0 to 1) that one of k samples passes, drawn from these without replacement: the unbiased
    estimate of pass@k, 1 - C(samples - passed, k) / C(samples, k)."""
    assert 0 < k <= samples and 0 <= passed <= samples
    return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


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

    @property
    def same_samples(self) -> bool:
        """Every row has as many samples as the others."""
        return len({len(row.row.texts) for row in self.rows}) == 1

    def pass_at(self, rule: str) -> dict[int, float]:
        """pass@k in percent, the mean over rows, for each k of 1, 5, 10 that the samples allow; k above 1 needs as many
        samples in every row. rule: "published" or "robust"."""
        counts = [(len(row.row.texts), sum(one.right for one in getattr(row, rule))) for row in self.rows]
        most = min(samples for samples, _ in counts) if self.same_samples else 1
        return {
            k: 100 * math.fsum(pass_at(k, *count) for count in counts) / len(counts) for k in (1, 5, 10) if k <= most
        }


def score_file(path: str | Path, suite: Suite | str | None = None, sandbox: "Sandbox | None" = None) -> Score:
    """Score a prediction file. suite: a suite or its name; None takes it from the file's name (OUT/AddSub.jsonl).
    sandbox: where to run the programs of HumanEval and MBPP; without one, these are refused before the file is read.
    ValueError (bad input, naming file, line and field) and OSError."""
    if suite is None:
        suite = suite_of_file(path)
    elif isinstance(suite, str):
        suite = suite_named(suite)
    if suite.program and sandbox is None:
        raise ValueError(f"{suite.name} runs generated code: allow it by score_file(path, sandbox=Sandbox())")
    rows = read_rows(path)
    answers = [_answer(suite, row, path) for row in rows]
    rules = (suite.published, suite.robust)
    found = {rule: [[rule.extract(text, row.fields) for text in row.texts] for row in rows] for rule in rules}
    judge = _compare
    if suite.program and sandbox:
        both = [one for rule in rules for one in zip(found[rule], answers, strict=True)]
        judge = _run({suite.program(one, answer) for samples, answer in both for one in samples if one}, suite, sandbox)

    def verdicts(rule: Rule, place: int) -> tuple[Verdict, ...]:
        return tuple(judge(rule, one, answers[place]) if one else Verdict(None, False) for one in found[rule][place])

    judged = [JudgedRow(row, *(verdicts(rule, place) for rule in rules)) for place, row in enumerate(rows)]
    return Score(suite, str(path), judged)


def _answer(suite: Suite, row: Row, path: str | Path) -> Any:
    """What the row's texts are compared with; ValueError names the field that does not tell."""
    try:
        if suite.program:
            return suite.read_answer(row.fields)
        if "answer" not in row.fields:
            raise ValueError("field 'answer' is missing")
        try:
            return suite.read_answer(row.fields["answer"])
        except ValueError as error:
            raise ValueError(f"field 'answer': {suite.name} expects {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {row.place}: {error}") from None


_Judge = Callable[[Rule, Found, Any], Verdict]


def _compare(rule: Rule, found: Found, answer: Any) -> Verdict:
    assert rule.right is not None
    return Verdict(found, rule.right(found, answer))


def _run(programs: set[Program], suite: Suite, sandbox: "Sandbox") -> _Judge:
    """The judge that knows how each of the programs ended, once all have been run."""
    order = list(programs)
    outcomes = dict(zip(order, sandbox.run(order), strict=True))

    def judge(rule: Rule, found: Found, answer: Any) -> Verdict:
        assert suite.program is not None
        outcome = outcomes[suite.program(found, answer)]
        return Verdict(found, outcome.passed, outcome.why)

    return judge
