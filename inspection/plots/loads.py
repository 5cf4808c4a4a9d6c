"""Loads of mixtures of experts: layer by expert."""

import math
from typing import Any

from inspection.plots import style


def layer_by_expert(name: str, statistics: dict[str, Any], part: str, show: str) -> Any:
    """A heatmap per slot, of the share of tokens that chose each expert ("load") or of its mean weight ("mean"); beside
    it the balance of the mean weights (solid) and the entropy of a token's own (dashed), 0 to 1."""
    slots = list(dict.fromkeys(mixture["slot"] for mixture in statistics["experts"]))
    found = {(one["layer"], one["slot"]): one["parts"][part] for one in statistics["experts"]}
    n, n_layers = statistics["experts"][0]["experts"], statistics["n_layers"]
    columns = min(5, len(slots))
    rows = math.ceil(len(slots) / columns)
    figure = style.new_figure(1.2 + rows * (0.4 + 0.09 * max(n_layers, 12)))
    grid = figure.subplots(rows, 2 * columns, width_ratios=[2, 1] * columns, sharey=True, squeeze=False)
    flat, high = list(grid.flat), max(value for one in found.values() for value in one[show])
    for axes in flat[2 * len(slots) :]:
        axes.set_visible(False)
    for slot, heat, lines in zip(slots, flat[::2], flat[1::2], strict=False):
        layers = [layer for layer in range(n_layers) if (layer, slot) in found]
        cells = [found[layer, slot][show] if layer in layers else [None] * n for layer in range(n_layers)]
        drawn = style.heatmap(heat, cells, (0, high))
        heat.set_title(slot)
        ticks = sorted({0, n - 1})
        heat.set_xlabel("expert")
        heat.set_xticks([i + 0.5 for i in ticks], [str(i) for i in ticks])
        style.layer_ticks(heat, range(n_layers))
        places = [layer + 0.5 for layer in layers]
        for i, measure in enumerate(("balance", "entropy")):
            look = {"color": style.colour(i), "linestyle": style.dash(i), "label": measure}
            lines.plot([found[layer, slot][measure] for layer in layers], places, **look)
        lines.set_xlim(-0.05, 1.05)
        lines.set_xticks([0, 1])
        lines.tick_params(left=False)
        lines.set_ylim(n_layers, 0)
    for first in grid[:, 0]:
        first.set_ylabel("layer")
    handles, labels = flat[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2)
    figure.suptitle(name, x=0.02, ha="left")
    bar = figure.colorbar(drawn, ax=flat, location="bottom", aspect=50, shrink=0.7, pad=0.02)
    bar.set_label("share of tokens that chose the expert" if show == "load" else "mean weight of the expert")
    bar.outline.set_visible(False)
    return figure


def chooses(statistics: dict[str, Any]) -> bool:
    """Whether the routers of experts leave some out; else all loads are 1 and the weights tell more."""
    return any(value < 1 for one in statistics["experts"] for value in one["parts"]["all"]["load"])
