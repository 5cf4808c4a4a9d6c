"""Gates of blocks: layer by slot, and how they are spread."""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from inspection.plots import style

Named = tuple[str, dict[str, Any]]  # a name to show, and statistics


def part_of(block: dict[str, Any], part: str) -> dict[str, Any]:
    """A block's numbers for a part of the tokens; where a router is asked once per row, those of the rows."""
    return block["parts"]["all" if block["unit"] == "row" else part]


def slots_of(statistics: dict[str, Any]) -> list[str]:
    """All slots, in the order of the layer that has most of them and then as they come."""
    blocks = sorted(statistics["blocks"], key=lambda block: -len(block["slots"]))
    return list(dict.fromkeys(slot for block in blocks for slot in block["slots"]))


class Panel(NamedTuple):
    """One of the axes beside each other: "gates", or what stands beside those of a sparse router."""

    kind: str
    name: str
    statistics: dict[str, Any]
    width: float


def layer_by_slot(all_named: Sequence[Named], part: str) -> Any:
    """Mean gates on one scale, two of the statistics side by side; beside those of a sparse router its mean threshold,
    within the 5 to 95 % of the tokens' thresholds, and the adapters used per token."""
    bands = [
        [panel for named in all_named[i : i + 2] for panel in _panels(*named, part)]
        for i in range(0, len(all_named), 2)
    ]
    widest = max(sum(panel.width for panel in band) for band in bands)
    n_layers = max(statistics["n_layers"] for _, statistics in all_named)
    figure = style.new_figure(0.45 + (1.25 + 0.1 * max(n_layers, 12)) * len(bands))
    limits = _limits([m for _, s in all_named for block in s["blocks"] for m in part_of(block, part)["mean"]])
    for subfigure, band in zip(figure.subfigures(len(bands), 1, squeeze=False)[:, 0], bands, strict=True):
        room = widest - sum(panel.width for panel in band)
        widths = [panel.width for panel in band] + [room] * (room > 0)
        grid = subfigure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
        for axes in grid[len(band) :]:
            axes.set_visible(False)
        for axes, panel in zip(grid, band, strict=False):
            _draw(axes, panel, part, limits)
            axes.tick_params(labelleft=axes is grid[0])
        grid[0].set_ylabel("layer")
    # On the last band, whose first panel is of gates
    bar = figure.colorbar(grid[0].collections[0], ax=list(grid), location="bottom", aspect=50, shrink=0.7, pad=0.02)
    bar.set_label("mean gate" if part == "all" else f"mean gate, tokens of {part}s")
    bar.outline.set_visible(False)
    return figure


def _panels(name: str, statistics: dict[str, Any], part: str) -> list[Panel]:
    panels = [Panel("gates", name, statistics, 0.3 + 0.14 * len(slots_of(statistics)))]
    if any("threshold" in part_of(block, part) for block in statistics["blocks"]):
        panels += [Panel(kind, name, statistics, 0.42) for kind in ("threshold", "used")]
    return panels


def _draw(axes: Any, panel: Panel, part: str, limits: tuple[float, float]) -> None:
    n_layers, slots = panel.statistics["n_layers"], slots_of(panel.statistics)
    by_layer = {block["layer"]: block for block in panel.statistics["blocks"]}
    if panel.kind == "gates":
        style.heatmap(axes, [_row(by_layer.get(layer), slots, part) for layer in range(n_layers)], limits)
        axes.set_title(panel.name)
        axes.set_xticks([i + 0.5 for i in range(len(slots))], slots, rotation=90)
    else:
        _beside_layers(axes, by_layer, part, panel.kind)
        axes.set_ylim(n_layers, 0)
    style.layer_ticks(axes, range(n_layers))


def _row(block: dict[str, Any] | None, slots: list[str], part: str) -> list[float | None]:
    if block is None:
        return [None] * len(slots)
    mean = dict(zip(block["slots"], part_of(block, part)["mean"], strict=True))
    return [mean.get(slot) for slot in slots]


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """The numbers' range, to the next twentieth, so that the scale has round ends."""
    low, high = math.floor(min(values) * 20 + 1e-9) / 20, math.ceil(max(values) * 20 - 1e-9) / 20
    return (low, high) if high > low else (low, low + 0.05)


def _beside_layers(axes: Any, by_layer: dict[int, dict[str, Any]], part: str, kind: str) -> None:
    """A number per layer, running down beside a heatmap."""
    layers = sorted(by_layer)
    parts = [part_of(by_layer[layer], part) for layer in layers]
    places = [layer + 0.5 for layer in layers]
    if kind == "threshold":
        means = [one["threshold"]["mean"] for one in parts]
        axes.set_title("threshold")
        left, right = ([one["threshold"]["quantiles"][i] for one in parts] for i in (0, -1))
        axes.fill_betweenx(places, left, right, color=style.colour(0), alpha=0.25, linewidth=0)
    else:
        means = [one["used"]["mean"] for one in parts]
        axes.set_title("adapters\nused")
        axes.set_xlim(0, max(len(block["slots"]) for block in by_layer.values()) + 0.3)
    axes.plot(means, places, color=style.colour(0), marker="o", markersize=2)
    axes.grid(axis="x", linewidth=0.4, color="#cccccc")
    axes.locator_params(axis="x", nbins=3, integer=kind == "used")


def spreads(all_named: Sequence[Named], part: str) -> Any:
    """How the gates of each slot are spread over tokens and layers: the share of gates at most as large as the axis
    says, a line for each of the statistics. A line begins at the share of gates that are off."""
    slots = list(dict.fromkeys(slot for _, statistics in all_named for slot in slots_of(statistics)))
    columns = min(4, len(slots))
    rows = math.ceil(len(slots) / columns)
    figure = style.new_figure(0.6 + 1.35 * rows + 0.16 * math.ceil(len(all_named) / 3))
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for n, (axes, slot) in enumerate(zip(grid.flat, slots, strict=False)):
        axes.set_title(slot, pad=3)
        for i, (name, statistics) in enumerate(all_named):
            histogram, active = _of_slot(statistics, slot, part)
            if histogram:
                below = [total / sum(histogram) for total in accumulate(histogram)]
                gates = [j / len(histogram) for j in range(len(histogram) + 1)]
                look = {"color": style.colour(i), "linestyle": style.dash(i), "marker": style.mark(i)}
                look["markevery"] = (3 + 4 * i, 12)
                (handles[name],) = axes.plot(gates, [1 - active, *below], label=name, **look)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_yticks([0, 0.5, 1])
        axes.grid(linewidth=0.4, color="#cccccc")
        axes.tick_params(labelbottom=n + columns >= len(slots))
    for axes in list(grid.flat)[len(slots) :]:
        axes.set_visible(False)
    figure.supxlabel("gate" if part == "all" else f"gate, tokens of {part}s", fontsize=style.TEXT)
    figure.supylabel("share of gates up to it", fontsize=style.TEXT)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=min(3, len(handles)))
    return figure


def _of_slot(statistics: dict[str, Any], slot: str, part: str) -> tuple[list[int], float]:
    """Histogram over all layers, and the share that is on."""
    total, on, count = [0] * statistics["bins"], 0.0, 0
    for block in statistics["blocks"]:
        if slot in block["slots"]:
            i, found = block["slots"].index(slot), part_of(block, part)
            total = [a + b for a, b in zip(total, found["histogram"][i], strict=True)]
            on, count = on + found["active"][i] * found["count"], count + found["count"]
    return (total, on / count) if count else ([], 0.0)


def agreement(all_named: Sequence[Named], part: str) -> list[str]:
    """How alike two of the statistics route: Pearson's correlation of their mean gates over layers and slots."""
    from statistics import StatisticsError, correlation

    lines = []
    for i, (first, one) in enumerate(all_named):
        for second, other in all_named[i + 1 :]:
            mine, theirs = _means(one, part), _means(other, part)
            both = sorted(mine.keys() & theirs.keys())
            try:
                r = correlation([mine[place] for place in both], [theirs[place] for place in both])
            except StatisticsError:
                continue
            lines.append(f"mean gates of {first} and {second}: correlation {r:.3f} over {len(both)} layers and slots")
    return lines


def _means(statistics: dict[str, Any], part: str) -> dict[tuple[int, str], float]:
    return {
        (block["layer"], slot): mean
        for block in statistics["blocks"]
        for slot, mean in zip(block["slots"], part_of(block, part)["mean"], strict=True)
    }
