"""All charts: as wide as a page's text, no letter below 7 points, colours and marks that do not need colour vision
(viridis; Okabe and Ito's palette, each line with a dash and a mark)."""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from inspection.runs import QUANTITIES, RunGroup
from moa.files import atomic_write

WIDTH, DPI = 6.5, 150  # inches
TEXT, SMALL = 8.0, 7.0  # points
# Okabe and Ito's colours, without their yellow, which is too light for a line on white paper
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
SETTINGS = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": TEXT,
    **dict.fromkeys(("axes.titlesize", "axes.labelsize", "figure.titlesize", "figure.labelsize"), TEXT),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize", "legend.fontsize"), SMALL),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math"), False),
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.handlelength": 3.5,
    "axes.axisbelow": True,
    "grid.color": "#cccccc",
    "grid.linewidth": 0.4,
    "svg.hashsalt": "moa",  # the same file for the same data
    "figure.constrained_layout.use": True,
}


@contextmanager
def styled() -> Iterator[None]:
    """The look of all charts, for drawing and for saving. ValueError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("charts need matplotlib, which is not installed (requirements-dev.txt names it)") from None
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def image(figure: Any, kind: str) -> bytes:
    """The figure as svg or png, the same bytes for the same figure: without a date or anything of this machine."""
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, dpi=2 * DPI if kind == "svg" else DPI, metadata=metadata)
    return buffer.getvalue()


def save(figure: Any, path: Path) -> None:
    """Write PATH.svg and PATH.png."""
    for kind in ("svg", "png"):
        atomic_write(path.with_name(f"{path.name}.{kind}"), image(figure, kind))


def new_figure(height: float) -> Any:
    """An empty figure that needs no screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height))


def look(i: int) -> dict[str, Any]:
    """Colour, dash and mark of the i-th line; the first 55 differ in dash or mark too."""
    parts = {"color": COLOURS, "linestyle": DASHES, "marker": MARKS}
    return {name: values[i % len(values)] for name, values in parts.items()}


def losses(curves: Sequence[tuple[str, list[tuple[int, float]], list[tuple[int, float]]]]) -> Any:
    """Curves of a name, (step, training loss) and (step, validation loss); curves of one name share a look.

    Training: the steps faint, their mean over a tenth of the longest curve as a line. Validation: a mark at each
    evaluation, and a ring around the lowest.
    """
    figure = new_figure(3.2)
    axes, settled, names = figure.subplots(), [], list(dict.fromkeys(name for name, *_ in curves))
    smooth = max(1, max(len(training) for _, training, _ in curves) // 10)
    for i, (name, training, validation) in enumerate(curves):
        style = look(names.index(name))
        label = name if name not in [earlier for earlier, *_ in curves[:i]] else None
        if training:
            steps, values = np.array(training).T
            means = [values[max(0, end - smooth) : end].mean() for end in range(1, len(values) + 1)]
            axes.plot(steps, values, color=style["color"], alpha=0.15, linewidth=0.6)
            axes.plot(steps, means, label=label, **style | {"marker": ""})
            settled += means[len(means) // 10 :]
        if validation:
            axes.plot(*zip(*validation, strict=True), **style | {"linestyle": "none"})
            best = min(validation, key=lambda point: point[1])
            axes.plot(*best, "o", markersize=9, markerfacecolor="none", markeredgecolor=style["color"])
            settled += [loss for _, loss in validation]
    axes.set_xlabel("step")
    axes.set_ylabel(f"loss, mean of the last {smooth} steps" if smooth > 1 else "loss")
    if any(validation for *_, validation in curves):
        axes.plot([], [], "o", color="#555555", label="validation")
        axes.plot([], [], "o", markersize=9, markerfacecolor="none", markeredgecolor="#555555", label="its lowest")
    room = (max(settled) - min(settled)) * 0.1 or 0.1
    axes.set_ylim(min(settled) - room, max(settled) + room)  # single steps may go beyond
    axes.set_xlim(left=0)
    axes.grid(axis="y")
    figure.legend(loc="outside right center")
    return figure


PRICES = ("trainable_parameters", "seconds", "peak_memory_bytes")


def tradeoff(groups: Sequence[RunGroup], rule: str, column: str) -> Any:
    """The score of each group against what it trained, how long that took, and its memory.

    A bar reaches a standard deviation over the seeds to both sides; with one seed it is the 95 % interval that the
    number of test rows leaves. Groups that trained nothing are a dashed line.
    """
    from matplotlib.ticker import EngFormatter

    figure = new_figure(3.1)
    grid, tuned = figure.subplots(1, len(PRICES), sharey=True), [group for group in groups if group.trained]
    for axes, price in zip(grid, PRICES, strict=True):
        for group in groups:
            score = group.score(column, rule)
            if not group.trained:
                axes.axhline(score.mean, color="#555555", linestyle="--", linewidth=0.8, label=group.name)
                continue
            style, x = look(tuned.index(group)), group.over(price).mean / QUANTITIES[price].unit
            half = score.deviation if score.deviation is not None else score.half_width or 0.0
            ends = max(0.0, score.mean - half), min(100.0, score.mean + half)
            axes.vlines(x, *ends, color=style["color"], alpha=0.3, linewidth=0.8)
            axes.plot(x, score.mean, label=group.name, **style | {"linestyle": "none", "markersize": 5})
        sizes = [group.over(price).mean for group in tuned]
        if max(sizes) > 10 * min(sizes) > 0:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter("")
        else:
            axes.locator_params(axis="x", nbins=3)
        axes.xaxis.set_major_formatter(EngFormatter(sep="") if price == "trainable_parameters" else "{x:g}")
        axes.margins(0.12)
        axes.set_xlabel(QUANTITIES[price].label)
        axes.grid()
    grid[0].set_ylabel(f"{column}, {rule} rule, %")
    columns = 5 if max(len(group.name) for group in groups) < 22 else 2
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=columns, columnspacing=1.2)
    return figure


MEASURES = ("share above 0", "mean threshold", "balance", "entropy")


def routers(statistics: dict[str, Any]) -> Any:
    """Mean gates of a block's adapters, layer by slot, and mean weights of the experts of each slot, layer by expert.

    Beside each heat map lines by layer: the share of weights above 0, a sparse router's threshold, balance and entropy
    of experts. Averages are over all tokens.
    """
    by_slot: dict[str | None, list[dict[str, Any]]] = {}
    for router in statistics["routers"]:
        by_slot.setdefault(router["slot"], []).append({**router, **router["parts"]["all"]})
    across, n_layers = min(3 if None in by_slot else 5, len(by_slot)), statistics["n_layers"]  # slots' names are long
    down = math.ceil(len(by_slot) / across)
    figure = new_figure(1.3 + down * (0.5 + 0.09 * max(n_layers, 12)))
    grid = figure.subplots(down, 2 * across, squeeze=False, width_ratios=[2, 1] * across)
    for axes in grid.flat[2 * len(by_slot) :]:
        axes.set_visible(False)
    high = max(max(router["mean"]) for members in by_slot.values() for router in members)
    handles = {}
    for (slot, members), heat, lines in zip(by_slot.items(), grid.flat[::2], grid.flat[1::2], strict=False):
        mesh = _heat_map(heat, members, n_layers, high)
        heat.set_title(slot or statistics["method"])
        heat.set_ylabel("layer" if heat.get_subplotspec().is_first_col() else "")
        layers = [router["layer"] + 0.5 for router in members]
        for label, values in _measures(members).items():
            i = MEASURES.index(label)
            (handles[label],) = lines.plot(values, layers, color=COLOURS[i], linestyle=DASHES[i])
        lines.set(xlim=(-0.05, 1.05), xticks=[0, 1], ylim=(n_layers, 0), yticks=[])
    figure.legend(handles.values(), handles.keys(), loc="outside upper right", ncols=len(handles))
    bar = figure.colorbar(mesh, ax=grid, location="bottom", aspect=50, shrink=0.7, pad=0.02)
    bar.set_label("mean weight")
    return figure


def _heat_map(axes: Any, members: list[dict[str, Any]], n_layers: int, high: float) -> Any:
    """Draw mean weights, the first layer at the top; what a layer lacks is left grey. Returns what a colour bar needs.

    Also in an SVG the cells are one image: a thousand shapes would be most of it.
    """
    most_first = sorted(members, key=lambda router: -len(router["names"]))
    names = list(dict.fromkeys(name for router in most_first for name in router["names"]))
    cells = np.full((n_layers, len(names)), np.nan)
    for router in members:
        cells[router["layer"], [names.index(name) for name in router["names"]]] = router["mean"]
    axes.set_facecolor("#dddddd")
    mesh = axes.pcolormesh(np.ma.masked_invalid(cells), cmap="viridis", vmin=0, vmax=high, rasterized=True)
    axes.tick_params(length=0)
    shown = range(len(names)) if members[0]["slot"] is None else (0, len(names) - 1)
    axes.set_xticks([i + 0.5 for i in shown], [names[i] for i in shown], rotation=90 * (members[0]["slot"] is None))
    layers = range(0, n_layers, max(1, round(n_layers / 10)))  # as many as there is room for
    axes.set_yticks([layer + 0.5 for layer in layers], list(map(str, layers)))
    axes.set_ylim(n_layers, 0)
    return mesh


def _measures(members: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Values by layer, by name."""
    measures = {"share above 0": [float(np.mean(router["active"])) for router in members]}
    if "threshold" in members[0]:
        measures["mean threshold"] = [router["threshold"]["mean"] for router in members]
    return measures | {name: [r[name] for r in members] for name in ("balance", "entropy") if name in members[0]}
