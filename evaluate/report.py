"""Scores for people (a table, single rows) and for programs (JSON)."""

import json
import math
import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from tabulate import tabulate

from evaluate.scoring import RULES, SampleScore, Score, ScoredRow
from moa.reading import short_repr

_SHOWN_CHARACTERS = 1500
_HEADER = ("suite", "rows", "published %", "", "robust %", "", "no answer")


def mean(scores: list[Score], rule: str) -> tuple[float, float]:
    """Return (percent, half-width) of the unweighted mean over tasks; rule: "published" or "robust".

    The half-width takes the tasks as independent.
    """
    each = [getattr(score, rule) for score in scores]
    percent = math.fsum(score.percent for score in each) / len(each)
    return percent, math.sqrt(math.fsum(score.half_width**2 for score in each)) / len(each)


def table(scores: list[Score]) -> str:
    """Return a line per task, then the unweighted mean of each family of several, then notes about the files."""
    lines: list[list[str]] = []
    for score in scores:
        cells = _cells((s.percent, s.half_width) for s in (score.published, score.robust))
        missing = f"{score.published.missing} / {score.robust.missing}"
        lines.append([score.task.name, f"{len(score.rows)} of {score.task.problems}", *cells, missing])
        if score.task.runs_code:
            published, robust = (score.pass_at(rule) for rule in RULES)
            lines += [[f"  pass@{k}", "", f"{published[k]:.2f}", "", f"{robust[k]:.2f}", "", ""] for k in published]
    families = _families(scores)
    for family, members in families.items():
        if len(members) > 1:
            cells = _cells(mean(members, rule) for rule in RULES)
            lines.append([f"mean, {family}" if len(families) > 1 else "mean", "", *cells, ""])
    align = ("left", *("right",) * 6)
    text = tabulate(lines, _HEADER, "plain", colalign=align, disable_numparse=True, preserve_whitespace=True)
    notes = [f"note: {score.path}: {note}" for score in scores for note in _notes(score)]
    return "\n".join([*(line.rstrip() for line in text.split("\n")), *notes])


def _cells(percents: Iterable[tuple[float, float]]) -> list[str]:
    return [cell for percent, half_width in percents for cell in (f"{percent:.2f}", f"± {half_width:5.2f}")]


def _families(scores: list[Score]) -> dict[str, list[Score]]:
    """Group the scores by the family of their task."""
    names = dict.fromkeys(score.task.family for score in scores)
    return {name: [score for score in scores if score.task.family == name] for name in names}


def _notes(score: Score) -> Iterable[str]:
    rows, problems, samples = len(score.rows), f"the {score.task.problems} problems of {score.task.name}", score.samples
    if rows < score.task.problems:
        yield f"only {rows} of {problems}"
    if rows > score.task.problems:
        yield f"{rows} rows, more than {problems}: are some written twice?"
    if score.task.runs_code and len(set(samples)) > 1:
        yield "not as many samples in every row, so that only pass@1 is known"
    if sum(samples) > rows:
        yield f"{sum(samples)} samples; a row's score is the mean over its samples"


def show(score: Score, rows: list[ScoredRow]) -> str:
    """Return single rows for a look: both scores beside the text, and the programs that were run."""
    blocks = []
    for row in rows:
        name = "task_id" if score.task.runs_code else "answer"
        for number, (text, *both) in enumerate(zip(row.texts, row.published, row.robust, strict=True), 1):
            sample = f", sample {number}" if row.has_samples else ""
            results = ", ".join(f"{rule} {_result(s)}" for rule, s in zip(RULES, both, strict=True))
            answer = short_repr(row.fields.get(name))
            blocks += [f"--- {score.task.name} {row.line}{sample}: {name} {answer}; {results}", _indented(text)]
            programs = {s.extraction.text: None for s in both if s.extraction} if score.task.runs_code else ()
            blocks += [f"  ran\n{_indented(program)}" for program in programs]
    return "\n".join(blocks)


def _result(score: SampleScore) -> str:
    extracted = f"found {short_repr(score.extraction.text)}" if score.extraction else "found nothing"
    return f"{score.why or extracted} ({'right' if score.is_correct else 'wrong'})"


def _indented(text: str) -> str:
    """Indent a text, cut and with unprintable characters as their codes: it may hold terminal escapes."""
    text = text.strip("\n").rstrip()
    more = len(text) - _SHOWN_CHARACTERS
    cut = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text[:_SHOWN_CHARACTERS])
    return textwrap.indent(cut + (f"\n... ({more} characters more)" if more > 0 else ""), "    ")


def scores_json(scores: list[Score]) -> str:
    """Return all numbers of the table, unrounded.

    "mean" is over all the suites, of whatever family; "families" holds each family's suites and their mean.
    """
    suites: dict[str, dict[str, Any]] = {}
    for score in scores:
        sizes = {"rows": len(score.rows), "problems": score.task.problems, "samples": sum(score.samples)}
        pass_at = {"pass_at": {rule: score.pass_at(rule) for rule in RULES}} if score.task.runs_code else {}
        by_rule = {rule: asdict(getattr(score, rule)) for rule in RULES}
        suites[score.task.name] = {"file": score.path} | sizes | by_rule | pass_at
    families = {
        family: {"suites": [score.task.name for score in members], "mean": _means(members)}
        for family, members in _families(scores).items()
    }
    content = {"suites": suites, "mean": _means(scores), "families": families}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _means(scores: list[Score]) -> dict[str, dict[str, float]]:
    return {rule: dict(zip(("percent", "half_width"), mean(scores, rule), strict=True)) for rule in RULES}


def verdict_lines(scores: list[Score]) -> Iterable[str]:
    """Yield a JSON line per row: what each rule took as the answer, and whether that is right.

    Where "generate" is a list, so are these. A program comes with why it failed.
    """
    for score in scores:
        name = "task_id" if score.task.runs_code else "answer"
        for index, row in enumerate(score.rows):
            line: dict[str, Any] = {"suite": score.task.name, "index": index, name: row.fields.get(name)}
            line |= {key: row.fields[key] for key in ("instruction", "generate")}
            for rule in RULES:
                verdicts = [_verdict(sample) for sample in getattr(row, rule)]
                line[rule] = verdicts if row.has_samples else verdicts[0]
            yield json.dumps(line, ensure_ascii=False) + "\n"


def _verdict(score: SampleScore) -> dict[str, Any]:
    why = {"why": score.why} if score.why else {}
    return {"found": score.extraction.text if score.extraction else None, "right": score.is_correct} | why
