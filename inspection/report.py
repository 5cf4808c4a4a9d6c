"""A folder of runs as one HTML page, which needs no network and no other file.

    python -m inspection report RUNS --save_path report.html

Runs are looked for at and under the folder, as exps/run.sh leaves them (DATASET/METHOD/sSEED). For each data set the
page shows an overview with what each run lacks, scores by both rules, losses, costs, what routers do (of runs with a
gates.json of `python -m inspection gates`), some answers with their verdicts, and settings. Runs that differ in their
seed alone share a row.
"""

import base64
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cli import cli_errors, flag, parse
from inspection import chart_style, plots
from inspection.answers import read_samples
from inspection.figures import read_costs
from inspection.html import render, write_page
from inspection.router_file import read_statistics, slots_of
from inspection.runs import RULES, Run, RunGroup, brief, columns_of, find_runs, group_runs, headlines

NONE = "–"
GIB = 2**30


@dataclass(frozen=True)
class Flags:
    runs: str = flag(help="folder of runs", positional=True)
    save_path: str = flag("report.html", help="HTML file to write; replaced if it exists")
    samples: int = flag(1, help="answers shown per test and run of each kind: right, wrong, judged differently")
    costs: str | None = flag(None, help="what `python -m benchmarks.step --json FILE` wrote: times on equal terms")
    title: str | None = flag(None, help="the page's title; default: the folder's name")

    def __post_init__(self):
        if not 0 <= self.samples <= 1000:
            raise ValueError(f"--samples must be from 0 to 1000, not {self.samples}")
        if not self.save_path or Path(self.save_path).is_dir():
            raise ValueError(f"--save_path {self.save_path!r} must be the path of a file")


def main(argv: Sequence[str], prog: str) -> None:
    flags = parse(Flags, argv, prog=prog, description=__doc__)
    with cli_errors():
        folder = Path(flags.runs)
        title = flags.title or f"Runs in {folder.resolve().name or folder}"
        costs = Path(flags.costs) if flags.costs else None
        report = make_report(folder, title, flags.samples, time.strftime("%Y-%m-%d"), costs)
        write_page(Path(flags.save_path), report.html)
        incomplete = f", {report.incomplete} of them incomplete" if report.incomplete else ""
        print(f"{flags.save_path}: {report.runs} runs{incomplete}, {len(report.html) / 1e6:.1f} MB")


class Report(NamedTuple):
    """runs: how many the page shows; incomplete: how many of them lack something."""

    html: str
    runs: int
    incomplete: int


class Table(NamedTuple):
    """A table of texts; the first cell of a row is its header, a second line in a cell is set small."""

    caption: str
    head: list[str]
    rows: list[list[str]]


class Figure(NamedTuple):
    """A chart as a data URI of its SVG."""

    caption: str
    source: str


def make_report(folder: Path, title: str, per_kind: int, date: str, costs_file: Path | None = None) -> Report:
    """The report of the runs at and under a folder. per_kind: answers shown of each kind. costs_file: what
    `python -m benchmarks.step --json` wrote. ValueError where there is no run, or no costs."""
    costs = read_costs(costs_file) if costs_file else {}
    runs = find_runs([folder])
    if not runs:
        raise ValueError(f"{folder}: no run in it (a folder with config.json, log.jsonl or scores.json)")
    by_dataset: dict[str, list[RunGroup]] = {}
    for group in group_runs(runs):
        by_dataset.setdefault(group.dataset, []).append(group)
    with chart_style.styled():
        datasets = [_dataset(name, groups, per_kind, costs) for name, groups in by_dataset.items()]
        measured = [_figure("Costs measured on equal terms", plots.costs(costs))] if costs else []
    folders = [path for path in folder.rglob("*") if path.is_dir()]
    empty = sorted(str(path.relative_to(folder)) for path in folders if not any(path.iterdir()))
    page = {"title": title, "date": date, "n_runs": len(runs), "datasets": datasets, "empty": empty}
    html = render("report.html.j2", **page, measured=measured)
    return Report(html, len(runs), sum(bool(run.problems) for run in runs))


def _dataset(name: str, groups: list[RunGroup], per_kind: int, costs: Mapping[str, Mapping]) -> dict[str, Any]:
    """What the template shows of one data set."""
    columns, answers, routers, problems = columns_of(groups), [], [], []
    for group in groups:
        for run in group.runs:
            run_name = group.run_name(run)
            samples, notes = read_samples(run, per_kind)
            notes = run.problems + _untested(run, columns) + notes
            answers += [(run_name, samples)] if samples else []
            try:
                routers += _routers(run_name, run)
            except ValueError as error:
                notes.append(str(error).replace(f"{run.path}/", ""))
            problems += [(run_name, notes)] if notes else []
    tuned = [group for group in groups if group.trained]
    return {
        "name": name,
        "overview": _overview(groups, headlines(columns), dict(problems), costs),
        "problems": problems + _absent_seeds(tuned),
        "scores": _scores(groups, columns),
        "losses": _losses(tuned),
        "costs": _costs(tuned) if tuned else None,
        "routers": routers,
        "answers": answers,
        "configuration": _configuration(groups),
        "records": [table for group in groups for run in group.runs for table in _record(group.run_name(run), run)],
        "figures": _score_figures(groups, columns) if columns else [],
        "cost_figures": _cost_figures(tuned),
    }


def _figure(caption: str, figure: Any) -> Figure:
    return Figure(caption, "data:image/svg+xml;base64," + base64.b64encode(chart_style.image(figure, "svg")).decode())


def _overview(groups: list[RunGroup], columns: list[str], noted: Mapping, costs: Mapping[str, Mapping]) -> Table:
    head = [
        "method",
        "seeds",
        "state",
        "steps",
        "final loss",
        *(f"{name}, {rule} %" for name in columns for rule in RULES),
    ]
    rows = []
    for group in groups:
        lacking = sum(bool(run.problems) for run in group.runs)
        state = "complete, see notes" if any(group.run_name(run) in noted for run in group.runs) else "complete"
        seeds = ", ".join(NONE if run.seed is None else brief(run.seed, 12) for run in group.runs)
        row = [group.name, seeds, f"{lacking} of {len(group.runs)} incomplete" if lacking else state, _steps(group)]
        row.append(_spread(group, "final_loss", "{:.2f}"))
        rows.append(row + [_score(group, column, rule) for column in columns for rule in RULES])
        if costs:
            seconds = costs.get(group.name, {}).get("seconds_per_answer")
            rows[-1].append(NONE if seconds is None else f"{seconds:.3f}")
    return Table(f"The methods; {NONE}: not trained, or not known", head + ["s per answer"] * bool(costs), rows)


def _steps(group: RunGroup) -> str:
    texts = []
    for run in group.runs:
        steps = run.numbers.get("steps", "?")
        texts.append(f"{run.logged_steps:,}" + ("" if run.logged_steps == steps else f" of {steps}"))
    return ", ".join(dict.fromkeys(texts)) if group.trained else NONE


def _spread(group: RunGroup, name: str, form: str, unit: float = 1) -> str:
    spread = group.over(name)
    if spread is None:
        return NONE
    deviation = f"\nsd {form.format(spread.deviation / unit)}" if spread.deviation else ""
    return form.format(spread.mean / unit) + deviation


def _score(group: RunGroup, column: str, rule: str) -> str:
    score = group.score(column, rule)
    if score is None:
        return NONE
    text = f"{score.mean:.1f}" + ("" if score.half_width is None else f" ± {score.half_width:.1f}")
    if score.deviation is None:
        return text
    return f"{text}\nseeds {', '.join(f'{value:.1f}' for value in score.values)}; sd {score.deviation:.1f}"


def _untested(run: Run, columns: list[str]) -> list[str]:
    """Tests that others have been scored on, and this run has not. (A run without any scores says so already.)"""
    scored, tests = ({name.partition(" (")[0]: None for name in names} for names in (run.scores, columns))
    absent = [test for test in tests if test not in scored and not test.startswith("mean, ")]
    return [f"not scored on {', '.join(absent)}, as other runs are"] if run.scores and absent else []


def _absent_seeds(groups: list[RunGroup]) -> list[tuple[str, list[str]]]:
    """Seeds that only some of the methods have a run of."""
    seeds: dict[str, set[int]] = {}
    for group in groups:
        seeds.setdefault(group.method, set()).update(run.seed for run in group.runs if run.seed is not None)
    absent = {seed: [m for m, own in seeds.items() if seed not in own] for seed in sorted(set().union(*seeds.values()))}
    return [
        (f"seed {brief(seed, 12)}", [f"no folder for {', '.join(names)}"]) for seed, names in absent.items() if names
    ]


def _scores(groups: list[RunGroup], columns: list[str]) -> Table:
    head = ["method", *(f"{column}, {rule} %" for column in columns for rule in RULES)]
    rows = [[group.name, *(_score(group, column, rule) for column in columns for rule in RULES)] for group in groups]
    return Table("Scores of each test, with the number of rows that were answered", head, rows)


def _score_figures(groups: list[RunGroup], columns: list[str]) -> list[Figure]:
    scored = [group for group in groups if any(run.scores for run in group.runs)]
    caption = "Percent right by both rules, with 95 % intervals over the test rows; upright ticks are single seeds."
    figures, column = [_figure(caption, plots.scores(scored, columns))], headlines(columns)[0]
    scored = [group for group in scored if group.score(column, "robust")]
    tuned = [group for group in scored if all(map(group.over, plots.MEASURES))]
    if len(tuned) > 1:
        caption = f"{column} against trained parameters, time of training and memory."
        untuned = [group for group in scored if not group.trained]
        figures.append(_figure(caption, plots.tradeoff(untuned + tuned, "robust", column)))
    return figures


def _losses(groups: list[RunGroup]) -> list[Figure]:
    logged = [[run.losses for run in group.runs if run.losses] for group in groups]
    curves = [(groups[i].name if k == 0 else "", i, run) for i, runs in enumerate(logged) for k, run in enumerate(runs)]
    if not curves:
        return []
    smooth = max(1, max(len(losses) for _, _, losses in curves) // 10)
    caption = f"Loss: the mean of the last {smooth} steps, faint behind it the steps themselves; seeds share a colour."
    return [_figure(caption, plots.losses(curves, smooth))]


def _costs(groups: list[RunGroup]) -> Table:
    columns = {
        "trained parameters": ("trainable_parameters", "{:,.0f}", 1),
        "rows per step": ("rows_per_step", "{:,.0f}", 1),
        "s per step": ("seconds_per_step", "{:.2f}", 1),
        "training, min": ("seconds", "{:,.1f}", 60),
        "tokens/s": ("tokens_per_s", "{:,.0f}", 1),
        "peak memory, GiB": ("peak_memory_bytes", "{:.2f}", GIB),
        "adapter file, MB": ("adapter_bytes", "{:,.1f}", 1e6),
    }
    rows = [[group.name, _steps(group), *(_spread(group, *column) for column in columns.values())] for group in groups]
    return Table("What training cost, means over seeds", ["method", "steps", *columns], rows)


def _cost_figures(groups: list[RunGroup]) -> list[Figure]:
    costs = {}
    for group in groups:
        spreads = {name: group.over(name) for name in plots.COSTS}
        costs[group.name] = {name: spread.mean for name, spread in spreads.items() if spread and spread.mean > 0}
    costs = {name: numbers for name, numbers in costs.items() if numbers}
    return [_figure("Median time of a step, and peak memory of the main process.", plots.costs(costs))] if costs else []


def _routers(name: str, run: Run) -> list[tuple[str, str, list[Figure], list[Table]]]:
    """(run, what was read, figures, tables) of a run's router statistics; nothing where it has none."""
    if not (run.path / "gates.json").exists():
        return []
    statistics, figures, tables = read_statistics(run.path / "gates.json"), [], []
    if statistics["blocks"]:
        slots, rows = slots_of(statistics), []
        figures.append(_figure(f"Mean gates of {name}, by layer and slot.", plots.gates([(name, statistics)], "all")))
        for block in statistics["blocks"]:
            part = block["parts"]["all"]
            numbers = zip(block["slots"], part["mean"], part["std"], part["active"], strict=True)
            cells = {slot: f"{mean:.3f}\nsd {std:.3f}, on {active:.0%}" for slot, mean, std, active in numbers}
            threshold = f"{part['threshold']['mean']:.3f}" if "threshold" in part else NONE
            used = f"{part['used']['mean']:.3f}"
            rows.append([str(block["layer"]), *(cells.get(slot, NONE) for slot in slots), used, threshold])
        caption = f"Gates of {name}: mean, standard deviation, share of tokens with a gate above 0"
        tables.append(Table(caption, ["layer", *slots, "adapters used", "threshold"], rows))
    if statistics["experts"]:
        show, rows = "load" if plots.chooses(statistics) else "mean", []
        caption = f"Experts of {name}, layer by expert; beside them balance and entropy."
        figures.append(_figure(caption, plots.loads(name, statistics, "all", show)))
        for mixture in statistics["experts"]:
            part = mixture["parts"]["all"]
            row = [f"{mixture['layer']} {mixture['slot']}", f"{part['balance']:.3f}", f"{part['used']['mean']:.2f}"]
            rows.append(row + [" ".join(f"{value:.2f}" for value in part[column]) for column in ("mean", "load")])
        head = ["layer and slot", "balance", "experts chosen", "mean weights", "loads"]
        tables.append(Table(f"Experts of {name}", head, rows))
    source = statistics["source"] | {f"tokens of {part}": count for part, count in statistics["counts"].items()}
    shown = {key: v for key, v in source.items() if isinstance(v, str | int | float) and "sha256" not in key}
    return [(name, ", ".join(f"{key} {brief(value, 80)}" for key, value in shown.items()), figures, tables)]


def _configuration(groups: list[RunGroup]) -> list[Table]:
    """In what runs differ from most, and what most share."""
    named = [(group.run_name(run), run) for group in groups for run in group.runs]
    hidden = {"method", "trainable_parameters", "tests"}
    settings = [{name: json.dumps(v) for name, v in run.settings.items() if name not in hidden} for _, run in named]
    usual = {}
    for name in dict.fromkeys(name for own in settings for name in own):
        values = Counter(own[name] for own in settings if name in own)
        value, count = values.most_common(1)[0]
        if count > 1 and 2 * count > values.total():
            usual[name] = value
    rows = []
    for (run_name, _), own in zip(named, settings, strict=True):
        differing = [f"{name} {brief(value, 60)}" for name, value in own.items() if usual.get(name) != value]
        rows.append([run_name, ", ".join(differing) or ("as most runs" if own else "no settings are known")])
    tables = [Table("In what each run differs from most", ["run", "settings of its own"], rows)]
    shared = [[name, brief(value, 400)] for name, value in usual.items()]
    return tables + ([Table("What most runs share", ["setting", "value"], shared)] if shared else [])


def _record(run_name: str, run: Run) -> list[Table]:
    """A run's whole record, and how each test was answered."""
    record = run.record or {}
    parts = {name: value for name, value in record.items() if isinstance(value, dict)}
    parts |= {"run": {name: value for name, value in record.items() if name not in parts}}
    parts |= {f"answers to {test}": settings for test, settings in run.answer_settings.items()}
    rows = [[f"{part}: {name}", brief(value, 400)] for part, own in parts.items() for name, value in own.items()]
    return [Table(f"All settings of {run_name}", ["setting", "value"], rows)] if rows else []
