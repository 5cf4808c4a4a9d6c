"""The section of losses: all methods in one figure, each by itself with what was logged, and numbers."""

from collections.abc import Sequence
from itertools import accumulate

from inspection.page.figures import WIDTH, axes, path, svg
from inspection.page.lines import Line, is_number
from inspection.page.marks import legend
from inspection.page.markup import Column, Html, Part, el, folded, identity, join, table
from inspection.page.scale import Scale, spanning
from inspection.runs import Run

Curve = list[tuple[float, float]]  # (step, loss)
_PLACES = 240  # of a drawn line: more could not be told apart


def losses(run: Run) -> Curve:
    """The logged losses that are numbers."""
    entries = ((entry.get("step"), entry.get("loss")) for entry in run.log)
    return [(float(step), float(loss)) for step, loss in entries if is_number(step) and is_number(loss)]


def smoothed(curve: Curve) -> Curve:
    """The mean over a window of a tenth of the steps around each, cut off at the ends."""
    half = len(curve) // 20
    sums = [0.0, *accumulate(loss for _, loss in curve)]
    ends = [(max(i - half, 0), min(i + half + 1, len(curve))) for i in range(len(curve))]
    return [(step, (sums[b] - sums[a]) / (b - a)) for (step, _), (a, b) in zip(curve, ends, strict=True)]


def final_loss(run: Run) -> float | None:
    """The mean over the last tenth of the logged steps."""
    curve = losses(run)
    last = curve[-max(len(curve) // 10, 1) :]
    return sum(loss for _, loss in last) / len(last) if last else None


def thinned(curve: Curve, most: int = _PLACES) -> Curve:
    """At most about `most` points, the least and the largest loss of each stretch among them."""
    if len(curve) <= most:
        return curve
    every = -(-2 * len(curve) // most)
    found: Curve = []
    for i in range(0, len(curve), every):
        stretch = curve[i : i + every]
        ends = (min(stretch, key=lambda one: one[1]), max(stretch, key=lambda one: one[1]))
        found += sorted(set(ends))
    return found


def section(datasets: dict[str, list[Line]]) -> Html | None:
    """The section, None where no run has a loss."""
    parts: list[Part] = []
    for dataset, lines in datasets.items():
        known = [line for line in lines if any(losses(run) for run in line.runs)]
        if known:
            parts += [el("h3", f"Losses on {dataset}"), *_dataset(dataset, known)]
    if not parts:
        return None
    told = "Smoothed: the mean over a tenth of the steps around each. Steps whose loss was no number are left out."
    return el("section", el("h2", "Loss curves", id="losses"), el("p", told, class_="note"), *parts)


def _dataset(dataset: str, lines: Sequence[Line]) -> list[Part]:
    smooth = [(line, smoothed(losses(run))) for line in lines for run in line.runs if losses(run)]
    across = Scale(0, max(1.0, *(step for _, curve in smooth for step, _ in curve)), 38, WIDTH - 16)
    values = [loss for _, curve in smooth for _, loss in curve]
    log = min(values) > 0 and max(values) / min(values) > 4
    up = spanning(values, 250, 24, log=log)
    name = "loss, smoothed" + (" (log scale)" if log else "")
    drawn: list[Part] = []
    for number, (line, curve) in enumerate(smooth):
        points = [(across(step), up(loss)) for step, loss in thinned(curve)]
        drawn.append(el("path", d=path(points), class_=f"line {line.look.classes}", stroke_dasharray=line.look.dash))
        drawn += [line.look.mark(*points[i], 0.8) for i in _mark_places(len(points), number, len(smooth))]
    told = f"Smoothed loss over the steps of {len(smooth)} runs on {dataset}. The numbers stand in the table below."
    whole = svg(f"Smoothed losses on {dataset}", told, 290, axes(across, up, "step", name), *drawn)
    entries = [(line.name, line.look) for line in lines]
    return [
        el("figure", whole, el("figcaption", legend(entries, lines=True), el("p", told)), class_="figures"),
        folded("Each method by itself: smoothed over what was logged", _each(dataset, lines, across)),
        folded("Losses as numbers", _table(dataset, lines)),
    ]


def _mark_places(points: int, number: int, of: int) -> list[int]:
    """Where a line has its marks: five, not at the same steps as another's."""
    return sorted({min(int((i + (number + 0.5) / of) * points / 5), points - 1) for i in range(5)})


def _each(dataset: str, lines: Sequence[Line], across: Scale) -> Html:
    """A small figure per line, the smoothed curves of all others behind it in grey."""
    curves = {id(run): smoothed(losses(run)) for line in lines for run in line.runs if losses(run)}
    everything = [loss for curve in curves.values() for _, loss in curve]
    log = min(everything) > 0 and max(everything) / min(everything) > 4
    raw = sorted(loss for line in lines for run in line.runs for _, loss in losses(run) if loss > 0 or not log)
    shown = raw[len(raw) // 200 : len(raw) - len(raw) // 200] or raw  # an outlier should not press all others flat
    up = spanning([*shown, *everything], 150, 24, log=log)
    behind = identity(f"All losses on {dataset}")
    others = [el("path", d=path([(across(s), up(v)) for s, v in thinned(curve, 120)])) for curve in curves.values()]
    drawn_once = el("defs", el("g", *others, id=behind, class_="others"))
    figures: list[Part] = []
    for line in lines:
        drawn: list[Part] = [el("use", href=f"#{behind}")]
        for run in line.runs:
            if id(run) in curves:
                every = [(across(s), up(v)) for s, v in thinned(losses(run))]
                mean = [(across(s), up(v)) for s, v in thinned(curves[id(run)])]
                drawn.append(el("path", d=path(every), class_=f"raw {line.look.classes}"))
                drawn.append(el("path", d=path(mean), class_=f"line {line.look.classes}"))
        title = f"Loss of {line.name} on {dataset}"
        frame = axes(across, up, "step", "loss" + (" (log scale)" if log else ""))
        figure = svg(title, "Thin: as logged; thick: smoothed; grey: the other methods.", 186, frame, *drawn)
        figures.append(el("figure", el("figcaption", line.name), figure))
    told = el("p", "Thin: as logged; thick: smoothed; grey: the other methods, smoothed.", class_="note")
    hidden = el("svg", drawn_once, width=0, height=0, aria_hidden="true")
    return join([told, hidden, el("div", *figures, class_="figures")])


def _table(dataset: str, lines: Sequence[Line]) -> Html:
    shares = (0.0, 0.1, 0.25, 0.5, 0.75)
    columns = [Column("run"), Column("steps logged", True), *(Column(f"at {share:.0%}", True) for share in shares)]
    columns += [Column("mean of the last tenth", True), Column("no number", True)]
    rows = []
    for line in lines:
        for run in line.runs:
            curve = smoothed(losses(run))
            if not curve:
                continue
            cells = [f"{curve[min(int(share * len(curve)), len(curve) - 1)][1]:.3f}" for share in shares]
            skipped = len(run.log) - len(curve)
            rows.append([line.run_name(run), f"{len(run.log):,}", *cells, f"{final_loss(run):.3f}", str(skipped)])
    return table(f"Smoothed losses on {dataset} at shares of the logged steps", columns, rows)
