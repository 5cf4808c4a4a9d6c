"""Figures as inline SVG, all 360 wide, so that their texts can be read on a phone's screen."""

import textwrap
from collections.abc import Callable, Sequence
from typing import NamedTuple

from inspection.page.marks import Style
from inspection.page.markup import Html, Part, el, identity, join
from inspection.page.scale import Scale, short, spanning

WIDTH = 360


def svg(title: str, description: str, height: float, *content: Part, class_: str | None = None) -> Html:
    """A figure with its name, unlike any other's on the page, and what it shows, for those who do not see it."""
    name = identity(title)
    told = [el("title", title, id=f"{name}-title"), el("desc", description, id=f"{name}-desc")]
    labels = {"aria_labelledby": f"{name}-title", "aria_describedby": f"{name}-desc"}
    box = f"0 0 {WIDTH} {height:g}"
    return el("svg", *told, *content, viewBox=box, role="img", class_=class_, **labels)


def text(x: float, y: float, content: str, anchor: str = "start", **attributes: object) -> Html:
    return el("text", content, x=x, y=y, text_anchor=anchor, **attributes)


def path(points: Sequence[tuple[float, float]]) -> str:
    """A line through the points."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def axes(across: Scale, up: Scale, across_name: str, up_name: str, show: Callable[[float], str] = short) -> Html:
    """Grid, ticks and names of a figure whose x goes by `across`, its y by `up` (which starts at the bottom). The name
    of y stands above the axis, where it needs no turned letters."""
    parts: list[Part] = []
    for tick in up.ticks():
        y = up(tick)
        parts += [el("path", d=f"M{across.start:g} {y:.1f}H{across.end:g}", class_="grid")]
        parts += [text(across.start - 5, y + 4, show(tick), "end")]
    for tick in across.ticks(5):
        x = across(tick)
        parts += [el("path", d=f"M{x:.1f} {up.start:g}v4", class_="axis"), text(x, up.start + 17, show(tick), "middle")]
    parts.append(el("path", d=f"M{across.start:g} {up.end:g}V{up.start:g}H{across.end:g}", class_="axis"))
    parts += [text(4, 14, up_name, class_="name"), text(across.end, up.start + 33, across_name, "end", class_="name")]
    return join(parts)


class Mark(NamedTuple):
    """A value with its interval (half its width), the single values that it is the mean of, and its look."""

    value: float
    half_width: float | None
    singles: Sequence[float]
    look: Style
    told: str


def dots(title: str, description: str, rows: Sequence[tuple[str, Sequence[Mark]]], name: str, most: float) -> Html:
    """A row per label with its marks one below another; bars are intervals, clipped at 0 and `most`, ticks below
    them single values."""
    left = _label_column([label for label, _ in rows])
    values = [min(mark.value + (mark.half_width or 0), most) for _, marks in rows for mark in marks]
    scale = spanning(values, left, WIDTH - 10, zero=True)
    parts: list[Part] = []
    top = 8.0
    for text_, marks in rows:
        height = 11 * len(marks) + 9
        parts.append(_label(left - 8, top + height / 2, text_))
        for i, mark in enumerate(marks):
            y = top + 9 + 11 * i
            if mark.half_width is not None:
                low, high = scale(max(mark.value - mark.half_width, 0)), scale(min(mark.value + mark.half_width, most))
                bar = f"M{low:.1f} {y - 3:.1f}v6M{low:.1f} {y:.1f}H{high:.1f}M{high:.1f} {y - 3:.1f}v6"
                parts.append(el("path", d=bar, class_=f"bar {mark.look.classes}"))
            for value in mark.singles:
                parts.append(el("path", d=f"M{scale(value):.1f} {y - 4:.1f}v8", class_=f"single {mark.look.classes}"))
            parts.append(mark.look.mark(scale(mark.value), y, 0.9, mark.told))
        top += height
        parts.append(el("path", d=f"M{left:g} {top:.1f}H{WIDTH - 10}", class_="faint"))
    grid = _down(scale, 4, top)
    return svg(title, description, top + 38, grid, *parts, text(WIDTH - 10, top + 33, name, "end", class_="name"))


def bars(title: str, description: str, rows: Sequence[tuple[str, float | None, str, Style]]) -> Html:
    """A bar per label: (label, value or None, the value as written behind the bar, look)."""
    left = _label_column([row[0] for row in rows])
    room = 8 + 6.6 * max((len(row[2]) for row in rows), default=0)
    scale = spanning([row[1] for row in rows if row[1] is not None], left, WIDTH - room, zero=True)
    parts: list[Part] = []
    for i, (text_, value, written, look) in enumerate(rows):
        y = 8 + 24 * i
        parts.append(_label(left - 8, y + 8, text_))
        end = scale(value or 0)
        if value is not None:
            parts.append(
                el("rect", x=left, y=y + 2, width=max(end - left, 1), height=13, class_=f"fill {look.classes}")
            )
        parts.append(text(end + 5, y + 12, written))
    bottom = 8 + 24 * len(rows)
    axis = el("path", d=f"M{left:g} 6V{bottom}", class_="axis")
    return svg(title, description, bottom + 4, axis, *parts)


def _down(scale: Scale, top: float, bottom: float) -> Html:
    parts: list[Part] = []
    for tick in scale.ticks(5):
        x = scale(tick)
        parts += [el("path", d=f"M{x:.1f} {top:g}V{bottom + 4:.1f}", class_="grid")]
        parts += [text(x, bottom + 17, short(tick), "middle")]
    return join(parts)


_LABEL = 21  # characters of a label's line


def _label_column(labels: Sequence[str]) -> float:
    """Where the rows begin behind their labels."""
    return 14 + 6.7 * max((len(line) for label in labels for line in _label_lines(label)), default=0)


def _label_lines(label: str) -> list[str]:
    return textwrap.wrap(label, _LABEL, max_lines=2, placeholder="…") or [""]


def _label(x: float, middle: float, label: str) -> Html:
    """A row's label, ending at x, in one line or in two smaller ones."""
    lines = _label_lines(label)
    if len(lines) == 1:
        return text(x, middle + 4, lines[0], "end")
    return join(text(x, middle + y, line, "end", class_="small") for line, y in zip(lines, (-2, 9), strict=True))


class Spot(NamedTuple):
    """A point of a scatter figure."""

    x: float
    y: float
    half_width: float | None
    label: str
    look: Style


_TOP, _BOTTOM = 26, 300  # of the frame of a scatter figure


def scatter(title: str, description: str, spots: Sequence[Spot], x_name: str, y_name: str) -> Html:
    """Points with their names beside them where there is room; x by its logarithm, y a percentage."""
    across = spanning([spot.x for spot in spots], 40, WIDTH - 16, log=True)
    ends = [(max(s.y - (s.half_width or 0), 0), min(s.y + (s.half_width or 0), 100)) for s in spots]
    up = spanning([end for both in ends for end in both], _BOTTOM, _TOP)
    places = [(across(spot.x), up(spot.y)) for spot in spots]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    parts: list[Part] = []
    for spot, (x, _), (low, high) in zip(spots, places, ends, strict=True):
        if spot.half_width is not None:
            bar = f"M{x - 3:.1f} {up(low):.1f}h6M{x:.1f} {up(low):.1f}V{up(high):.1f}M{x - 3:.1f} {up(high):.1f}h6"
            parts.append(el("path", d=bar, class_=f"bar faded {spot.look.classes}"))
    for spot, (x, y) in zip(spots, places, strict=True):
        name = spot.label if len(spot.label) < 24 else spot.label[:23] + "…"
        box = _free_place(x, y, 6.3 * len(name), taken)
        if box:
            taken.append(box)
            nearest = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
            far = abs(nearest[0] - x) > 12 or abs(nearest[1] - y) > 12
            parts.append(el("path", d=path([(x, y), nearest]), class_="leader") if far else None)
            parts.append(text(box[0], box[3] - 2, name, class_="small halo"))
    parts += [
        spot.look.mark(x, y, 1.1, f"{spot.label}: {spot.x:,.0f}, {spot.y:.1f} %")
        for spot, (x, y) in zip(spots, places, strict=True)
    ]
    return svg(title, description, _BOTTOM + 40, axes(across, up, x_name, y_name), *parts)


_Box = tuple[float, float, float, float]  # left, top, right, bottom


def _free_place(x: float, y: float, width: float, taken: Sequence[_Box]) -> _Box | None:
    """Where a name of that width can stand beside a point, over no other point or name."""
    right, left, middle = x + 8, x - 8 - width, x - width / 2
    places = [(right, y + 4), (left, y + 4), (middle, y - 9), (middle, y + 17)]
    places += [(side, y + down) for down in (-8, 15, -20, 27, -32, 39, -44, 51) for side in (right, left, middle)]
    for begin, base in places:
        box = (begin, base - 9, begin + width, base + 2)
        inside = box[0] >= 42 and box[2] <= WIDTH - 2 and box[1] >= _TOP - 4 and box[3] <= _BOTTOM - 2
        if inside and not any(_overlap(box, other) for other in taken):
            return box
    return None


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
