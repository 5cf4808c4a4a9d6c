"""A folder of runs as one HTML page, which needs no network and no other file.

    python -m inspection report RUNS --save_path report.html

Runs are looked for at and under the folder, as exps/run.sh leaves them (DATASET/METHOD/sSEED). For each data set the
page shows an overview with what each run lacks, scores by both rules, losses, costs, what routers do (of runs with a
gates.json of `python -m inspection gates`), some answers with their verdicts, and settings. Runs that differ in their
seed alone share a row.
"""

import base64
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from cli import cli_errors, flag, parse
from inspection import chart_style, plots
from inspection.answers import read_samples
from inspection.figures import read_costs
from inspection.html import Table, write_page
from inspection.quantities import NONE, QUANTITIES, show
from inspection.router_file import read_statistics, slots_of
from inspection.runs import (
    RULES,
    Run,
    RunGroup,
    brief,
    by_dataset,
    columns_of,
    find_runs,
    group_runs,
    headlines,
)

SD = "\nsd "
LOGGED = ("trainable_parameters", "rows_per_step", "seconds_per_step", "seconds", "tokens_per_s")
LOGGED += ("peak_memory_bytes", "adapter_bytes")


@dataclass(frozen=True)
class Flags:
    runs: str = flag(help="folder of runs", positional=True)
    save_path: str = flag("report.html", help="HTML file to write; replaced if it exists")
    samples: int = flag(
        1, least=0, help="answers shown per test and run of each kind: right, wrong, judged differently"
    )
    costs: str | None = flag(None, help="what `python -m benchmarks.step --json FILE` wrote: times on equal terms")
    title: str | None = flag(None, help="the page's title; default: the folder's name")

    def __post_init__(self):
        if not self.save_path or Path(self.save_path).is_dir():
            raise ValueError(f"--save_path {self.save_path!r} must be the path of a file")


class Section(NamedTuple):
    """A part of what the page shows of a data set. figures: (caption, data URI of an SVG). folded: (title, tables)."""

    title: str
    note: str = ""
    figures: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[tuple[str, Sequence[Table]]] = ()


def main(argv: Sequence[str], prog: str) -> None:
    flags = parse(Flags, argv, prog=prog, description=__doc__)
    with cli_errors(), chart_style.styled():
        runs = find_runs([flags.runs])
        costs = read_costs(Path(flags.costs)) if flags.costs else {}
        datasets = by_dataset(group_runs(runs)).items()
        values = {
            "title": flags.title or f"Runs in {Path(flags.runs).resolve().name}",
            "date": time.strftime("%Y-%m-%d"),
            "n_runs": len(runs),
            "datasets": {name: _sections(groups, flags.samples) for name, groups in datasets},
            "measured": [_figure("Costs measured on equal terms", plots.costs(costs))] if costs else [],
        }
        write_page(Path(flags.save_path), "report.html.j2", **values)
        incomplete = sum(bool(run.problems) for run in runs)
        print(f"{flags.save_path}: {len(runs)} runs" + (f", {incomplete} of them incomplete" if incomplete else ""))


def _figure(caption: str, figure: Any) -> tuple[str, str]:
    return caption, "data:image/svg+xml;base64," + base64.b64encode(chart_style.image(figure, "svg")).decode()


def _sections(groups: list[RunGroup], per_kind: int) -> list[Section]:
    """What the page shows of one data set."""
    named = {group.run_name(run): run for group in groups for run in group.runs}
    columns, tuned = columns_of(groups), [group for group in groups if group.trained]
    problems, answers, routers = {}, [], []
    for name, run in named.items():
        tables, notes = read_samples(run, per_kind)
        answers += [(f"Answers of {name}", tables)] if tables else []
        try:
            routers += _routers(name, run)
        except ValueError as error:
            notes.append(str(error).replace(f"{run.path}/", ""))
        notes = run.problems + _untested(run, columns) + notes
        problems |= {name: notes} if notes else {}
    sections = [_overview(groups, headlines(columns), problems), _missing(problems | _absent_seeds(tuned))]
    sections += [_scores(groups, columns)] if columns else []
    sections += [_losses(tuned), _costs(tuned)] if any(group.over("seconds") for group in tuned) else []
    note = "Of each test the first answers that are right under both rules, wrong under both, and judged differently."
    sections += routers + ([Section("Answers", note, folded=answers)] if answers else [])
    return [*sections, _configuration(named)]


def _overview(groups: list[RunGroup], columns: list[str], problems: dict[str, list[str]]) -> Section:
    rows = []
    for group in groups:
        lacking = sum(bool(run.problems) for run in group.runs)
        state = "complete, see notes" if any(group.run_name(run) in problems for run in group.runs) else "complete"
        state = f"{lacking} of {len(group.runs)} incomplete" if lacking else state
        seeds = ", ".join(NONE if run.seed is None else str(run.seed) for run in group.runs)
        steps = {f"{run.logged_steps:,}": None for run in group.runs if group.trained}
        row = [group.name, seeds, state, ", ".join(steps) or NONE, show(group.over("final_loss"), "final_loss", SD)]
        rows.append(row + _score_cells(group, columns))
    head = ["method", "seeds", "state", "steps", "final loss", *_score_heads(columns)]
    note = (
        "± is half of a score's 95 % interval over the test rows, in points; sd the standard deviation over seeds. The "
        "final loss is the mean of the last tenth of the logged steps."
    )
    return Section("Overview", note, tables=[Table(f"The methods; {NONE}: not trained, or not known", head, rows)])


def _score_heads(columns: list[str]) -> list[str]:
    return [f"{column}, {rule} %" for column in columns for rule in RULES]


def _score_cells(group: RunGroup, columns: list[str]) -> list[str]:
    cells = []
    for score in (group.score(column, rule) for column in columns for rule in RULES):
        text = NONE if score is None else f"{score.mean:.1f}"
        text += f" ± {score.half_width:.1f}" if score and score.half_width is not None else ""
        if score and score.deviation is not None:
            text += f"\nseeds {', '.join(f'{value:.1f}' for value in score.values)}; sd {score.deviation:.1f}"
        cells.append(text)
    return cells


def _untested(run: Run, columns: list[str]) -> list[str]:
    """Tests that others have been scored on, and this run has not. (A run without any scores says so already.)"""
    scored, tests = ({name.partition(" (")[0]: None for name in names} for names in (run.scores, columns))
    absent = [test for test in tests if test not in scored and not test.startswith("mean, ")]
    return [f"not scored on {', '.join(absent)}, as other runs are"] if run.scores and absent else []


def _absent_seeds(groups: list[RunGroup]) -> dict[str, list[str]]:
    """Seeds that only some of the methods have a run of."""
    seeds: dict[str, set[int | None]] = {}
    for group in groups:
        seeds.setdefault(group.method, set()).update(run.seed for run in group.runs)
    every = sorted(set().union(*seeds.values()) - {None})
    absent = {seed: [method for method, own in seeds.items() if seed not in own] for seed in every}
    return {f"seed {seed}": [f"no run of {', '.join(methods)}"] for seed, methods in absent.items() if methods}


def _missing(problems: dict[str, list[str]]) -> Section:
    if not problems:
        return Section("What is missing", "Nothing: every run is trained to its last step, answered and scored.")
    rows = [[name, "\n".join(sentences)] for name, sentences in problems.items()]
    return Section("What is missing", tables=[Table("What each run lacks", (), rows)])


def _scores(groups: list[RunGroup], columns: list[str]) -> Section:
    scored = [group for group in groups if any(run.scores for run in group.runs)]
    caption = "Percent right by both rules, with 95 % intervals over the test rows; upright ticks are single seeds."
    figures, column = [_figure(caption, plots.scores(scored, columns))], headlines(columns)[0]
    scored = [group for group in scored if group.score(column, "robust")]
    tuned = [group for group in scored if all(map(group.over, plots.PRICES))]
    if len(tuned) > 1:
        caption = f"{column} against trained parameters, time of training and memory."
        untuned = [group for group in scored if not group.trained]
        figures.append(_figure(caption, plots.tradeoff(untuned + tuned, "robust", column)))
    rows = [[group.name, *_score_cells(group, columns)] for group in groups]
    caption = "Scores of each test, with the number of rows that were answered"
    note = (
        "published: the rule behind the paper's tables; robust: what a reader would take as the answer. Where "
        "intervals overlap widely, methods may be alike."
    )
    table = Table(caption, ["method", *_score_heads(columns)], rows)
    return Section("Scores", note, figures, [table])


def _losses(groups: list[RunGroup]) -> Section:
    logged = [(group.name, i, [run.losses for run in group.runs if run.losses]) for i, group in enumerate(groups)]
    curves = [("" if k else name, i, losses) for name, i, runs in logged for k, losses in enumerate(runs)]
    if not curves:
        return Section("Loss curves", "No step has a loss that is a number.")
    smooth = max(1, max(len(losses) for _, _, losses in curves) // 10)
    caption = f"Loss: the mean of the last {smooth} steps, faint behind it the steps themselves; seeds share a colour."
    return Section("Loss curves", figures=[_figure(caption, plots.losses(curves, smooth))])


def _costs(groups: list[RunGroup]) -> Section:
    spreads = {group.name: {name: group.over(name) for name in plots.COSTS} for group in groups}
    costs = {method: {name: s.mean for name, s in own.items() if s} for method, own in spreads.items()}
    figure = _figure("Median time of a step, and peak memory of the main process.", plots.costs(costs))
    rows = [[group.name, *(show(group.over(name), name, SD) for name in LOGGED)] for group in groups]
    head = ["method", *(QUANTITIES[name].label for name in LOGGED)]
    note = (
        "The time of a step is the median, and compares methods only where nothing else ran beside them. The memory is "
        "the largest of the main process."
    )
    return Section("Costs", note, [figure], [Table("What training cost, means over seeds", head, rows)])


def _routers(name: str, run: Run) -> list[Section]:
    """What a run's router statistics say; nothing where it has none."""
    if not (run.path / "gates.json").exists():
        return []
    statistics, figures, tables = read_statistics(run.path / "gates.json"), [], []
    if statistics["blocks"]:
        figures.append(_figure(f"Mean gates of {name}, by layer and slot.", plots.gates([(name, statistics)], "all")))
        tables.append(_router_table(f"Gates of {name}", statistics["blocks"], slots_of(statistics)))
    if statistics["experts"]:
        column = "active" if plots.chooses(statistics) else "mean"
        caption = f"Experts of {name}, layer by expert; beside them balance and entropy."
        figures.append(_figure(caption, plots.loads(name, statistics, "all", column)))
        experts = list(map(str, range(max(mixture["experts"] for mixture in statistics["experts"]))))
        tables.append(_router_table(f"Experts of {name}", statistics["experts"], experts))
    source = statistics["source"] | {f"tokens of {part}": count for part, count in statistics["counts"].items()}
    read = [f"{key} {brief(v, 80)}" for key, v in source.items() if isinstance(v, str | int) and "sha256" not in key]
    note = (
        "A gate is the weight of its adapter: 0 where a sparse router's threshold is above it. Means over all tokens."
    )
    return [Section(f"Routers of {name}", f"{note} Read: {', '.join(read)}.", figures, folded=[("Numbers", tables)])]


def _router_table(caption: str, entries: list[dict[str, Any]], names: list[str]) -> Table:
    """Gates of blocks by slot, or weights of experts by number."""
    rows = []
    for entry in entries:
        part = entry["parts"]["all"]
        columns = zip(entry.get("slots", names), part["mean"], part["std"], part["active"], strict=False)
        cells = {name: f"{mean:.3f}\nsd {std:.3f}, on {active:.0%}" for name, mean, std, active in columns}
        layer = f"{entry['layer']} {entry.get('slot', '')}".strip()
        last = part.get("balance", part["threshold"]["mean"][0] if "threshold" in part else None)
        used = f"{part['used']['mean']:.3f}"
        rows.append([layer, *(cells.get(name, NONE) for name in names), used, NONE if last is None else f"{last:.3f}"])
    caption += ": mean, standard deviation, share of tokens with one above 0"
    return Table(caption, ["layer", *names, "used", "balance" if "slot" in entries[0] else "threshold"], rows)


def _configuration(named: dict[str, Run]) -> Section:
    """In what runs differ from most, what most share, and every run's whole record."""
    hidden = {"method", "trainable_parameters", "tests"}
    settings = {
        name: {key: brief(value, 400) for key, value in run.settings.items() if key not in hidden}
        for name, run in named.items()
    }
    usual = {}
    for key in dict.fromkeys(key for own in settings.values() for key in own):
        values = Counter(own[key] for own in settings.values() if key in own)
        value, count = values.most_common(1)[0]
        if count > 1 and 2 * count > values.total():
            usual[key] = value
    rows = []
    for name, own in settings.items():
        differing = [f"{key} {brief(value, 60)}" for key, value in own.items() if usual.get(key) != value]
        rows.append([name, ", ".join(differing) or ("as most runs" if own else "no settings are known")])
    tables = [Table("In what each run differs from most", ["run", "settings of its own"], rows)]
    tables += (
        [Table("What most runs share", ["setting", "value"], [[*pair] for pair in usual.items()])] if usual else []
    )
    folded = [(f"All settings of {name}", [_record(name, run)]) for name, run in named.items()]
    return Section("Configuration", tables=tables, folded=folded)


def _record(name: str, run: Run) -> Table:
    """A run's whole record, and how each test was answered."""
    parts = {key: value for key, value in (run.record or {}).items() if isinstance(value, dict)}
    parts["run"] = {key: value for key, value in (run.record or {}).items() if key not in parts}
    parts |= {f"answers to {test}": settings for test, settings in run.answer_settings.items()}
    rows = [[f"{part}: {key}", brief(value, 400)] for part, own in parts.items() for key, value in own.items()]
    return Table(f"All settings of {name}", ["setting", "value"], rows)
