"""Answers that a report shows: of every test some that are right, wrong, and judged differently by the two rules.

Verdicts come from `evaluate`, by the rules of today; of tests that run programs, which a report does not, from the file
that `python -m evaluate ... --verdicts RUN/verdicts.jsonl` left in the run's folder.
"""

import json
from collections.abc import Iterable
from typing import Any, NamedTuple

from inspection.runs import RULES, Run, brief

VERDICTS = "verdicts.jsonl"
KINDS = ("right under both rules", "wrong under both rules", "the two rules differ")


class Sample(NamedTuple):
    """One answer. fields: (name, text) for a reader. verdicts: (rule, whether right, what it took and why)."""

    kind: str
    test: str
    row: int
    fields: list[tuple[str, str]]
    verdicts: list[tuple[str, bool, str]]


def read_samples(run: Run, per_kind: int) -> tuple[list[Sample], list[str]]:
    """The first samples of each kind of every test of a run; and notes on answers that could not be judged, or that
    today's rules score otherwise than scores.json."""
    from evaluate import score_file
    from evaluate.report import verdict_lines
    from evaluate.tasks import task_of_file

    samples, notes = [], []
    saved = _saved_verdicts(run, notes)
    for name, file in run.answers.items():
        try:
            task = task_of_file(file)
        except ValueError:
            notes.append(f"{file.name} is not named after a test, so its answers are not looked at")
            continue
        try:
            if task.program:
                lines = [line for line in saved if line.get("suite") == task.name]
                if not lines:
                    notes.append(f"no verdicts of {task.name}: a report runs no programs, {VERDICTS} can hold them")
            else:
                score = score_file(file, task)
                lines = [json.loads(line) for line in verdict_lines([score])]
                notes += _changed(run, task.name, {rule: getattr(score, rule).percent for rule in RULES})
        except (ValueError, OSError) as error:
            notes.append(f"the answers to {name} cannot be read: {str(error).replace(f'{run.path}/', '')}")
            continue
        every = [sample for line in lines for sample in _samples_of(line)]
        for kind in KINDS:
            samples += [sample for sample in every if sample.kind == kind][:per_kind]
    return samples, notes


def _changed(run: Run, test: str, percents: dict[str, float]) -> list[str]:
    """Notes on scores that scores.json lacks or has otherwise."""
    if not run.scores:
        return []
    recorded = next((scores for column, scores in run.scores.items() if column.startswith(f"{test} (")), None)
    if recorded is None:
        return [f"the answers to {test} are not in scores.json"]
    return [
        f"scores.json has {recorded[rule].percent:.1f} % for {test} ({rule}), its answers give {percent:.1f} % now"
        for rule, percent in percents.items()
        if abs(recorded[rule].percent - percent) > 0.05
    ]


def _saved_verdicts(run: Run, notes: list[str]) -> list[dict[str, Any]]:
    if not (run.path / VERDICTS).exists():
        return []
    try:
        lines = (run.path / VERDICTS).read_text(encoding="utf-8").splitlines()
        values = [json.loads(line) for line in lines if line.strip()]
    except (ValueError, OSError) as error:
        notes.append(f"{VERDICTS} cannot be read: {error}")
        return []
    return [value for value in values if isinstance(value, dict)]


def _samples_of(line: dict[str, Any]) -> Iterable[Sample]:
    """One sample per text of a row; none where the line is not as `evaluate` writes it."""
    columns = [line.get(name) for name in ("generate", *RULES)]
    columns = [column if isinstance(column, list) else [column] for column in columns]
    gold, row = ("task", "task_id") if "task_id" in line else ("right answer", "answer"), line.get("index")
    for text, *verdicts in zip(*columns, strict=False):
        if isinstance(text, str) and all(isinstance(verdict, dict) for verdict in verdicts):
            right = [verdict.get("right") is True for verdict in verdicts]
            kind = KINDS[0] if all(right) else KINDS[2] if any(right) else KINDS[1]
            fields = {"question": cut(line.get("instruction", ""), 1200), gold[0]: cut(line.get(gold[1]), 300)}
            judged = zip(RULES, right, map(_verdict, verdicts), strict=True)
            fields["answered"] = cut(text, 1500)
            yield Sample(
                kind, brief(line.get("suite"), 40), row if type(row) is int else -1, list(fields.items()), list(judged)
            )


def _verdict(verdict: dict[str, Any]) -> str:
    took = "found nothing" if verdict.get("found") is None else f"took {cut(verdict['found'], 300)}"
    return f"{took}, {cut(verdict['why'], 300)}" if verdict.get("why") else took


def cut(value: Any, length: int) -> str:
    """A text's first characters, with a note on how many more there are."""
    text = value if isinstance(value, str) else brief(value, 4000)
    more = len(text) - length
    return (text if more <= 0 else f"{text[:length]} ({more:,} more characters are not shown)").strip() or "(nothing)"
