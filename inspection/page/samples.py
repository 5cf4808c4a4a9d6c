"""The section of answers: some right and some wrong of every test, with what each rule took as the answer.

Verdicts come from `evaluate`, by the rules of today; of tests that run programs, which a report does not, from the file
that `python -m evaluate ... --verdicts RUN/verdicts.jsonl` left in the run's folder.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from evaluate import score_file
from evaluate.report import verdict_lines
from evaluate.tasks import task_of_file
from inspection.page.lines import Line, brief, scores_of
from inspection.page.markup import Html, Part, cut, el, folded
from inspection.runs import RULES, Run
from moa.reading import parse_json, read_text

VERDICTS = "verdicts.jsonl"
_KINDS = {
    "right": "right under both rules",
    "wrong": "wrong under both rules",
    "apart": "the two rules differ",
}
_MOST = {"instruction": 1200, "generate": 1500, "answer": 200, "found": 300, "why": 300}  # characters shown


class Sample(NamedTuple):
    """A line of verdicts, as `python -m evaluate --verdicts` writes it, for one of the row's texts."""

    kind: str
    suite: str
    row: int
    fields: dict[str, Any]
    text: str
    verdicts: dict[str, dict[str, Any]]


def look(run: Run, per_kind: int) -> tuple[list[Sample], list[str]]:
    """The first samples of each kind of every test of a run; and sentences on answers that could not be judged, or that
    today's rules score otherwise than scores.json."""
    found: list[Sample] = []
    notes: list[str] = []
    saved = _saved(run.path / VERDICTS, notes)
    for name, file in run.answers.items():
        if file.name == VERDICTS:
            continue
        try:
            suite = task_of_file(file)
        except ValueError:
            notes.append(f"{file.name} is not named after a test, so its answers are not looked at")
            continue
        try:
            if suite.program:
                lines = saved.get(suite.name, [])
                if not lines:
                    notes.append(f"no verdicts of {suite.name}: a report runs no programs, {VERDICTS} can hold them")
            else:
                score = score_file(file, suite)
                lines = [json.loads(line) for line in verdict_lines([score])]
                percents = {rule: getattr(score, rule).percent for rule in RULES}
                notes += _otherwise(run, suite.name, percents)
        except (ValueError, OSError) as error:
            notes.append(f"the answers to {name} cannot be read: {_without(run.path, str(error))}")
            continue
        found += _chosen(lines, per_kind)
    return found, notes


def _otherwise(run: Run, suite: str, percents: dict[str, float]) -> list[str]:
    recorded = [scores for column, scores in scores_of(run).items() if column.name == suite and not column.mean]
    if not recorded:
        return [f"the answers to {suite} are not in scores.json"] if run.scores is not None else []
    return [
        f"scores.json has {recorded[0][rule].percent:.1f} % for {suite} ({rule}), its answers give {percent:.1f} % now"
        for rule, percent in percents.items()
        if abs(recorded[0][rule].percent - percent) > 0.05
    ]


def _saved(path: Path, notes: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Lines of verdicts by test; empty where there is no such file."""
    found: dict[str, list[dict[str, Any]]] = {}
    if not path.exists():
        return found
    try:
        for number, line in enumerate(read_text(path).split("\n"), 1):
            value = parse_json(line, f"line {number}") if line.strip() else None
            if isinstance(value, dict) and isinstance(value.get("suite"), str):
                found.setdefault(value["suite"], []).append(value)
    except (ValueError, OSError) as error:
        notes.append(f"{path.name} cannot be read: {_without(path.parent, str(error))}")
    return found


def _chosen(lines: Iterable[dict[str, Any]], per_kind: int) -> list[Sample]:
    chosen: dict[str, list[Sample]] = {kind: [] for kind in _KINDS}
    for line in lines:
        for sample in _samples(line):
            if len(chosen[sample.kind]) < per_kind:
                chosen[sample.kind].append(sample)
    return [sample for samples in chosen.values() for sample in samples]


def _samples(line: dict[str, Any]) -> Iterable[Sample]:
    """One per text of the row; none where the line is not as `evaluate` writes it."""
    texts = line.get("generate")
    texts = texts if isinstance(texts, list) else [texts]
    both = [line.get(rule) for rule in RULES]
    both = [one if isinstance(one, list) else [one] for one in both]
    for text, *verdicts in zip(texts, *both, strict=False):
        if not isinstance(text, str) or not all(isinstance(one, dict) for one in verdicts):
            continue
        right = [one.get("right") is True for one in verdicts]
        kind = "right" if all(right) else "apart" if any(right) else "wrong"
        row = line.get("index")
        named = dict(zip(RULES, verdicts, strict=True))
        yield Sample(kind, brief(line.get("suite"), 40), row if isinstance(row, int) else -1, line, text, named)


def _without(folder: Path, sentence: str) -> str:
    return sentence.replace(f"{folder}/", "")


def section(datasets: dict[str, list[Line]], samples: dict[str, list[Sample]]) -> Html | None:
    """The section; samples: by a run's path. None where there are none."""
    parts: list[Part] = []
    for dataset, lines in datasets.items():
        runs = [(line.run_name(run), samples.get(str(run.path), [])) for line in lines for run in line.runs]
        shown = [folded(f"Answers of {name}", *_of_run(own)) for name, own in runs if own]
        if shown:
            parts += [el("h3", f"Answers of runs on {dataset}"), *shown]
    if not parts:
        return None
    told = "Of each test the first answers that are right under both rules, wrong under both, and judged differently."
    told += " Characters that cannot be seen, or that turn the direction of writing, are spelt out."
    return el("section", el("h2", "Answers, right and wrong", id="answers"), el("p", told, class_="note"), *parts)


def _of_run(samples: list[Sample]) -> Iterable[Html]:
    for suite in dict.fromkeys(sample.suite for sample in samples):
        yield el("h4", suite)
        yield from (_article(sample) for sample in samples if sample.suite == suite)


def _article(sample: Sample) -> Html:
    fields = sample.fields
    gold = "task_id" if "task_id" in fields else "answer"
    told: list[Part] = [el("dt", "question"), _said(fields.get("instruction", ""), "instruction")]
    told += [el("dt", "task" if gold == "task_id" else "right answer"), _said(fields.get(gold), "answer")]
    told += [el("dt", "answered"), _said(sample.text, "generate")]
    for rule, verdict in sample.verdicts.items():
        right = verdict.get("right") is True
        mark = el("span", "✓ right" if right else "✗ wrong", class_="right" if right else "wrong")
        found = verdict.get("found")
        taken = [": found nothing"] if found is None else [": took ", _text(found, "found")]
        why = [", ", _text(verdict["why"], "why")] if verdict.get("why") else []
        told += [el("dt", f"{rule} rule"), el("dd", mark, *taken, *why)]
    return el("article", el("h5", f"Row {sample.row + 1}: {_KINDS[sample.kind]}"), el("dl", *told))


def _said(value: Any, kind: str) -> Html:
    shown, note = cut(value if isinstance(value, str) else brief(value, 4000), _MOST[kind])
    words = el(
        "span", shown.strip() or "(nothing)", class_="said", dir="auto", tabindex=0 if len(shown) > 600 else None
    )
    return el("dd", words, el("span", f"({note})", class_="under") if note else None)


def _text(value: Any, kind: str) -> Html:
    shown, note = cut(value if isinstance(value, str) else brief(value, 4000), _MOST[kind])
    return el("span", el("bdi", shown), f" ({note})" if note else None)
