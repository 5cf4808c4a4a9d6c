"""All charts, of the command `figures` and of the report."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, combinations
from statistics import StatisticsError, correlation
from typing import Any, NamedTuple

from inspection.chart_style import (
    DASHES,
    GRID,
    MARKS,
    SMALL,
    colour,
    colour_bar,
    heatmap,
    layer_ticks,
    look,
    new_figure,
)
from inspection.router_file import part_of, slots_of
from inspection.runs import RULES, RunGroup

Named = tuple[str, dict[str, Any]]  # a name to show, and router statistics
Curve = tuple[str, int, list[tuple[int, float]]]  # a name for the legend ("": none), number of its look, (step, loss)


class Panel(NamedTuple):
    """Axes of the figure of gates. kind: gates, or what stands beside those of a sparse router."""

    kind: str
    name: str
    statistics: dict[str, Any]
    width: float


def gates(all_named: Sequence[Named], part: str) -> Any:
    """Mean gates, layer by slot, on one scale, two of the statistics side by side; beside those of a sparse router its
    mean threshold, within the 5 to 95 % of the tokens' thresholds, and the adapters used per token."""
    bands = [[p for named in all_named[i : i + 2] for p in _panels(*named, part)] for i in range(0, len(all_named), 2)]
    widest = max(sum(panel.width for panel in band) for band in bands)
    n_layers = max(statistics["n_layers"] for _, statistics in all_named)
    figure = new_figure(0.45 + (1.25 + 0.1 * max(n_layers, 12)) * len(bands))
    means = [m for _, s in all_named for block in s["blocks"] for m in part_of(block, part)["mean"]]
    low, high = math.floor(min(means) * 20 + 1e-9) / 20, math.ceil(max(means) * 20 - 1e-9) / 20  # round ends
    limits = (low, high) if high > low else (low, low + 0.05)
    for subfigure, band in zip(figure.subfigures(len(bands), 1, squeeze=False)[:, 0], bands, strict=True):
        room = widest - sum(panel.width for panel in band)
        widths = [panel.width for panel in band] + [room] * (room > 0)
        grid = subfigure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        for axes in grid[len(band) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid, band, strict=False):
            _draw_panel(axes, panel, part, limits)
            axes.tick_params(labelleft=axes is grid[0])
        grid[0].set_ylabel("layer")
    label = "mean gate" if part == "all" else f"mean gate, tokens of {part}s"
    colour_bar(figure, grid[0].collections[0], grid, label)  # on the last band, whose first panel is of gates
    return figure


def _panels(name: str, statistics: dict[str, Any], part: str) -> list[Panel]:
    panels = [Panel("gates", name, statistics, 0.3 + 0.14 * len(slots_of(statistics)))]
    if any("threshold" in part_of(block, part) for block in statistics["blocks"]):
        panels += [Panel(kind, name, statistics, 0.42) for kind in ("threshold", "used")]
    return panels


def _draw_panel(axes: Any, panel: Panel, part: str, limits: tuple[float, float]) -> None:
    n_layers, slots = panel.statistics["n_layers"], slots_of(panel.statistics)
    blocks = sorted(panel.statistics["blocks"], key=lambda block: block["layer"])
    if panel.kind == "gates":
        gates = {
            block["layer"]: dict(zip(block["slots"], part_of(block, part)["mean"], strict=True)) for block in blocks
        }
        heatmap(axes, [[gates.get(layer, {}).get(slot) for slot in slots] for layer in range(n_layers)], limits)
        axes.set_title(panel.name)
        axes.set_xticks([i + 0.5 for i in range(len(slots))], slots, rotation=90)
        return
    parts, layers = [part_of(block, part) for block in blocks], [block["layer"] + 0.5 for block in blocks]
    axes.set_title("threshold" if panel.kind == "threshold" else "adapters\nused")
    if panel.kind == "threshold":
        low, high = ([numbers["threshold"]["quantiles"][i] for numbers in parts] for i in (0, -1))
        axes.fill_betweenx(layers, low, high, color=colour(0), alpha=0.25, linewidth=0)
    else:
        axes.set_xlim(0, len(slots) + 0.3)
    axes.plot([numbers[panel.kind]["mean"] for numbers in parts], layers, color=colour(0), marker="o", markersize=2)
    axes.grid(axis="x", **GRID)
    axes.locator_params(axis="x", nbins=3, integer=panel.kind == "used")
    axes.set_ylim(n_layers, 0)
    layer_ticks(axes, n_layers)


def spread(all_named: Sequence[Named], part: str) -> Any:
    """How the gates of each slot are spread over tokens and layers: the share of gates at most as large as the axis
    says, a line for each of the statistics. A line begins at the share of gates that are off."""
    slots = list(dict.fromkeys(slot for _, statistics in all_named for slot in slots_of(statistics)))
    columns = min(4, len(slots))
    rows = math.ceil(len(slots) / columns)
    figure = new_figure(0.6 + 1.35 * rows + 0.16 * math.ceil(len(all_named) / 3))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for axes, slot in zip(grid.flat, slots, strict=False):
        axes.set_title(slot, pad=3)
        for i, (name, statistics) in enumerate(all_named):
            parts = [(b["slots"].index(slot), part_of(b, part)) for b in statistics["blocks"] if slot in b["slots"]]
            count = sum(numbers["count"] for _, numbers in parts)
            if count:
                on = sum(numbers["active"][j] * numbers["count"] for j, numbers in parts) / count
                bins = map(sum, zip(*(numbers["histogram"][j] for j, numbers in parts), strict=True))
                shares = [total / count for total in accumulate(bins)]
                ends = [k / len(shares) for k in range(len(shares) + 1)]
                (handles[name],) = axes.plot(ends, [1 - on, *shares], **look(i), markevery=(3 + 4 * i, 12))
        axes.set(xlim=(0, 1), ylim=(0, 1.02), yticks=[0, 0.5, 1])
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.grid(**GRID)
    for i, axes in enumerate(grid.flat):
        axes.set_visible(i < len(slots))
        axes.tick_params(labelbottom=i + columns >= len(slots))
    figure.supxlabel("gate" if part == "all" else f"gate, tokens of {part}s")
    figure.supylabel("share of gates up to it")
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(3, len(handles)))
    return figure


def agreement(all_named: Sequence[Named], part: str) -> list[str]:
    """How alike two of the statistics route: Pearson's correlation of their mean gates over layers and slots."""
    means = {
        name: {
            (block["layer"], slot): mean
            for block in statistics["blocks"]
            for slot, mean in zip(block["slots"], part_of(block, part)["mean"], strict=True)
        }
        for name, statistics in all_named
    }
    lines = []
    for (first, a), (second, b) in combinations(means.items(), 2):
        both = sorted(a.keys() & b.keys())
        try:
            r = correlation([a[key] for key in both], [b[key] for key in both])
        except StatisticsError:  # fewer than two numbers, or all the same
            continue
        lines.append(f"mean gates of {first} and {second}: correlation {r:.3f} over {len(both)} layers and slots")
    return lines


def chooses(statistics: dict[str, Any]) -> bool:
    """Whether the routers of experts leave some out; else all loads are 1 and the weights tell more."""
    return any(load < 1 for mixture in statistics["experts"] for load in mixture["parts"]["all"]["load"])


def loads(name: str, statistics: dict[str, Any], part: str, show: str) -> Any:
    """A heat map per slot, layer by expert, of the share of tokens that chose each expert (show: load) or of its mean
    weight (mean); beside it the balance of the mean weights (solid) and the entropy of a token's own (dashed)."""
    slots = list(dict.fromkeys(mixture["slot"] for mixture in statistics["experts"]))
    parts = {(mixture["layer"], mixture["slot"]): mixture["parts"][part] for mixture in statistics["experts"]}
    n, n_layers = max(mixture["experts"] for mixture in statistics["experts"]), statistics["n_layers"]
    columns = min(5, len(slots))
    rows = math.ceil(len(slots) / columns)
    figure = new_figure(1.2 + rows * (0.4 + 0.09 * max(n_layers, 12)))
    grid = figure.subplots(rows, 2 * columns, width_ratios=[2, 1] * columns, sharey=True, squeeze=False)
    flat, high = list(grid.flat), max(value for numbers in parts.values() for value in numbers[show])
    for axes in flat[2 * len(slots) :]:
        axes.set_visible(False)
    for slot, heat, lines in zip(slots, flat[::2], flat[1::2], strict=False):
        layers = [layer for layer in range(n_layers) if (layer, slot) in parts]
        cells = [parts[layer, slot][show] if layer in layers else [None] * n for layer in range(n_layers)]
        mesh = heatmap(heat, cells, (0, high))
        heat.set(title=slot, xlabel="expert")
        heat.set_xticks([i + 0.5 for i in sorted({0, n - 1})], [str(i) for i in sorted({0, n - 1})])
        for i, measure in enumerate(("balance", "entropy")):
            values = [parts[layer, slot][measure] for layer in layers]
            lines.plot(values, [layer + 0.5 for layer in layers], color=colour(i), linestyle=DASHES[i], label=measure)
        lines.set(xlim=(-0.05, 1.05), xticks=[0, 1], ylim=(n_layers, 0))
        lines.tick_params(left=False)
    for axes in grid[:, 0]:
        axes.set_ylabel("layer")
    figure.legend(*flat[1].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.suptitle(name, x=0.02, ha="left")
    colour_bar(figure, mesh, flat, "share of tokens that chose the expert" if show == "load" else "mean weight of it")
    return figure


def losses(curves: Sequence[Curve], smooth: int) -> Any:
    """Loss by step: the mean of the last `smooth` steps as a line, the steps themselves faint behind it."""
    figure = new_figure(3.2)
    axes, ends, last = figure.subplots(), [], 1
    for i, (name, style, points) in enumerate(curves):
        steps, values = zip(*points, strict=True)
        sums = [0.0, *accumulate(values)]
        means = [(sums[k + 1] - sums[max(0, k + 1 - smooth)]) / min(k + 1, smooth) for k in range(len(values))]
        axes.plot(steps, values, color=colour(style), alpha=0.15, linewidth=0.6)
        every = max(1, len(steps) // 8)
        axes.plot(steps, means, label=name or None, **look(style), markevery=(i * every // len(curves), every))
        ends, last = ends + means[len(means) // 10 :], max(last, steps[-1])
    axes.set_xlabel("step")
    axes.set_ylabel("training loss" if smooth == 1 else f"training loss, mean of the last {smooth} steps")
    room = (max(ends) - min(ends)) * 0.25 or 0.1
    axes.set_ylim(min(ends) - room, max(ends) + room)  # single steps may go beyond
    axes.set_xlim(0, last + 1)
    axes.grid(axis="y", **GRID)
    figure.legend(loc="outside right center")
    return figure


def scores(groups: Sequence[RunGroup], columns: Sequence[str]) -> Any:
    """Scores by both rules, a panel per column, a row per group: means over seeds with the 95 % intervals over the test
    rows, and single seeds as upright ticks."""
    across = min(3, len(columns))
    rows = math.ceil(len(columns) / across)
    figure = new_figure(0.35 + rows * (0.5 + 0.22 * len(groups)))
    grid = figure.subplots(rows, across, sharey=True, squeeze=False)
    handles = {}
    for axes, column in zip(grid.flat, columns, strict=False):
        axes.set_title(column if len(columns) == 1 or len(column) < 36 else column[:35] + "…")
        for y, group in enumerate(groups):
            for i, rule in enumerate(RULES):
                score, height = group.score(column, rule), y + 0.32 * (i - 0.5)
                if score is None:
                    continue
                half = score.half_width or 0.0
                ends = [[min(half, score.mean)], [min(half, 100 - score.mean)]]
                style = {"color": colour(i), "marker": MARKS[i], "linestyle": "none", "elinewidth": 0.8}
                handles[rule] = axes.errorbar(score.mean, height, xerr=ends, capsize=1.5, **style)
                if score.deviation is not None:
                    axes.plot(score.values, [height] * len(score.values), "|", color=colour(i), markersize=5)
        axes.grid(axis="x", **GRID)
    grid[0, 0].set_yticks(range(len(groups)), [group.name for group in groups])
    grid[0, 0].set_ylim(len(groups) - 0.5, -0.5)
    for axes in list(grid.flat)[len(columns) :]:
        axes.set_visible(False)
    figure.supxlabel("percent right")
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=2)
    return figure


class Measure(NamedTuple):
    """A number on an axis: its name, and how far to divide it to get the axis's unit."""

    label: str
    unit: float
    log: bool = False


MEASURES = {
    "trainable_parameters": Measure("trainable parameters", 1, log=True),
    "seconds": Measure("time of training, minutes", 60),
    "peak_memory_bytes": Measure("peak memory, GB", 1e9),
}


def tradeoff(groups: Sequence[RunGroup], rule: str, column: str) -> Any:
    """The score of each group against what it trained, how long that took, and its memory. A bar reaches a standard
    deviation over the seeds to both sides; with one seed it is the 95 % interval that the number of test problems
    leaves. Groups that trained nothing are a dashed line."""
    figure = new_figure(3.1)
    grid = figure.subplots(1, len(MEASURES), sharey=True)
    tuned = [group for group in groups if group.trained]
    for axes, (name, measure) in zip(grid, MEASURES.items(), strict=True):
        for group in groups:
            score = group.score(column, rule)
            if not group.trained:
                axes.axhline(score.mean, color="#555555", linestyle=(0, (2, 2)), linewidth=0.8, label=group.name)
                continue
            i, x = tuned.index(group), group.over(name).mean / measure.unit
            half = score.deviation if score.deviation is not None else score.half_width or 0.0
            axes.vlines(x, max(0.0, score.mean - half), score.mean + half, color=colour(i), alpha=0.3, linewidth=0.8)
            axes.plot(x, score.mean, label=group.name, **look(i) | {"linestyle": "none", "markersize": 5})
        sizes = [group.over(name).mean for group in tuned]
        if measure.log and max(sizes) > 3 * min(sizes) > 0:
            axes.set_xscale("log")
        else:
            axes.locator_params(axis="x", nbins=3)
        axes.margins(0.12)
        axes.set_xlabel(measure.label)
        axes.grid(**GRID)
    grid[0].set_ylabel(f"{column}, {rule} rule, %")
    columns = 5 if max(len(group.name) for group in groups) < 22 else 2
    legend = {"ncols": columns, "columnspacing": 1.2, "handletextpad": 0.4}
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", **legend)
    return figure


COSTS = {
    "seconds_per_epoch": Measure("an epoch, hours", 3600),
    "seconds_per_step": Measure("a step, seconds", 1),
    "peak_memory_bytes": Measure("peak memory, GB", 1e9),
    "seconds_per_answer": Measure("an answer, seconds", 1),
}


def costs(methods: Mapping[str, Mapping[str, float]]) -> Any:
    """Bars for each method, a panel for each cost that was measured, with the numbers at the bars' ends."""
    shown = [name for name in COSTS if any(name in numbers for numbers in methods.values())]
    shown = [name for name in shown if name != "seconds_per_step" or "seconds_per_epoch" not in shown]
    figure = new_figure(0.7 + 0.19 * len(methods))
    grid = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for i, (axes, name) in enumerate(zip(grid, shown, strict=True)):
        measure = COSTS[name]
        if name == "seconds_per_epoch" and max(numbers.get(name, 0) for numbers in methods.values()) < 3 * 3600:
            measure = Measure("an epoch, minutes", 60)
        widths = {y: numbers[name] / measure.unit for y, numbers in enumerate(methods.values()) if name in numbers}
        bars = axes.barh(list(widths), list(widths.values()), height=0.65, color=colour(i))
        for y in set(range(len(methods))) - set(widths):
            axes.text(0, y, " not measured", va="center", fontsize=SMALL, color="#555555")
        axes.bar_label(bars, [f"{width:#.3g}".rstrip(".") for width in widths.values()], padding=2, fontsize=SMALL)
        axes.set(xlim=(0, 1.25 * max(widths.values())), xlabel=measure.label)
        axes.locator_params(axis="x", nbins=4)
    grid[0].set_yticks(range(len(methods)), list(methods))
    grid[0].invert_yaxis()
    return figure
