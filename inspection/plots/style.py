"""How all figures look: as wide as a page's text, no letter below 7 points, colours and marks that do not need colour
vision (viridis; Okabe and Ito's palette, each line with a dash and a mark of its own)."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WIDTH = 6.5  # inches
TEXT, SMALL = 8.0, 7.0  # points
SCALE = "viridis"
ABSENT = "#dddddd"
# Okabe and Ito's colours, without their yellow, which is too light for a line on white paper
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "h")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
DPI = 150

_SETTINGS = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": TEXT,
    "axes.titlesize": TEXT,
    "axes.labelsize": TEXT,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "legend.fontsize": SMALL,
    "figure.titlesize": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "legend.handlelength": 3.5,
    "svg.hashsalt": "moa",  # the same file for the same data
    "svg.fonttype": "path",
    "figure.constrained_layout.use": True,
}


@contextmanager
def styled() -> Iterator[None]:
    """The look of all figures, for drawing and for saving. ValueError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("figures need matplotlib, which is not installed (requirements-dev.txt names it)") from None
    with matplotlib.rc_context(_SETTINGS):
        yield


def new_figure(height: float) -> Any:
    """An empty figure, as wide as all, that needs no screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height))


def colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def dash(i: int) -> Any:
    """Of the i-th line: two lines of one colour differ here."""
    return DASHES[(i + i // len(COLOURS)) % len(DASHES)]


def mark(i: int) -> str:
    return MARKS[i % len(MARKS)]


def heatmap(axes: Any, rows: Sequence[Sequence[float | None]], limits: tuple[float, float]) -> Any:
    """Rows from top to bottom, a cell per number; None is left grey. What a colour bar needs. Also in an SVG the cells
    are one image: as a thousand shapes they would be most of the file."""
    import numpy as np

    cells = np.ma.masked_invalid(np.array([[np.nan if v is None else v for v in row] for row in rows], dtype=float))
    axes.set_facecolor(ABSENT)
    drawn = axes.pcolormesh(cells, cmap=SCALE, vmin=limits[0], vmax=limits[1], rasterized=True)
    axes.set_ylim(len(rows), 0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0)
    return drawn


def layer_ticks(axes: Any, layers: Sequence[int]) -> None:
    """Numbers of layers beside the rows of a heatmap (row i is at i + 0.5), not more than there is room for."""
    step = max(1, round(len(layers) / 10))
    places = range(0, len(layers), step)
    axes.set_yticks([i + 0.5 for i in places], [str(layers[i]) for i in places])


def save(figure: Any, path: str | Path) -> list[Path]:
    """Write PATH.svg and PATH.png, without a date or anything of this machine in them; the same bytes for the same
    figure."""
    from moa.files import atomic_write

    path = Path(path)
    path = path.with_suffix("") if path.suffix in (".svg", ".png") else path
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for kind, dpi, metadata in (("svg", 2 * DPI, {"Date": None, "Creator": None}), ("png", DPI, {"Software": None})):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind, dpi=dpi, metadata=metadata)
        written.append(path.with_name(f"{path.name}.{kind}"))
        atomic_write(written[-1], buffer.getvalue())
    return written
