"""The section of routers, of runs that have statistics: their figures, and the same as numbers."""

from collections.abc import Iterable, Sequence
from typing import Any

from inspection.page.lines import Line, brief, is_number
from inspection.page.markup import Column, Html, Part, el, folded, join, table
from inspection.page.router_figures import Gates, Mixture, Routing, by_layer, expert_figures, gate_figure
from inspection.runs import Run
from moa.reading import parse_json, read_text

FILE, FORMAT = "gates.json", "moa-router-statistics"


def read(run: Run, notes: list[str]) -> Routing | None:
    """A run's statistics; None where it has none, or none that can be read, which `notes` then tells."""
    file = run.path / FILE
    if not file.exists():
        return None
    try:
        value = parse_json(read_text(file), "it")
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError("it holds no router statistics")
        blocks = [_gates(one) for one in value["blocks"] if one["slots"] and "all" in one["parts"]]
        mixtures = [_mixture(one) for one in value["experts"] if "all" in one["parts"]]
        return Routing(blocks, mixtures, dict(value["source"]) | {"tokens": value.get("counts")})
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        told = str(error) if isinstance(error, ValueError | OSError) else f"it is not as expected ({error!r})"
        notes.append(f"{FILE} cannot be read: {brief(told.replace(f'{run.path}/', ''))}")
        return None


def _gates(block: dict[str, Any]) -> Gates:
    part, slots = block["parts"]["all"], [brief(slot, 40) for slot in block["slots"]]
    columns = [dict(zip(slots, _shares(part[name]), strict=True)) for name in ("mean", "std", "active")]
    used, threshold = part.get("used"), part.get("threshold")
    rest = (None if one is None else _share(one["mean"]) for one in (used, threshold))
    return Gates(_layer(block), *columns, *rest)


def _mixture(mixture: dict[str, Any]) -> Mixture:
    part = mixture["parts"]["all"]
    means, loads = _shares(part["mean"]), _shares(part["load"])
    if not means or len(means) != len(loads):
        raise ValueError(f"mean and load of layer {_layer(mixture)} are not of as many experts")
    rest = (_share(part["used"]["mean"]), _share(part["balance"]))
    return Mixture(_layer(mixture), brief(mixture["slot"], 40), means, loads, *rest)


def _layer(place: dict[str, Any]) -> int:
    if type(place["layer"]) is not int or not 0 <= place["layer"] < 10_000:
        raise ValueError(f"{brief(place['layer'], 40)} is no layer")
    return place["layer"]


def _shares(values: list[Any]) -> list[float]:
    return [_share(value) for value in values]


def _share(value: Any) -> float:
    if not is_number(value):
        raise ValueError(f"expected a number, found {brief(value, 40)}")
    return float(value)


def section(datasets: dict[str, list[Line]], found: dict[str, Routing]) -> Html | None:
    """The section; found: by a run's path. None where no run has statistics."""
    parts: list[Part] = []
    for dataset, lines in datasets.items():
        every = [(line, line.run_name(run), found.get(str(run.path))) for line in lines for run in line.runs]
        runs = [(line, name, routing) for line, name, routing in every if routing is not None]
        if runs:
            parts += [el("h3", f"Routers on {dataset}"), _compared(dataset, runs)]
            blocks = [_gates_of(f"{name} on {dataset}", name, one) for _, name, one in runs if one.blocks]
            parts.append(el("div", *blocks, class_="figures") if blocks else None)
            parts += [_experts_of(f"{name} on {dataset}", name, one) for _, name, one in runs if one.mixtures]
    if not parts:
        return None
    told = "A gate weighs its adapter: 0 where a sparse router's threshold is above it. Means over all tokens, those of"
    told += " the prompts and those of the answers; padding is not counted."
    return el("section", el("h2", "Routers", id="routers"), el("p", told, class_="note"), *parts)


def _compared(dataset: str, runs: Sequence[tuple[Line, str, Routing]]) -> Html | None:
    """Adapters used per layer, and thresholds, of all runs side by side."""
    figures = []
    for name, value in (("adapters used per token", _used), ("mean threshold", _threshold)):
        drawn = [(line, run, points) for line, run, routing in runs if (points := value(routing))]
        if drawn:
            figures.append(by_layer(f"{name.capitalize()} by layer on {dataset}", name, drawn))
    return el("div", *figures, class_="figures") if figures else None


def _used(routing: Routing) -> list[tuple[int, float]]:
    return [(block.layer, block.used) for block in routing.blocks if block.used is not None]


def _threshold(routing: Routing) -> list[tuple[int, float]]:
    return [(block.layer, block.threshold) for block in routing.blocks if block.threshold is not None]


def _gates_of(title: str, name: str, routing: Routing) -> Html:
    numbers = folded(f"Gates of {name} as numbers", _gate_table(title, routing))
    figure = gate_figure(title, routing.blocks)
    return el("div", el("h4", f"Gates of {name}"), el("p", _read_from(routing), class_="note"), figure, numbers)


def _experts_of(title: str, name: str, routing: Routing) -> Html:
    numbers = folded(f"Experts of {name} as numbers", _expert_table(title, routing))
    figures = expert_figures(title, routing.mixtures)
    return join([el("h4", f"Experts of {name}"), el("p", _read_from(routing), class_="note"), figures, numbers])


def _read_from(routing: Routing) -> str:
    """What was read, without its checksums."""
    known = {key: value for key, value in routing.source.items() if isinstance(value, str | int | float)}
    told = [f"{key} {brief(value, 80)}" for key, value in known.items() if not key.endswith(("sha256", "fingerprint"))]
    counts = routing.source.get("tokens")
    if isinstance(counts, dict):
        told += [f"{brief(count, 20)} tokens ({brief(part, 20)})" for part, count in counts.items()]
    return brief(f"Read: {', '.join(told)}", 400)


def _gate_table(title: str, routing: Routing) -> Html:
    slots = list(dict.fromkeys(slot for block in routing.blocks for slot in block.means))
    columns = [
        Column("layer"),
        *(Column(slot, True) for slot in slots),
        Column("used", True),
        Column("threshold", True),
    ]
    rows = []
    for block in routing.blocks:
        cells = [_gate_cell(block, slot) if slot in block.means else "none" for slot in slots]
        rest = ["none" if value is None else f"{value:.3f}" for value in (block.used, block.threshold)]
        rows.append([str(block.layer), *cells, *rest])
    return table(f"Gates of {title}: mean, standard deviation, and share of tokens with a gate above 0", columns, rows)


def _gate_cell(block: Gates, slot: str) -> Html:
    told = f"sd {block.stds[slot]:.3f}, on {block.active[slot]:.0%}"
    return join([f"{block.means[slot]:.3f}", el("span", told, class_="under")])


def _expert_table(title: str, routing: Routing) -> Html:
    columns = [
        Column("layer and slot"),
        Column("balance", True),
        Column("experts chosen", True),
        Column("mean weights"),
    ]
    columns.append(Column("loads"))
    rows: Iterable[list[Part]] = [
        [
            f"{one.layer} {one.slot}",
            f"{one.balance:.3f}",
            f"{one.used:.2f}",
            " ".join(f"{value:.2f}" for value in one.means),
            " ".join(f"{value:.2f}" for value in one.loads),
        ]
        for one in routing.mixtures
    ]
    caption = f"Experts of {title}. RouterStats: 1 where all weigh the same over all tokens, 0 where one has everything"
    return table(caption, columns, rows)
