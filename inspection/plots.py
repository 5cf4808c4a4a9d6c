"""All charts, of the command `figures` and of the report."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from inspection.chart_style import COLOURS, DASHES, MARKS, SMALL, colour_bar, heatmap, look, new_figure, panels
from inspection.quantities import QUANTITIES
from inspection.router_file import mean_gates, part_of, slots_of
from inspection.runs import RULES, RunGroup

Named = tuple[str, dict[str, Any]]  # a name to show, and router statistics
Curve = tuple[str, int, list[tuple[int, float]]]  # a name for the legend ("": none), number of its look, (step, loss)


def gates(all_named: Sequence[Named], part: str) -> Any:
    """Mean gates, layer by slot, on one scale, two of the statistics side by side; beside those of a sparse router its
    mean threshold, within the 5 to 95 % of the tokens' thresholds, and the adapters used per token."""
    bands = [all_named[i : i + 2] for i in range(0, len(all_named), 2)]
    widths = [[width for _, statistics in band for width in _widths(statistics)] for band in bands]
    widest, n_layers = max(map(sum, widths)), max(statistics["n_layers"] for _, statistics in all_named)
    means = [m for _, s in all_named for block in s["blocks"] for m in part_of(block, part)["mean"]]
    heights = [1.25 + 0.1 * max(n_layers, 12)] * len(bands)
    heights[-1] += 0.45  # the colour bar
    figure = new_figure(sum(heights))
    subfigures = figure.subfigures(len(bands), 1, squeeze=False, height_ratios=heights).flat
    for subfigure, band, columns in zip(subfigures, bands, widths, strict=True):
        columns += [widest - sum(columns)] if sum(columns) < widest else []  # empty
        grid = panels(subfigure, len(columns), len(columns), width_ratios=columns)
        rest = iter(grid)
        for name, statistics in band:
            slots = slots_of(statistics)
            axes = next(rest)
            mesh = heatmap(axes, mean_gates(statistics, part, slots, n_layers), (min(means), max(means)), name)
            axes.set_xticks(np.arange(len(slots)) + 0.5, slots, rotation=90)
            if statistics["block_router"] == "sparse":
                _threshold_and_use(next(rest), next(rest), statistics, part)
        for axes in rest:
            axes.set_visible(False)
        grid[0].set_ylabel("layer")
    colour_bar(figure, mesh, grid, "mean gate" if part == "all" else f"mean gate, tokens of {part}s")
    return figure


def _widths(statistics: dict[str, Any]) -> list[float]:
    """Of the heat map, and of what stands beside that of a sparse router."""
    return [0.3 + 0.14 * len(slots_of(statistics)), *[0.42] * 2 * (statistics["block_router"] == "sparse")]


def _threshold_and_use(threshold: Any, used: Any, statistics: dict[str, Any], part: str) -> None:
    layers = [block["layer"] + 0.5 for block in statistics["blocks"]]
    parts = [part_of(block, part) for block in statistics["blocks"]]
    low, *_, high = np.array([numbers["threshold"]["quantiles"][0] for numbers in parts]).T
    threshold.fill_betweenx(layers, low, high, color=COLOURS[0], alpha=0.25, linewidth=0)
    limits = [numbers["threshold"]["mean"][0] for numbers in parts]
    counts = [numbers["used"]["mean"] for numbers in parts]
    for axes, values, title in ((threshold, limits, "threshold"), (used, counts, "adapters\nused")):
        axes.plot(values, layers, color=COLOURS[0], marker="o", markersize=2)
        axes.grid(axis="x")
        axes.locator_params(axis="x", nbins=3, integer=axes is used)
        axes.set_title(title)
    used.set_xlim(0, len(slots_of(statistics)) + 0.3)


def spread(all_named: Sequence[Named], part: str) -> Any:
    """How the gates of each slot are spread over tokens and layers: the share of gates at most as large as the axis
    says, a line for each of the statistics. A line begins at the share of gates that are off."""
    slots = slots_of(*(statistics for _, statistics in all_named))
    columns = min(4, len(slots))
    figure = new_figure(0.6 + 1.35 * math.ceil(len(slots) / columns) + 0.16 * math.ceil(len(all_named) / 3))
    handles: dict[str, Any] = {}
    for axes, slot in zip(panels(figure, len(slots), columns), slots, strict=True):
        for i, (name, statistics) in enumerate(all_named):
            parts = [(b["slots"].index(slot), part_of(b, part)) for b in statistics["blocks"] if slot in b["slots"]]
            count = sum(numbers["count"] for _, numbers in parts)
            if count:
                on = sum(numbers["active"][j] * numbers["count"] for j, numbers in parts)
                shares = np.cumsum(sum(np.array(numbers["histogram"][j]) for j, numbers in parts)) / count
                heights = [1 - on / count, *shares]
                ends = np.linspace(0, 1, len(heights))
                (handles[name],) = axes.plot(ends, heights, **look(i), markevery=(3 + 4 * i, 12))
        axes.set_title(slot, pad=3)
        axes.set(xlim=(0, 1), ylim=(0, 1.02), yticks=[0, 0.5, 1])
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.grid()
    figure.supxlabel("gate" if part == "all" else f"gate, tokens of {part}s")
    figure.supylabel("share of gates up to it")
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(3, len(handles)))
    return figure


def agreement(all_named: Sequence[Named], part: str) -> list[str]:
    """How alike two of the statistics route: Pearson's correlation of their mean gates over layers and slots."""
    lines, slots = [], slots_of(*(statistics for _, statistics in all_named))
    n_layers = max(statistics["n_layers"] for _, statistics in all_named)
    means = [(name, mean_gates(statistics, part, slots, n_layers)) for name, statistics in all_named]
    for (first, a), (second, b) in combinations(means, 2):
        both = np.isfinite(a + b)
        if both.any() and np.ptp(a[both]) > 0 and np.ptp(b[both]) > 0:
            r = np.corrcoef(a[both], b[both])[0, 1]
            lines.append(f"mean gates of {first} and {second}: correlation {r:.3f} over {both.sum()} layers and slots")
    return lines


def chooses(statistics: dict[str, Any]) -> bool:
    """Whether the routers of experts leave some out; else all loads are 1 and the weights tell more."""
    return any(load < 1 for mixture in statistics["experts"] for load in mixture["parts"]["all"]["active"])


def loads(name: str, statistics: dict[str, Any], part: str, show: str) -> Any:
    """A heat map per slot, layer by expert, of the share of tokens that chose each expert (show: active) or of its
    mean weight (mean); beside it the balance of the mean weights (solid) and the entropy of a token's own (dashed)."""
    slots = list(dict.fromkeys(mixture["slot"] for mixture in statistics["experts"]))
    n, n_layers = max(mixture["experts"] for mixture in statistics["experts"]), statistics["n_layers"]
    high = max(value for mixture in statistics["experts"] for value in mixture["parts"][part][show])
    columns = min(5, len(slots))
    figure = new_figure(1.2 + math.ceil(len(slots) / columns) * (0.4 + 0.09 * max(n_layers, 12)))
    grid = panels(figure, 2 * len(slots), 2 * columns, width_ratios=[2, 1] * columns)
    for slot, heat, lines in zip(slots, grid[::2], grid[1::2], strict=True):
        parts = {
            mixture["layer"]: mixture["parts"][part] for mixture in statistics["experts"] if mixture["slot"] == slot
        }
        cells = np.full((n_layers, n), np.nan)
        for layer, numbers in parts.items():
            cells[layer, : len(numbers[show])] = numbers[show]
        mesh = heatmap(heat, cells, (0, high), slot)
        heat.set(xlabel="expert", ylabel="layer" if heat.get_subplotspec().is_first_col() else "")
        heat.set_xticks([0.5, n - 0.5], ["0", str(n - 1)])
        for i, measure in enumerate(("balance", "entropy")):
            values = [numbers[measure] for numbers in parts.values()]
            lines.plot(values, np.array(list(parts)) + 0.5, color=COLOURS[i], linestyle=DASHES[i], label=measure)
        lines.set(xlim=(-0.05, 1.05), xticks=[0, 1])
        lines.tick_params(left=False)
    figure.legend(*grid[1].get_legend_handles_labels(), loc="outside upper right", ncols=2)
    figure.suptitle(name, x=0.02, ha="left")
    colour_bar(figure, mesh, grid, "share of tokens that chose the expert" if show == "active" else "mean weight of it")
    return figure


def losses(curves: Sequence[Curve], smooth: int) -> Any:
    """Loss by step: the mean of the last `smooth` steps as a line, the steps themselves faint behind it."""
    figure = new_figure(3.2)
    axes, settled = figure.subplots(), []
    for i, (name, style, points) in enumerate(curves):
        steps, values = np.array(points).T
        sums, ends = np.cumsum([0, *values]), np.arange(1, len(values) + 1)
        begins = np.maximum(0, ends - smooth)
        means = (sums[ends] - sums[begins]) / (ends - begins)
        every = max(1, len(steps) // 8)
        axes.plot(steps, values, color=look(style)["color"], alpha=0.15, linewidth=0.6)
        axes.plot(steps, means, label=name or None, **look(style), markevery=(i * every // len(curves), every))
        settled += list(means[len(means) // 10 :])
    axes.set_xlabel("step")
    axes.set_ylabel("training loss" if smooth == 1 else f"training loss, mean of the last {smooth} steps")
    room = (max(settled) - min(settled)) * 0.25 or 0.1
    axes.set_ylim(min(settled) - room, max(settled) + room)  # single steps may go beyond
    axes.set_xlim(left=0)
    axes.grid(axis="y")
    figure.legend(loc="outside right center")
    return figure


def scores(groups: Sequence[RunGroup], columns: Sequence[str]) -> Any:
    """Scores by both rules, a panel per column, a row per group: means over seeds with the 95 % intervals over the test
    rows, and single seeds as upright ticks."""
    across = min(3, len(columns))
    figure = new_figure(0.35 + math.ceil(len(columns) / across) * (0.5 + 0.22 * len(groups)))
    grid, handles = panels(figure, len(columns), across), {}
    for axes, column in zip(grid, columns, strict=True):
        axes.set_title(column if len(columns) == 1 or len(column) < 36 else column[:35] + "…")
        for y, group in enumerate(groups):
            for i, rule in enumerate(RULES):
                score, height = group.score(column, rule), y + 0.32 * (i - 0.5)
                if score is None:
                    continue
                half = score.half_width or 0.0
                ends = [[min(half, score.mean)], [min(half, 100 - score.mean)]]
                style = {"color": COLOURS[i], "marker": MARKS[i], "linestyle": "none", "elinewidth": 0.8}
                handles[rule] = axes.errorbar(score.mean, height, xerr=ends, capsize=1.5, **style)
                if score.deviation is not None:
                    axes.plot(score.values, [height] * len(score.values), "|", color=COLOURS[i], markersize=5)
        axes.grid(axis="x")
    grid[0].set_yticks(range(len(groups)), [group.name for group in groups])
    grid[0].set_ylim(len(groups) - 0.5, -0.5)
    figure.supxlabel("percent right")
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=2)
    return figure


PRICES = ("trainable_parameters", "seconds", "peak_memory_bytes")


def tradeoff(groups: Sequence[RunGroup], rule: str, column: str) -> Any:
    """The score of each group against what it trained, how long that took, and its memory. A bar reaches a standard
    deviation over the seeds to both sides; with one seed it is the 95 % interval that the number of test problems
    leaves. Groups that trained nothing are a dashed line."""
    from matplotlib.ticker import EngFormatter

    figure = new_figure(3.1)
    grid = panels(figure, len(PRICES), len(PRICES))
    tuned = [group for group in groups if group.trained]
    for axes, name in zip(grid, PRICES, strict=True):
        for group in groups:
            score = group.score(column, rule)
            if not group.trained:
                axes.axhline(score.mean, color="#555555", linestyle=(0, (2, 2)), linewidth=0.8, label=group.name)
                continue
            style, x = look(tuned.index(group)), group.over(name).mean / QUANTITIES[name].unit
            half = score.deviation if score.deviation is not None else score.half_width or 0.0
            axes.vlines(
                x, max(0.0, score.mean - half), score.mean + half, color=style["color"], alpha=0.3, linewidth=0.8
            )
            axes.plot(x, score.mean, label=group.name, **style | {"linestyle": "none", "markersize": 5})
        sizes = [group.over(name).mean for group in tuned]
        if max(sizes) > 10 * min(sizes) > 0:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter("")
        else:
            axes.locator_params(axis="x", nbins=3)
        axes.xaxis.set_major_formatter(EngFormatter(sep="") if name == "trainable_parameters" else "{x:g}")
        axes.margins(0.12)
        axes.set_xlabel(QUANTITIES[name].label)
        axes.grid()
    grid[0].set_ylabel(f"{column}, {rule} rule, %")
    columns = 5 if max(len(group.name) for group in groups) < 22 else 2
    legend = {"ncols": columns, "columnspacing": 1.2, "handletextpad": 0.4}
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", **legend)
    return figure


COSTS = ("seconds_per_epoch", "seconds_per_step", "peak_memory_bytes", "seconds_per_answer")


def costs(methods: Mapping[str, Mapping[str, float]]) -> Any:
    """Bars for each method, a panel for each cost that was measured, with the numbers at the bars' ends."""
    shown = [name for name in COSTS if any(name in numbers for numbers in methods.values())]
    shown = [name for name in shown if name != "seconds_per_step" or "seconds_per_epoch" not in shown]
    figure = new_figure(0.7 + 0.19 * len(methods))
    grid = panels(figure, len(shown), len(shown))
    for i, (axes, name) in enumerate(zip(grid, shown, strict=True)):
        quantity, values = QUANTITIES[name], [numbers.get(name) for numbers in methods.values()]
        bars = axes.barh(range(len(values)), [(v or 0) / quantity.unit for v in values], height=0.65, color=COLOURS[i])
        texts = ["not measured" if value is None else quantity.show(value) for value in values]
        axes.bar_label(bars, texts, padding=2, fontsize=SMALL)
        axes.set(xlabel=quantity.label)
        axes.margins(x=0.25)
        axes.locator_params(axis="x", nbins=4)
    grid[0].set_yticks(range(len(methods)), list(methods))
    grid[0].invert_yaxis()
    return figure
