"""Answers that a report shows: of every test some that are right, wrong, and judged differently by the two rules.

Verdicts come from `evaluate`, by the rules of today; of tests that run programs, which a report does not, from the file
that `python -m evaluate ... --verdicts RUN/verdicts.jsonl` left in the run's folder.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evaluate.report import verdict_lines
from evaluate.scoring import Score, score_file
from evaluate.tasks import task_of_file
from inspection.html import Table
from inspection.runs import RULES, Run, expecting
from moa.reading import read_rows

VERDICTS = "verdicts.jsonl"
KINDS = ("right under both rules", "wrong under both rules", "the two rules differ")


def read_samples(run: Run, per_kind: int) -> tuple[list[Table], list[str]]:
    """The first answers of each kind to every test of a run, a table each; and notes on answers that could not be
    judged, or that today's rules score otherwise than scores.json."""
    tables, notes = [], []
    for file in run.answers.values():
        try:
            task = task_of_file(file)
            if task.runs_code:
                samples = _saved_samples(file.with_name(VERDICTS), task.name)
            else:
                score = score_file(file, task)
                samples = [sample for line in verdict_lines([score]) for sample in _samples(json.loads(line))]
                notes += _changed(run, score)
            for kind in KINDS:
                tables += [table for other, table in samples if other == kind][:per_kind]
        except (ValueError, OSError) as error:
            notes.append(f"no answers of {file.name} are shown: {str(error).replace(f'{run.path}/', '')}")
    return tables, notes


def _changed(run: Run, score: Score) -> list[str]:
    """Notes on scores that scores.json lacks or has otherwise."""
    test = score.task.name
    recorded = [scores for column, scores in run.scores.items() if column.startswith(f"{test} (")]
    if run.scores and not recorded:
        return [f"the answers to {test} are not in scores.json"]
    pairs = [(rule, scores[rule].mean, getattr(score, rule).percent) for scores in recorded for rule in RULES]
    return [
        f"scores.json has {then:.1f} % for {test} ({rule}), its answers give {now:.1f} % now"
        for rule, then, now in pairs
        if abs(then - now) > 0.05
    ]


def _saved_samples(path: Path, test: str) -> list[tuple[str, Table]]:
    lines = [line for line in read_rows(path) if line.get("suite") == test] if path.exists() else []
    if not lines:
        raise ValueError(f"a report runs no programs, and {VERDICTS} has none of {test}")
    with expecting(path, "verdicts of `python -m evaluate --verdicts`"):
        return [sample for line in lines for sample in _samples(line)]


def _samples(line: dict[str, Any]) -> Iterator[tuple[str, Table]]:
    """Kind and table of each answer to a row."""
    columns = [line[name] if isinstance(line[name], list) else [line[name]] for name in ("generate", *RULES)]
    for text, *verdicts in zip(*columns, strict=True):
        right = [verdict["right"] for verdict in verdicts]
        kind = KINDS[0] if all(right) else KINDS[2] if any(right) else KINDS[1]
        rows = [["question", cut(line["instruction"], 1200)]]
        rows.append(["task", line["task_id"]] if "task_id" in line else ["right answer", cut(line["answer"], 300)])
        rows.append(["answered", cut(text, 1500)])
        rows += [[f"{rule} rule", _verdict(verdict)] for rule, verdict in zip(RULES, verdicts, strict=True)]
        yield kind, Table(f"{line['suite']}, row {line['index'] + 1}: {kind}", (), rows)


def _verdict(verdict: dict[str, Any]) -> str:
    took = "found nothing" if verdict["found"] is None else f"took {cut(verdict['found'], 300)}"
    why = f", {cut(verdict['why'], 300)}" if "why" in verdict else ""
    return f"{'✓ right' if verdict['right'] else '✗ wrong'}: {took}{why}"


def cut(value: Any, length: int) -> str:
    """A text's first characters, with a note on how many more there are."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    more = len(text) - length
    return (text if more <= 0 else f"{text[:length]} ({more:,} more characters are not shown)").strip() or "(nothing)"
