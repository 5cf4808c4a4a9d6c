"""Scores for people (a table, single rows) and for programs (JSON)."""

import contextlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from evaluate.scoring import METRICS, SampleScore, Score, ScoredRow

_SHOWN_CHARACTERS = 1500
_HEADER = ("suite", "rows", "published %", "", "robust %", "", "no answer")


def mean(scores: list[Score], metric: str) -> tuple[float, float]:
    """Return (percent, half-width) of the unweighted mean over tasks; metric: "published" or "robust".

    The half-width takes the tasks as independent.
    """
    each = [getattr(score, metric) for score in scores]
    percent = math.fsum(score.percent for score in each) / len(each)
    return percent, math.sqrt(math.fsum(score.half_width**2 for score in each)) / len(each)


def table(scores: list[Score]) -> str:
    """Return a line per task, then the unweighted mean of each family of several, then notes about the files."""
    lines: list[list[str]] = []
    for score in scores:
        cells = [cell for s in (score.published, score.robust) for cell in _cells(s.percent, s.half_width)]
        missing = f"{score.published.missing} / {score.robust.missing}"
        lines.append([score.task.name, f"{len(score.rows)} of {score.task.problems}", *cells, missing])
        if score.task.program:
            published, robust = (score.pass_at(metric) for metric in METRICS)
            lines += [[f"  pass@{k}", "", f"{published[k]:.2f}", "", f"{robust[k]:.2f}", "", ""] for k in published]
    families = _families(scores)
    for family, members in families.items():
        if len(members) > 1:
            cells = [cell for metric in METRICS for cell in _cells(*mean(members, metric))]
            lines.append([f"mean, {family}" if len(families) > 1 else "mean", "", *cells, ""])
    align = ("left", *("right",) * 6)
    text = tabulate(lines, _HEADER, "plain", colalign=align, disable_numparse=True, preserve_whitespace=True)
    return "\n".join(
        [line.rstrip() for line in text.split("\n")] + [note for score in scores for note in _notes(score)]
    )


def _cells(percent: float, half_width: float) -> tuple[str, str]:
    return f"{percent:.2f}", f"± {half_width:5.2f}"


def _families(scores: list[Score]) -> dict[str, list[Score]]:
    """Group the scores by the family of their task, in the order in which the families come."""
    families: dict[str, list[Score]] = {}
    for score in scores:
        families.setdefault(score.task.family, []).append(score)
    return families


def _notes(score: Score) -> Iterable[str]:
    rows, problems, name = len(score.rows), score.task.problems, score.task.name
    if rows < problems:
        yield f"note: {score.path}: only {rows} of the {problems} problems of {name}"
    if rows > problems:
        yield f"note: {score.path}: {rows} rows, more than the {problems} problems of {name}: are some written twice?"
    if score.task.program and not score.same_samples:
        yield f"note: {score.path}: not as many samples in every row, so that only pass@1 is known"
    if score.samples > rows:
        yield f"note: {score.path}: {score.samples} samples; a row's score is the mean over its samples"


def show(score: Score, rows: list[ScoredRow]) -> str:
    """Return single rows for a look: both scores beside the text, and the programs that were run."""
    blocks = []
    for row in rows:
        fields = row.row.fields
        answer = f"task {fields.get('task_id')}" if score.task.program else f"answer {fields.get('answer')}"
        for number, (text, *both) in enumerate(zip(row.row.texts, row.published, row.robust, strict=True), 1):
            sample = f", sample {number}" if row.row.has_samples else ""
            results = ", ".join(f"{metric} {_result(s)}" for metric, s in zip(METRICS, both, strict=True))
            blocks.append(f"--- {score.task.name} {row.row.line}{sample}: {_printable(answer)}; {results}")
            blocks.append(_indented(text))
            if score.task.program:
                blocks += _programs(both)
    return "\n".join(blocks)


def _programs(both: list[SampleScore]) -> list[str]:
    """Return the programs that were run, one where both metrics ran the same."""
    metrics: dict[str, list[str]] = {}
    for metric, score in zip(METRICS, both, strict=True):
        if score.extraction:
            metrics.setdefault(score.extraction.text, []).append(metric)
    return [f"  {' and '.join(names)} ran\n{_indented(code)}" for code, names in metrics.items()]


def _result(score: SampleScore) -> str:
    shown = "found nothing"
    if score.extraction:
        shown = _printable(score.why, 200) if score.why else f"found {_printable(score.extraction.text)}"
    return f"{shown} ({'right' if score.is_correct else 'wrong'})"


def _printable(text: str, length: int = 80) -> str:
    """Cut a text and show unprintable characters as their codes: a generated text may hold terminal escapes."""
    cut = text if len(text) <= length else text[:length] + f"... ({len(text) - length} characters more)"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


def _indented(text: str) -> str:
    cut = text.strip("\n").rstrip()
    more = len(cut) - _SHOWN_CHARACTERS
    lines = [_printable(line, _SHOWN_CHARACTERS) for line in cut[:_SHOWN_CHARACTERS].split("\n")]
    return "\n".join(f"    {line}" for line in lines + ([f"... ({more} characters more)"] if more > 0 else []))


def scores_json(scores: list[Score]) -> str:
    """Return all numbers of the table, unrounded.

    "mean" is over all the suites, of whatever family; "families" holds each family's suites and their mean.
    """
    suites: dict[str, dict[str, Any]] = {}
    for score in scores:
        rows, problems = len(score.rows), score.task.problems
        suites[score.task.name] = {"file": score.path, "rows": rows, "problems": problems, "samples": score.samples}
        suites[score.task.name] |= {metric: asdict(getattr(score, metric)) for metric in METRICS}
        if score.task.program:
            suites[score.task.name]["pass_at"] = {metric: score.pass_at(metric) for metric in METRICS}
    families = {
        family: {"suites": [score.task.name for score in members], "mean": _means(members)}
        for family, members in _families(scores).items()
    }
    content = {"suites": suites, "mean": _means(scores), "families": families}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _means(scores: list[Score]) -> dict[str, dict[str, float]]:
    return {metric: dict(zip(("percent", "half_width"), mean(scores, metric), strict=True)) for metric in METRICS}


def verdict_lines(scores: list[Score]) -> Iterable[str]:
    """Yield a JSON line per row: what each metric took as the answer, and whether that is right.

    Where "generate" is a list, so are these. A program comes with why it failed.
    """
    for score in scores:
        name = "task_id" if score.task.program else "answer"
        for row in score.rows:
            fields = row.row.fields
            line: dict[str, Any] = {"suite": score.task.name, "index": row.row.index, name: fields.get(name)}
            line |= {"instruction": fields.get("instruction", ""), "generate": fields["generate"]}
            for metric in METRICS:
                verdicts = [_verdict(sample) for sample in getattr(row, metric)]
                line[metric] = verdicts if row.row.has_samples else verdicts[0]
            yield json.dumps(line, ensure_ascii=False) + "\n"


def _verdict(score: SampleScore) -> dict[str, Any]:
    why = {"why": score.why} if score.why else {}
    return {"found": score.extraction.text if score.extraction else None, "right": score.is_correct} | why


def write(path: str | Path, pieces: Iterable[str]) -> None:
    """Write a text file whole or not at all."""
    beside = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        # backslashreplace writes half a surrogate pair as \udXXX, which is how JSON spells it
        with open(beside, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(pieces)
        os.replace(beside, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
