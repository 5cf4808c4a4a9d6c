"""What a study found: results.md, results.json, a chart, and files in the schema of PEFT's method_comparison.

It reads what finished runs have left and trains nothing, so that tables can be made again by other code.
"""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from evaluate import score_file
from exps.paired import Difference, holm, paired_difference
from exps.peft_results import write_peft_results
from exps.study import Line, Run, Study
from inspection.runs import Run as RunFolder
from inspection.runs import read_run
from moa.files import atomic_write, read_json

NONE = "–"  # what is not known, in a table
MARKS = ("<!-- study: begin -->", "<!-- study: end -->")
MEASURES = {"loss": ("Test loss", "+.4f"), "demo": ("Demo accuracy in points", "+.1f")}  # title, form of a difference


@dataclass(frozen=True)
class Result:
    """A finished line, or the base (line None). values: measure -> (S, R); counts: measure -> (R,), what each value is
    a sum over. The loss of a row is a sum over its label tokens, a problem of the demo counts 100 where it is right."""

    line: Line | None
    runs: list[Run]
    folders: list[RunFolder]
    val_losses: list[float]
    values: dict[str, np.ndarray]
    counts: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        return self.line.name if self.line else "base"

    def by_seed(self, measure: str) -> list[float]:
        """The measure after each seed."""
        if measure not in self.values:
            return []
        return (self.values[measure].sum(1) / self.counts[measure].sum()).tolist()

    def numbers(self, name: str) -> list[float]:
        """One of the runs' numbers (`inspection.runs.Run`)."""
        return [folder.numbers[name] for folder in self.folders]


def read_result(study: Study, line: Line | None) -> Result:
    runs = study.chosen(line) if line else [study.base]
    values, counts = {"loss": np.array([run.losses("test") for run in runs])}, {}
    counts["loss"] = np.array(read_json(runs[0].path / "test.json")["labels"])
    if study.dataset == "demo":
        scores = [score_file(run.path / "demo.jsonl", "demo") for run in runs]
        values["demo"] = np.array([[100 * row.published[0].is_correct for row in score.rows] for score in scores])
        counts["demo"] = np.ones(values["demo"].shape[1])
    folders = [read_run(run.path) for run in runs] if line else []
    return Result(line, runs, folders, [run.loss("val") for run in runs], values, counts)


def read_study(study: Study) -> list[Result]:
    """The base and the finished lines; the others are named on stderr. ValueError where runs were made otherwise."""
    unfinished = [line.name for line in study.lines if not study.complete(line)]
    if unfinished:
        print(f"{study.dataset}: left out, not finished: {', '.join(unfinished)}", file=sys.stderr)
    lines = [line for line in study.lines if line.name not in unfinished]
    if not lines or not (study.base.path / "test.json").is_file():
        raise ValueError(f"{study.folder}: no line is finished")
    results = [read_result(study, line) for line in (None, *lines)]
    runs = [run for line in lines for run in study.candidates(line)] + [run for r in results for run in r.runs]
    identity = read_json(study.base.path / "study.json")
    for run in runs:
        record = read_json(run.path / "study.json")
        differ = [name for name in identity if record.get(name) != identity[name]]
        if differ:
            raise ValueError(f"{run.path}: made with other {', '.join(differ)} than {study.base.path}")
    return results


def differences(results: Sequence[Result], reference: Result, measure: str) -> dict[str, tuple[Difference, float]]:
    """Line -> its difference to the reference, and p after Holm's correction over the lines that have one."""
    others = [r for r in results if r.line and r is not reference and len(r.runs) == len(reference.runs)]
    counts = reference.counts.get(measure)
    if counts is None:
        return {}
    every = [paired_difference(r.values[measure], reference.values[measure], counts) for r in others]
    corrected = holm([1.0 if difference.p is None else difference.p for difference in every])
    return {r.name: (d, p) for r, d, p in zip(others, every, corrected, strict=True)}


def collect(studies: Sequence[Study], references: Sequence[str], out: Path) -> None:
    """Write the tables of all data sets into OUT, and print where."""
    parts, content = [], {}
    for study in studies:
        results = read_study(study)
        named = [result for name in references for result in results if result.name == name]
        found_by = {r.name: {m: differences(results, r, m) for m in MEASURES} for r in named}
        parts.append(page(study, results, found_by))
        content[study.dataset] = as_json(study, results, found_by)
        if study.dataset == "demo":
            write_peft_results(out / "method_comparison", results, study.flags.quiet_machine)
        chart(study.folder / "loss.svg", results)
    text = "\n".join(parts)
    atomic_write(out / "results.md", text.encode())
    atomic_write(out / "results.json", (json.dumps(content, indent=1) + "\n").encode())
    if studies[0].flags.page:
        insert(Path(studies[0].flags.page), text)
    print(text)


def insert(path: Path, text: str) -> None:
    """Put the text between a page's two marks."""
    before, begin, rest = path.read_text(encoding="utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not begin or not end:
        raise ValueError(f"{path}: expected the lines {MARKS[0]} and {MARKS[1]} in it")
    atomic_write(path, f"{before}{begin}\n\n{text}\n{end}{after}".encode())


def page(study: Study, results: Sequence[Result], by_reference: dict[str, Any]) -> str:
    """The tables of a data set in Markdown."""
    flags, trained = study.flags, [result for result in results if result.line]
    made = read_json(study.base.path / "study.json")
    revisions = {str(folder.record["git_revision"]) for result in trained for folder in result.folders}
    text = f"Revision {', '.join(sorted(revisions))} (code {made['code']}). {made['steps']} steps of "
    text += f"{made['batch_size']} of {trained[0].folders[0].record['rows']} rows; losses on "
    text += f"{len(results[0].counts['loss'])} test rows"
    if "demo" in results[0].counts:
        text += f", accuracy by the published rule on {len(results[0].counts['demo'])} problems"
    text += "; mean ± standard deviation over seeds."
    tables = [_table([_cells(result, flags.quiet_machine) for result in [*trained, results[0]]])]
    for reference, measures in by_reference.items():
        for measure, by_line in measures.items():
            if by_line:
                title, form = MEASURES[measure]
                rows = [_difference_cells(name, *pair, form) for name, pair in by_line.items()]
                tables += [f"{title}, minus that of {reference}:", _table(rows)]
    tables += ["Validation loss after the first seed, by learning rate:", _table([_rates(study, r) for r in trained])]
    at_edge = [r.name for r in trained if study.best(r.line).lr in (min(r.line.rates), max(r.line.rates))]
    if at_edge:
        tables.append(f"The lowest or highest rate was the best for {', '.join(at_edge)}: a better one may lie beyond.")
    return "\n\n".join([f"## {study.dataset}", text, *tables]) + "\n"


def _table(rows: list[dict[str, str]]) -> str:
    names = dict.fromkeys(name for row in rows for name in row)
    rows = [{name: row.get(name, NONE) for name in names} for row in rows]
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def _spread(values: Sequence[float], form: str) -> str:
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{form}}{deviation}"


def _cells(result: Result, times: bool) -> dict[str, str]:
    cells = {"method": result.name}
    if result.line:
        cells["seeds"], cells["rate"] = str(len(result.runs)), f"{result.runs[0].lr:g}"
        cells["trained"] = f"{result.numbers('trainable_parameters')[0]:,.0f}"
        cells["memory, GB"] = f"{max(result.numbers('peak_memory_bytes')) / 1e9:.2f}"
        if times:
            cells["a step, s"] = _spread(result.numbers("seconds_per_step"), ".2f")
    cells["validation loss"] = _spread(result.val_losses, ".4f")
    cells["test loss"] = _spread(result.by_seed("loss"), ".4f")
    if "demo" in result.values:
        cells["demo, %"] = _spread(result.by_seed("demo"), ".1f")
    return cells


def _difference_cells(name: str, difference: Difference, p: float, form: str) -> dict[str, str]:
    def interval(pair: tuple[float, float] | None) -> str:
        return NONE if pair is None else f"{pair[0]:{form}} to {pair[1]:{form}}"

    known = difference.p is not None
    return {
        "method": name,
        "difference": f"{difference.mean:{form}}",
        "95 % interval (t)": interval(difference.interval),
        "bootstrap": interval(difference.bootstrap),
        "p": f"{difference.p:.2g}" if known else NONE,
        "p, Holm": f"{p:.2g}" if known else NONE,
        "significant": ("yes" if p < 0.05 else "no") if known else NONE,
    }


def _rates(study: Study, result: Result) -> dict[str, str]:
    cells = {run.lr: f"{run.loss('val'):.4f}" for run in study.candidates(result.line)}
    best = study.best(result.line).lr
    cells[best] = f"**{cells[best]}**"
    return {"method": result.name} | {f"{lr:g}": cells[lr] for lr in sorted(cells)}


def as_json(study: Study, results: Sequence[Result], by_reference: dict[str, Any]) -> dict[str, Any]:
    """All that the tables are made of, but for the single rows."""
    lines = [
        {
            "method": result.name,
            "seeds": [run.seed for run in result.runs] if result.line else [],
            "lr": result.runs[0].lr if result.line else None,
            "runs": [str(run) for run in result.runs],
            "validation_loss": result.val_losses,
            **{f"test_{measure}": result.by_seed(measure) for measure in result.values},
            "trainable_parameters": result.numbers("trainable_parameters"),
            "peak_memory_bytes": result.numbers("peak_memory_bytes"),
            "rates": _val_losses(study, result.line) if result.line else {},
            "git_revision": [folder.record["git_revision"] for folder in result.folders],
        }
        for result in results
    ]
    compared = {
        reference: {
            measure: {name: difference._asdict() | {"p_holm": p} for name, (difference, p) in by_line.items()}
            for measure, by_line in measures.items()
        }
        for reference, measures in by_reference.items()
    }
    made_with = read_json(study.base.path / "study.json")
    return {"made_with": made_with, "lines": lines, "minus_reference": compared}


def _val_losses(study: Study, line: Line) -> dict[str, float | None]:
    """Validation loss by rate; None, as JSON knows no infinity, where the training diverged."""
    losses = {f"{run.lr:g}": run.loss("val") for run in study.candidates(line)}
    return {rate: loss if math.isfinite(loss) else None for rate, loss in losses.items()}


def chart(path: Path, results: Sequence[Result]) -> None:
    """Test loss against trained parameters, with the range over the seeds."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no chart: matplotlib is not installed (requirements-dev.txt names it)", file=sys.stderr)
        return
    figure = Figure(figsize=(6.5, 3.5), layout="constrained")
    axes = figure.subplots()
    for result in results:
        if result.line:
            losses = result.by_seed("loss")
            mean = statistics.fmean(losses)
            reach = [[mean - min(losses)], [max(losses) - mean]]
            size = result.numbers("trainable_parameters")[0]
            axes.errorbar(size, mean, reach, fmt="o", markersize=3, color="#0072B2")
            axes.annotate(result.name, (size, mean), (4, 3), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", xlabel="trained parameters", ylabel="test loss")
    axes.margins(x=0.15)  # room for names
    axes.grid(True, color="#cccccc", linewidth=0.4)
    figure.savefig(path, metadata={"Date": None})
