"""The look of all charts: as wide as a page's text, no letter below 7 points, colours and marks that do not need colour
vision (viridis; Okabe and Ito's palette, each line with a dash and a mark)."""

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

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
    **dict.fromkeys(("axes.linewidth", "xtick.major.width", "ytick.major.width"), 0.6),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 2.5),
    "lines.linewidth": 1.2,
    "lines.markersize": 3.5,
    "legend.handlelength": 3.5,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#cccccc",
    "grid.linewidth": 0.4,
    "svg.hashsalt": "moa",  # the same file for the same data
    "svg.fonttype": "path",
    "figure.constrained_layout.use": True,
}


@contextmanager
def styled() -> Iterator[None]:
    """The look of all charts, for drawing and for saving. ValueError where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise ValueError("figures need matplotlib, which is not installed (requirements-dev.txt names it)") from None
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def image(figure: Any, kind: str) -> bytes:
    """The figure as svg or png, the same bytes for the same figure: without a date or anything of this machine."""
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, dpi=2 * DPI if kind == "svg" else DPI, metadata=metadata)
    return buffer.getvalue()


def save(figure: Any, path: str | Path) -> list[Path]:
    """Write PATH.svg and PATH.png."""
    path = Path(path)
    path = path.with_suffix("") if path.suffix in (".svg", ".png") else path
    path.parent.mkdir(parents=True, exist_ok=True)
    files = [path.with_name(f"{path.name}.{kind}") for kind in ("svg", "png")]
    for file in files:
        atomic_write(file, image(figure, file.suffix[1:]))
    return files


def new_figure(height: float) -> Any:
    """An empty figure that needs no screen."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height))


def panels(figure: Any, count: int, columns: int, **how: Any) -> list[Any]:
    """`count` axes in rows of `columns`, that share their y axis."""
    grid = figure.subplots(math.ceil(count / columns), columns, sharey=True, squeeze=False, **how)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return list(grid.flat[:count])


def look(i: int) -> dict[str, Any]:
    """Colour, dash and mark of the i-th line; the first 55 differ in dash or mark too."""
    parts = {"color": COLOURS, "linestyle": DASHES, "marker": MARKS}
    return {name: values[i % len(values)] for name, values in parts.items()}


def heatmap(axes: Any, rows: Sequence[Sequence[float]], limits: tuple[float, float], title: str) -> Any:
    """Draw rows of layers from top to bottom, a cell per number; NaN is left grey. Returns what a colour bar needs.
    Also in an SVG the cells are one image: as a thousand shapes they would be most of the file."""
    axes.set_facecolor("#dddddd")
    cells = np.ma.masked_invalid(np.array(rows, dtype=float))
    mesh = axes.pcolormesh(cells, cmap="viridis", vmin=limits[0], vmax=limits[1], rasterized=True)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set(title=title, ylim=(len(rows), 0))
    layers = range(0, len(rows), max(1, round(len(rows) / 10)))  # as many as there is room for
    axes.set_yticks([layer + 0.5 for layer in layers], list(map(str, layers)))
    return mesh


def colour_bar(figure: Any, mesh: Any, axes: Sequence[Any], label: str) -> None:
    bar = figure.colorbar(mesh, ax=list(axes), location="bottom", aspect=50, shrink=0.7, pad=0.02)
    bar.set_label(label)
    bar.outline.set_visible(False)
