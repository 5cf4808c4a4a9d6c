"""Runs and methods compared: what accuracy costs, and what methods cost."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any, NamedTuple

from inspection.plots import style
from inspection.runs import Run


class Measure(NamedTuple):
    """One number of a run: its name on the axis, and how far to divide it to get the axis's unit."""

    label: str
    unit: float
    log: bool = False


MEASURES = {
    "trainable_parameters": Measure("trainable parameters", 1, log=True),
    "seconds": Measure("time of training, minutes", 60),
    "peak_memory_bytes": Measure("peak memory, GB", 1e9),
}


def tradeoff(runs: Sequence[Run], rule: str) -> Any:
    """Mean score of each method against what it trained, how long that took, and its memory; a mark per method, at the
    means over its seeds. A bar reaches a standard deviation over the seeds to both sides; with one seed it is the 95 %
    interval that the number of test problems leaves. Runs that trained nothing are a dashed line."""
    by_method: dict[str, list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    figure = style.new_figure(3.1)
    grid = figure.subplots(1, len(MEASURES), sharey=True)
    for axes, (name, measure) in zip(grid, MEASURES.items(), strict=True):
        trained = 0
        for method, own in by_method.items():
            scores = [run.mean_score(rule) for run in own]
            if own[0].record is None:
                axes.axhline(mean(scores), color="#555555", linestyle=(0, (2, 2)), linewidth=0.8, label=method)
                continue
            place = mean([getattr(run, name) for run in own]) / measure.unit
            look = {"color": style.colour(trained), "marker": style.mark(trained), "linestyle": "none", "markersize": 5}
            axes.vlines(place, *_interval(own, scores, rule), color=style.colour(trained), alpha=0.3, linewidth=0.8)
            axes.plot(place, mean(scores), label=method, **look)
            trained += 1
        if measure.log:
            axes.set_xscale("log")
        axes.margins(0.12)
        axes.set_xlabel(measure.label)
        axes.grid(linewidth=0.4, color="#cccccc")
        axes.set_axisbelow(True)
    grid[0].set_ylabel(f"mean score, {rule} rule, %")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, columnspacing=1.2, handletextpad=0.4)
    return figure


def _interval(runs: list[Run], scores: list[float], rule: str) -> tuple[float, float]:
    half = stdev(scores) if len(runs) > 1 else runs[0].half_width(rule) or 0.0
    return max(0.0, mean(scores) - half), mean(scores) + half


COSTS = {
    "seconds_per_epoch": Measure("an epoch, hours", 3600),
    "seconds_per_step": Measure("a step, seconds", 1),
    "peak_memory_bytes": Measure("peak memory, GB", 1e9),
    "seconds_per_answer": Measure("an answer, seconds", 1),
}


def costs(methods: dict[str, dict[str, float]]) -> Any:
    """Bars for each method, a panel for each cost that was measured, with the numbers at the bars' ends."""
    shown = [name for name in COSTS if any(isinstance(one.get(name), (int, float)) for one in methods.values())]
    shown = [name for name in shown if name != "seconds_per_step" or "seconds_per_epoch" not in shown]
    figure = style.new_figure(0.7 + 0.19 * len(methods))
    grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for i, (axes, name) in enumerate(zip(grid, shown, strict=True)):
        measure = COSTS[name]
        if name == "seconds_per_epoch" and max(one.get(name, 0) for one in methods.values()) < 3 * 3600:
            measure = Measure("an epoch, minutes", 60)
        found = {method: one[name] / measure.unit for method, one in methods.items() if name in one}
        places = [list(methods).index(method) for method in found]
        bars = axes.barh(places, list(found.values()), height=0.65, color=style.colour(i))
        for missing in set(range(len(methods))) - set(places):
            axes.text(0, missing, " not measured", va="center", fontsize=style.SMALL, color="#555555")
        axes.bar_label(bars, [f"{value:#.3g}".rstrip(".") for value in found.values()], padding=2, fontsize=style.SMALL)
        axes.set_xlim(0, 1.25 * max(found.values()))
        axes.set_xlabel(measure.label)
        axes.locator_params(axis="x", nbins=4)
    grid[0].set_yticks(range(len(methods)), list(methods))
    grid[0].invert_yaxis()
    return figure
