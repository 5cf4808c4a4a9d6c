"""The section of costs: time, memory and size of each method."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from inspection.page.figures import bars
from inspection.page.lines import Line, Spread, brief, is_number
from inspection.page.marks import PLAIN, Style
from inspection.page.markup import Column, Html, Part, el, table
from inspection.page.overview import memory, parameters, peak_memory, seconds_per_step
from inspection.runs import Run
from moa.reading import parse_json, read_text


class Costs(NamedTuple):
    """What `python -m benchmarks.cost --json` wrote: figures by method, and what was measured."""

    methods: dict[str, dict[str, float]]
    task: dict[str, Any]


def read_costs(path: Path) -> Costs:
    """ValueError naming the file where it is something else."""
    value = parse_json(read_text(path), str(path))
    groups = [value.get(name) for name in ("methods", "peers")] if isinstance(value, dict) else [None]
    if not all(isinstance(one, dict) for one in groups):
        raise ValueError(f"{path}: not what `python -m benchmarks.cost --json` writes")
    named = {"base": value.get("base")} | groups[0] | groups[1]
    known = {name: one for name, one in named.items() if isinstance(one, dict)}
    task = value.get("task")
    numbers = {brief(name, 60): {k: float(v) for k, v in one.items() if is_number(v)} for name, one in known.items()}
    return Costs(numbers, task if isinstance(task, dict) else {})


def section(datasets: dict[str, list[Line]], costs: Costs | None) -> Html | None:
    """The section, None where no run was trained and nothing was measured."""
    parts: list[Part] = []
    for dataset, lines in datasets.items():
        trained = [line for line in lines if any(run.log for run in line.runs)]
        if trained:
            parts += [el("h3", f"Costs on {dataset}"), *_dataset(dataset, trained)]
    if parts:
        told = "From the runs' logs: times compare methods only if the runs had the machine to themselves."
        parts.insert(0, el("p", told, class_="note"))
    if costs is not None:
        looks = {line.name: line.look for lines in datasets.values() for line in reversed(lines)}
        parts = [el("h3", "Costs on equal terms"), *_measured(costs, looks), *parts]
    if not parts:
        return None
    return el("section", el("h2", "Costs", id="costs"), *parts)


_MEASURED = {
    "trainable": Column("trained parameters", True),
    "seconds_per_step": Column("s per step", True),
    "seconds_per_epoch": Column("min per epoch", True),
    "peak_memory_bytes": Column("peak memory", True),
    "seconds_per_answer": Column("s per answer", True),
}
_WRITTEN = {
    "trainable": (1, "{:,.0f}"),
    "seconds_per_step": (1, "{:.2f} s"),
    "seconds_per_epoch": (60, "{:,.1f} min"),
    "peak_memory_bytes": (2**30, "{:.2f} GiB"),
    "seconds_per_answer": (1, "{:.3f} s"),
}


def _measured(costs: Costs, looks: dict[str, Style]) -> list[Part]:
    said = ", ".join(f"{key} {brief(value, 60)}" for key, value in costs.task.items())
    figures = []
    for name, what in (("seconds_per_epoch", "an epoch, minutes"), ("seconds_per_answer", "an answer, seconds")):
        rows = [(kind, one.get(name), _as(name, one), looks.get(kind, PLAIN)) for kind, one in costs.methods.items()]
        title = f"Time of {what}"
        figures.append(el("figure", bars(title, "A bar per method.", rows), el("figcaption", title)))
    rows = [[kind, *(_as(name, one) for name in _MEASURED)] for kind, one in costs.methods.items()]
    caption = "Measured in turn on the same rows by python -m benchmarks.cost"
    shown = table(caption, [Column("method"), *_MEASURED.values()], rows)
    return [el("p", f"What was measured: {said}.", class_="note"), el("div", *figures, class_="figures"), shown]


def _as(name: str, figures: dict[str, float]) -> str:
    unit, written = _WRITTEN[name]
    return written.format(figures[name] / unit) if name in figures else "not known"


def _dataset(dataset: str, lines: Sequence[Line]) -> list[Part]:
    time = [(line, line.over(seconds_per_step)) for line in lines]
    peaks = [(line, line.over(peak_memory)) for line in lines]
    return [
        el(
            "div",
            _figure(f"Time of a training step on {dataset}", "seconds, median of the steps", time, 1, "{:.2f} s"),
            _figure(f"Peak memory on {dataset}", "GiB, largest of the main process", peaks, 2**30, "{:.2f} GiB"),
            class_="figures",
        ),
        _table(dataset, lines),
    ]


def _figure(title: str, name: str, found: list[tuple[Line, Spread | None]], unit: float, written: str) -> Html:
    values = [(line, None if one is None else one.mean / unit) for line, one in found]
    rows = [(line.name, v, "not known" if v is None else written.format(v), line.look) for line, v in values]
    return el("figure", bars(title, f"A bar per method: {name}.", rows), el("figcaption", f"{title}: {name}."))


def _table(dataset: str, lines: Sequence[Line]) -> Html:
    columns = [Column("method"), Column("steps", True), Column("rows per step", True), Column("s per step", True)]
    columns += [Column("training so far", True), Column("tokens/s", True), Column("peak memory", True)]
    columns += [Column("trained parameters", True), Column("adapter file", True)]
    rows = []
    for line in lines:
        rows.append(
            [
                line.name,
                _mean(line, lambda run: float(len(run.log)) if run.log else None, "{:,.0f}"),
                _mean(line, lambda run: _recorded(run, "rows_per_step"), "{:,.0f}"),
                _mean(line, seconds_per_step, "{:.2f}"),
                _mean(line, _seconds, "{:,.1f} min", 1 / 60),
                _mean(line, tokens_per_second, "{:,.0f}"),
                memory(line),
                parameters(line),
                _mean(line, adapter_bytes, "{:,.1f} MB", 1e-6),
            ]
        )
    return table(f"What training cost on {dataset}, means over seeds", columns, rows)


def _mean(line: Line, value: Callable[[Run], float | None], written: str, unit: float = 1.0) -> str:
    found = line.over(value)
    return "not known" if found is None else written.format(found.mean * unit)


def _recorded(run: Run, name: str) -> float | None:
    value = (run.record or {}).get(name)
    return float(value) if is_number(value) else None


def _seconds(run: Run) -> float | None:
    found = [entry["seconds"] for entry in run.log if is_number(entry.get("seconds"))]
    return math.fsum(found) if found else None


def tokens_per_second(run: Run) -> float | None:
    """Over all logged steps."""
    pairs = [(entry.get("tokens"), entry.get("seconds")) for entry in run.log]
    known = [(tokens, seconds) for tokens, seconds in pairs if is_number(tokens) and is_number(seconds)]
    time = math.fsum(seconds for _, seconds in known)
    return sum(tokens for tokens, _ in known) / time if time > 0 else None


def adapter_bytes(run: Run) -> float | None:
    """The size of adapter.pth."""
    file = run.path / "adapter.pth"
    return float(file.stat().st_size) if file.is_file() else None
