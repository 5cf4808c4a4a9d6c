"""Figures of routers: gates by layer and slot, thresholds and adapters used by layer, weights and loads of experts."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from inspection.colours import colour, ink, web
from inspection.page.figures import WIDTH, axes, path, svg, text
from inspection.page.lines import Line
from inspection.page.marks import legend
from inspection.page.markup import Html, Part, el, join
from inspection.page.scale import Scale


class Gates(NamedTuple):
    """A block's gates. means: by slot; used, threshold: None where not known."""

    layer: int
    means: dict[str, float]
    stds: dict[str, float]
    active: dict[str, float]
    used: float | None
    threshold: float | None


class Mixture(NamedTuple):
    """The experts of an adapter: mean weight and share of tokens that chose each. used: how many a token chose.
    balance: 1 where all weigh the same over all tokens, 0 where one has everything."""

    layer: int
    slot: str
    means: list[float]
    loads: list[float]
    used: float
    balance: float


class Routing(NamedTuple):
    """What a run's statistics tell, over all tokens. source: what was read."""

    blocks: list[Gates]
    mixtures: list[Mixture]
    source: dict[str, Any]


def by_layer(title: str, name: str, drawn: Sequence[tuple[Line, str, list[tuple[int, float]]]]) -> Html:
    last = max(layer for _, _, points in drawn for layer, _ in points)
    across = Scale(0, max(last, 1), 38, WIDTH - 16)
    up = Scale(0, 1.08 * max(max(value for _, _, points in drawn for _, value in points), 1e-6), 190, 24)
    parts: list[Part] = [axes(across, up, "layer", name)]
    for line, _, points in drawn:
        places = [(across(layer), up(value)) for layer, value in points]
        parts.append(el("path", d=path(places), class_=f"line {line.look.classes}", stroke_dasharray=line.look.dash))
        parts += [line.look.mark(*place, 0.7) for place in places[:: max(len(places) // 6, 1)]]
    told = f"{name.capitalize()}, mean over tokens, by layer; runs: {', '.join(run for _, run, _ in drawn)}."
    named = legend([(run, line.look) for line, run, _ in drawn], lines=True)
    return el("figure", svg(title, told, 230, *parts), named, el("figcaption", told))


def gate_figure(title: str, blocks: Sequence[Gates]) -> Html:
    """Layers down, slots across; behind each layer the adapters used and the threshold, where there are any."""
    slots = list(dict.fromkeys(slot for block in blocks for slot in block.means))
    used, limits = (any(getattr(block, name) is not None for block in blocks) for name in ("used", "threshold"))
    left, right = 30, WIDTH - 42 * used - 62 * limits
    width, height, top = (right - left) / len(slots), 13, 66
    parts: list[Part] = [text(left - 4, top - 6, "layer", "end", class_="tiny name")]
    for i, slot in enumerate(slots):
        x = left + (i + 0.5) * width
        turned = f"rotate(-50 {x:.1f} {top - 6})"
        parts.append(text(x, top - 6, _short(slot), class_="tiny", transform=turned))
    heads = [("used", used), ("threshold", limits)]
    for place, head in zip((right + 6, right + 6 + 42 * used), heads, strict=True):
        parts.append(text(place, top - 6, head[0], class_="tiny") if head[1] else None)
    for row, block in enumerate(blocks):
        y = top + row * height
        parts.append(text(left - 4, y + 10, str(block.layer), "end", class_="tiny"))
        for i, slot in enumerate(slots):
            if slot in block.means:
                parts += _cell(left + i * width, y, width, height, block.means[slot])
        if block.used is not None:
            parts.append(text(right + 6, y + 10, f"{block.used:.1f}", class_="tiny"))
        if block.threshold is not None:
            x = right + 6 + 42 * used
            bar = min(max(block.threshold, 0), 1) * 24
            parts += [el("rect", x=x, y=y + 2, width=max(bar, 0.5), height=9, class_="fill c0")]
            parts.append(text(x + bar + 3, y + 10, f"{block.threshold:.2f}", class_="tiny"))
    bottom = top + len(blocks) * height
    told = "Mean gate of each adapter, by layer and slot, from 0 (dark) to 1 (bright)."
    told += (
        " used: adapters with a gate above 0 per token." * used + " threshold: mean of the sparse router's." * limits
    )
    figure = svg(f"Mean gates of {title}", told, bottom + 36, *parts, _ramp(left, bottom + 8))
    return el("figure", figure, el("figcaption", told))


def _short(slot: str) -> str:
    """A slot's name where there is little room: of a LoRA, its layer's."""
    name = slot.removeprefix("lora_")
    return name if len(name) < 12 else name[:11] + "…"


def _cell(x: float, y: float, width: float, height: float, value: float) -> list[Html]:
    back = colour(value)
    cell = [el("rect", x=x, y=y, width=width, height=height, fill=web(back), class_="cell")]
    if width >= 20:
        written = f"{value:.2f}".removeprefix("0") if value < 0.995 else "1"
        cell.append(text(x + width / 2, y + 10, written, "middle", class_="tiny", style=f"fill:{web(ink(back))}"))
    return cell


def _ramp(x: float, y: float, most: float = 1.0) -> Html:
    parts: list[Part] = []
    for i in range(24):
        parts.append(el("rect", x=x + 6 * i, y=y, width=6.3, height=9, fill=web(colour(i / 23))))
    parts += [text(x + 144 * share, y + 21, f"{most * share:.2g}", "middle", class_="tiny") for share in (0, 0.5, 1)]
    return join(parts)


def expert_figures(title: str, mixtures: Sequence[Mixture]) -> Html:
    parts: list[Part] = []
    kinds: list[tuple[str, Callable[[Mixture], list[float]]]] = [("Mean weights of experts", lambda one: one.means)]
    if any(load < 0.999 for one in mixtures for load in one.loads):
        kinds.append(("Loads of experts", lambda one: one.loads))
    for name, values in kinds:
        parts.append(_expert_figure(f"{name}: {title}", name, mixtures, values))
    return el("div", *parts, class_="figures")


def _expert_figure(
    title: str, name: str, mixtures: Sequence[Mixture], values: Callable[[Mixture], list[float]]
) -> Html:
    slots = list(dict.fromkeys(one.slot for one in mixtures))
    layers = sorted({one.layer for one in mixtures})
    experts = max(len(one.means) for one in mixtures)
    most = max(max(values(one), default=0) for one in mixtures) or 1.0
    left, gap, top, height = 30, 5, 22, 10
    width = ((WIDTH - 6 - left) - gap * (len(slots) - 1)) / (len(slots) * experts)
    starts = {slot: left + i * (experts * width + gap) for i, slot in enumerate(slots)}
    parts: list[Part] = [text(x, top - 7, _short(slot), class_="tiny") for slot, x in starts.items()]
    for row, layer in enumerate(layers):
        parts.append(text(left - 4, top + row * height + 9, str(layer), "end", class_="tiny") if row % 2 == 0 else None)
    cells: dict[str, list[str]] = {}
    for one in mixtures:
        y = top + layers.index(one.layer) * height
        for i, value in enumerate(values(one)):
            place = f"M{starts[one.slot] + i * width:.1f} {y}h{width:.2f}v{height}h-{width:.2f}z"
            cells.setdefault(web(colour(round(value / most * 32) / 32)), []).append(place)
    parts += [el("path", d="".join(places), fill=shade) for shade, places in cells.items()]
    bottom = top + len(layers) * height
    told = f"{name}, from 0 (dark) to {most:.2g} (bright): layers down, for each slot its {experts} experts across."
    if name.startswith("Loads"):
        told += " A load is the share of tokens that chose the expert."
    return el("figure", svg(title, told, bottom + 36, *parts, _ramp(left, bottom + 8, most)), el("figcaption", told))
