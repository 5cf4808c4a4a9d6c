"""Scores for people (a table, single rows) and for programs (JSON)."""

import contextlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluate.scoring import JudgedRow, RuleScore, Score, Verdict

_SHOWN_CHARACTERS = 1500
_RULES = ("published", "robust")
_HEADER = ("suite", "rows", "published %", "robust %", "no answer")


def mean(scores: list[Score], rule: str) -> tuple[float, float]:
    """(percent, half-width) of the unweighted mean over suites; rule: "published" or "robust". The half-width takes
    the suites as independent."""
    each: list[RuleScore] = [getattr(score, rule) for score in scores]
    percent = math.fsum(one.percent for one in each) / len(each)
    return percent, math.sqrt(math.fsum(one.half_width**2 for one in each)) / len(each)


def table(scores: list[Score]) -> str:
    """A line per suite, the unweighted mean last where there are several, then what is to be said about the files.
    Suites of different families are not averaged together: each family of several has a mean of its own."""
    lines = [_HEADER]
    for score in scores:
        rows = f"{len(score.rows)} of {score.suite.problems}"
        shown = [_plus_minus(rule.percent, rule.half_width) for rule in (score.published, score.robust)]
        lines.append((score.suite.name, rows, *shown, f"{score.published.missing} / {score.robust.missing}"))
        lines.extend(_pass_lines(score))
    families = _families(scores)
    for family, members in families.items():
        if len(members) > 1:
            name = f"mean, {family}" if len(families) > 1 else "mean"
            lines.append((name, "", *(_plus_minus(*mean(members, rule)) for rule in _RULES), ""))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    ]
    return "\n".join([line.rstrip() for line in aligned] + _notes(scores))


def _pass_lines(score: Score) -> list[tuple[str, str, str, str, str]]:
    """A line of the table for each pass@k of a suite whose answers are programs."""
    if not score.suite.program:
        return []
    published, robust = (score.pass_at(rule) for rule in _RULES)
    no_width = " " * len(_plus_minus(0, 0)[4:])  # so that percentages stand below each other
    return [(f"  pass@{k}", "", f"{published[k]:.2f}{no_width}", f"{robust[k]:.2f}{no_width}", "") for k in published]


def _families(scores: list[Score]) -> dict[str, list[Score]]:
    """The scores by the family of their suite, in the order in which the families come."""
    families: dict[str, list[Score]] = {}
    for score in scores:
        families.setdefault(score.suite.family, []).append(score)
    return families


def _plus_minus(percent: float, half_width: float) -> str:
    return f"{percent:.2f} ± {half_width:5.2f}"


def _notes(scores: list[Score]) -> list[str]:
    notes = []
    for score in scores:
        rows, problems = len(score.rows), score.suite.problems
        if rows < problems:
            notes.append(f"note: {score.path}: only {rows} of the {problems} problems of {score.suite.name}")
        if rows > problems:
            notes.append(
                f"note: {score.path}: {rows} rows, more than the {problems} problems of {score.suite.name}: "
                "are some written twice?"
            )
        if score.suite.program and not score.same_samples:
            notes.append(f"note: {score.path}: not as many samples in every row, so that only pass@1 is known")
        if score.samples > rows:
            notes.append(f"note: {score.path}: {score.samples} samples; a row's score is the mean over its samples")
    return notes


def show(score: Score, rows: list[JudgedRow]) -> str:
    """Single rows for a look: both verdicts beside the text."""
    blocks = []
    for row in rows:
        what = ("task_id", "task") if score.suite.program else ("answer", "answer")
        answer = f"{what[1]} {_printable(str(row.row.fields.get(what[0])))}"
        for sample, (text, published, robust) in enumerate(
            zip(row.row.texts, row.published, row.robust, strict=True), 1
        ):
            name = f"{score.suite.name} {row.row.place}" + (f", sample {sample}" if row.row.sampled else "")
            verdicts = f"published {_verdict(published)}, robust {_verdict(robust)}"
            blocks.append(f"--- {name}: {answer}; {verdicts}\n{_indented(text)}")
            if score.suite.program:
                blocks.extend(_ran(published, robust))
    return "\n".join(blocks)


def _ran(published: Verdict, robust: Verdict) -> list[str]:
    """The programs that were run, one where both rules ran the same."""
    ran: dict[str, list[str]] = {}
    for rule, verdict in zip(_RULES, (published, robust), strict=True):
        if verdict.found:
            ran.setdefault(verdict.found.text, []).append(rule)
    return [f"  {' and '.join(rules)} ran\n{_indented(code)}" for code, rules in ran.items()]


def _verdict(verdict: Verdict) -> str:
    if verdict.found is None:
        return "found nothing (wrong)"
    if verdict.why:
        return f"{_printable(verdict.why, 200)} ({'right' if verdict.right else 'wrong'})"
    return f"found {_printable(verdict.found.text)} ({'right' if verdict.right else 'wrong'})"


def _printable(text: str, length: int = 60) -> str:
    """A generated text may hold terminal escapes: everything unprintable is shown as its code, and the rest is cut."""
    cut = text if len(text) <= length else text[:length] + f"... ({len(text) - length} characters more)"
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in cut)


def _indented(text: str) -> str:
    cut = text.strip("\n").rstrip()
    more = len(cut) - _SHOWN_CHARACTERS
    lines = [_printable(line, _SHOWN_CHARACTERS) for line in cut[:_SHOWN_CHARACTERS].split("\n")]
    return "\n".join(f"    {line}" for line in lines + ([f"... ({more} characters more)"] if more > 0 else []))


def scores_json(scores: list[Score]) -> str:
    """All numbers of the table, unrounded. "mean" is over all the suites, of whatever family; "families" holds the mean
    of each family and the suites that it is over."""
    suites = {
        score.suite.name: {
            "file": score.path,
            "rows": len(score.rows),
            "problems": score.suite.problems,
            "samples": score.samples,
            "published": asdict(score.published),
            "robust": asdict(score.robust),
        }
        | ({"pass_at": {rule: score.pass_at(rule) for rule in _RULES}} if score.suite.program else {})
        for score in scores
    }
    families = {
        family: {"suites": [one.suite.name for one in members], "mean": _means(members)}
        for family, members in _families(scores).items()
    }
    content = {"suites": suites, "mean": _means(scores), "families": families}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _means(scores: list[Score]) -> dict[str, dict[str, float]]:
    return {rule: dict(zip(("percent", "half_width"), mean(scores, rule), strict=True)) for rule in _RULES}


def verdict_lines(scores: list[Score]) -> Iterable[str]:
    """One JSON line per row: what each rule took as the answer, whether that is right; lists where "generate" is. Of a
    program: what was run, and why it failed."""
    for score in scores:
        name = "task_id" if score.suite.program else "answer"
        for row in score.rows:
            fields = row.row.fields
            line: dict[str, Any] = {"suite": score.suite.name, "index": row.row.index, name: fields.get(name)}
            line["instruction"] = fields.get("instruction", "")
            line["generate"] = fields["generate"]
            for rule in ("published", "robust"):
                verdicts = [
                    {"found": verdict.found.text if verdict.found else None, "right": verdict.right}
                    | ({"why": verdict.why} if verdict.why else {})
                    for verdict in getattr(row, rule)
                ]
                line[rule] = verdicts if row.row.sampled else verdicts[0]
            yield json.dumps(line, ensure_ascii=False) + "\n"


def write(path: str | Path, pieces: Iterable[str]) -> None:
    """Write a text file whole or not at all."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # backslashreplace writes half a surrogate pair as \udXXX, which is how JSON spells it.
        beside.unlink(missing_ok=True)  # "x" makes a file, and follows no link that lies in its place
        with open(beside, "x", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(pieces)
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
