"""A folder of runs as one HTML page, which needs no network and no other file.

    python -m inspection report RUNS --save_path report.html [--figures FOLDER]

Runs are looked for at and under the folder, as exps/run.sh leaves them (DATASET/METHOD/sSEED). For each data set the
page shows what was trained and at what cost, what each run lacks, loss curves (training and validation), scores by both
rules and against their price, what routers do (of runs with a gates.json of `python -m inspection gates`), and all
settings. Runs that differ in their seed alone share a row. --figures writes the charts too, as SVG and PNG for print.
"""

import base64
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cli import cli_errors, flag, parse
from inspection import charts, runs
from inspection.html import Table, write_page
from inspection.running_stats import read_statistics
from inspection.runs import NONE, QUANTITIES, RULES, Run, RunGroup, brief, show

SD = "\nsd "
SHOWN = ("trainable_parameters", "seconds", "seconds_per_step", "tokens_per_s", "peak_memory_bytes", "adapter_bytes")
SHOWN += ("final_loss", "val_loss", "best_step", "val_score")


@dataclass(frozen=True)
class Flags:
    runs: str = flag(help="folder of runs", positional=True)
    save_path: str = flag("report.html", help="HTML file to write; replaced if it exists")
    figures: str | None = flag(None, help="folder for the charts as SVG and PNG; default: on the page alone")
    title: str | None = flag(None, help="the page's title; default: the folder's name")

    def __post_init__(self):
        if not self.save_path or Path(self.save_path).is_dir():
            raise ValueError(f"--save_path {self.save_path!r} must be the path of a file")


class Section(NamedTuple):
    """A part of what the page shows of a data set. figures: by caption. folded: (title, table)."""

    title: str
    note: str = ""
    figures: dict[str, Any] = {}
    tables: Sequence[Table] = ()
    folded: Sequence[tuple[str, Table]] = ()


def main(argv: Sequence[str], prog: str) -> None:
    flags = parse(Flags, argv, prog=prog, description=__doc__)
    with cli_errors(), charts.styled():
        every_run = runs.find_runs([flags.runs])
        datasets = {name: sections(groups) for name, groups in runs.by_dataset(runs.group_runs(every_run)).items()}
        for name, parts in datasets.items() if flags.figures else ():
            for title, figure in [(title, figure) for part in parts for title, figure in part.figures.items()]:
                file = re.sub(r"\W+", "_", f"{name}_{title.partition(':')[0]}")
                charts.save(figure, Path(flags.figures, file))
        write_page(
            Path(flags.save_path),
            "report.html.j2",
            title=flags.title or f"Runs in {Path(flags.runs).resolve().name}",
            date=time.strftime("%Y-%m-%d"),
            n_runs=len(every_run),
            datasets=datasets,
            svg=lambda figure: base64.b64encode(charts.image(figure, "svg")).decode(),
        )
        incomplete = sum(bool(run.problems) for run in every_run)
        print(f"{flags.save_path}: {len(every_run)} runs" + (f", {incomplete} of them incomplete" * bool(incomplete)))


def sections(groups: list[RunGroup]) -> list[Section]:
    """What the page shows of one data set."""
    named = {group.run_name(run): run for group in groups for run in group.runs}
    problems = {name: list(run.problems) for name, run in named.items()}
    routers = []
    for name, run in named.items():
        try:
            routers += router_section(name, run)
        except ValueError as error:
            problems[name].append(str(error).replace(f"{run.path}/", ""))
    rows = [[name, "\n".join(sentences)] for name, sentences in problems.items() if sentences]
    missing = [Table("What runs lack", (), rows)] if rows else []
    folded = [(f"All settings of {name}", settings_table(name, run)) for name, run in named.items()]
    return [
        Section("Runs", tables=[runs_table(groups), *missing]),
        *losses_section(groups),
        *scores_section(groups),
        *routers,
        Section("Settings", folded=folded),
    ]


def runs_table(groups: list[RunGroup]) -> Table:
    rows = []
    for group in groups:
        seeds = ", ".join(NONE if run.seed is None else str(run.seed) for run in group.runs)
        steps = dict.fromkeys(f"{run.logged_steps:,}" for run in group.runs if group.trained)
        rows.append([group.name, seeds, ", ".join(steps) or NONE, *(show(group.over(n), n, SD) for n in SHOWN)])
    caption = (
        "Means over seeds, with standard deviations. Final loss: the mean of the last tenth of the steps. A step's "
    )
    caption += (
        "time is the median, and compares methods only where nothing ran beside them; memory is the main process's."
    )
    return Table(caption, ["method", "seed", "steps", *(QUANTITIES[name].label for name in SHOWN)], rows)


def losses_section(groups: list[RunGroup]) -> list[Section]:
    curves = [(group.name, run.losses, run.val_losses) for group in groups for run in group.runs]
    curves = [curve for curve in curves if any(curve[1:])]
    if not curves:
        return []
    caption = (
        "Losses: training as lines, faint behind them the single steps; validation as marks, the lowest in a ring."
    )
    return [Section("Losses", figures={caption: charts.losses(curves)})]


def scores_section(groups: list[RunGroup]) -> list[Section]:
    columns = runs.columns_of(groups)
    if not columns:
        return []
    column = runs.headlines(columns)[0]
    shown = [group for group in groups if group.score(column, "robust")]
    shown = [group for group in shown if not group.trained or all(map(group.over, charts.PRICES))]
    caption = f"Scores: {column} against trained parameters, time of training and memory."
    figures = {caption: charts.tradeoff(shown, "robust", column)} if any(group.trained for group in shown) else {}
    rows = [[group.name, *(score_cell(group, c, rule) for c in columns for rule in RULES)] for group in groups]
    head = ["method", *(f"{column}, {rule} %" for column in columns for rule in RULES)]
    note = (
        "published: the rule behind the paper's tables; robust: what a reader would take as the answer. ± is half of "
    )
    note += "the 95 % interval over the test rows, sd the standard deviation over seeds."
    return [Section("Scores", note, figures, [Table("Percent right, with the number of rows", head, rows)])]


def score_cell(group: RunGroup, column: str, rule: str) -> str:
    score = group.score(column, rule)
    if score is None:
        return NONE
    text = f"{score.mean:.1f}" + ("" if score.half_width is None else f" ± {score.half_width:.1f}")
    if score.deviation is None:
        return text
    return f"{text}\nseeds {', '.join(f'{value:.1f}' for value in score.values)}; sd {score.deviation:.1f}"


def router_section(name: str, run: Run) -> list[Section]:
    """What a run's router statistics say; nothing where it has none."""
    file = run.path / "gates.json"
    if not file.exists():
        return []
    statistics = read_statistics(file)
    with runs.expecting(file, "router statistics as `python -m inspection gates` writes them"):
        data, counts = brief(statistics["source"].get("data"), 80), statistics["counts"]
        note = (
            f"Read: {data}, {counts['prompt']:,} tokens of prompts and {counts['answer']:,} of answers. A gate is the "
        )
        note += "weight of its adapter: 0 where a sparse router's threshold is above it."
        caption = f"Routers of {name}: mean weights; beside them lines by layer, from 0 to 1."
        return [Section(f"Routers of {name}", note, {caption: charts.routers(statistics)})]


def settings_table(name: str, run: Run) -> Table:
    """A run's whole record, and how each test was answered."""
    parts = {key: value for key, value in (run.record or {}).items() if isinstance(value, dict)}
    parts["run"] = {key: value for key, value in (run.record or {}).items() if key not in parts}
    parts |= {f"answers to {test}": settings for test, settings in run.answer_settings.items()}
    rows = [[f"{part}: {key}", brief(value, 400)] for part, own in parts.items() for key, value in own.items()]
    return Table(f"All settings of {name}", ["setting", "value"], rows)
