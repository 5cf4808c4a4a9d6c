"""The whole page: reading the runs, and the sections one after another."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from inspection.page import configuration, costs, curves, overview, routers, samples, scores
from inspection.page.lines import Line, lines_of
from inspection.page.markup import Html, Part, el, join, listed
from inspection.page.style import STYLE
from inspection.runs import Run, find_runs

# Nothing from outside, and nothing that runs: whatever a text should smuggle in, a browser will not follow it
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


class Page(NamedTuple):
    """html: the file's text. runs: how many it shows; incomplete: how many of them lack something."""

    html: str
    runs: int
    incomplete: int


def document(folder: Path, title: str, per_kind: int, date: str, costs_file: Path | None = None) -> Page:
    """The report of the runs at and under a folder. per_kind: answers shown of each kind. costs_file: what
    `python -m benchmarks.cost --json` wrote. ValueError where there is no run, or no costs."""
    measured = costs.read_costs(costs_file) if costs_file else None
    runs = find_runs(folder)
    empty = list(_empty_folders(folder, runs))
    if not runs:
        raise ValueError(f"{folder}: no run in it (a folder with config.json, log.jsonl, answers or scores.json)")
    notes: dict[str, list[str]] = {}
    chosen, routing = {}, {}
    for run in runs:
        chosen[str(run.path)], notes[str(run.path)] = samples.look(run, per_kind)
        found = routers.read(run, notes[str(run.path)])
        if found is not None:
            routing[str(run.path)] = found
    datasets: dict[str, list[Line]] = {}
    for line in lines_of(runs):
        datasets.setdefault(line.dataset, []).append(line)
    sections = [
        overview.section(datasets, [path.relative_to(folder) for path in empty], notes, _answer_times(measured)),
        scores.section(datasets),
        curves.section(datasets),
        costs.section(datasets, measured),
        routers.section(datasets, routing),
        samples.section(datasets, chosen),
        configuration.section(datasets),
    ]
    incomplete = sum(bool(overview.lacks(run)) for run in runs)
    return Page(_page(title, [one for one in sections if one], runs, date), len(runs), incomplete)


def _answer_times(measured: costs.Costs | None) -> dict[str, float]:
    found = measured.methods if measured else {}
    return {name: one["seconds_per_answer"] for name, one in found.items() if "seconds_per_answer" in one}


def _empty_folders(folder: Path, runs: Sequence[Run]) -> Iterable[Path]:
    """Folders without a run in, above or below them, the outermost of each."""
    places = {run.path for run in runs}
    above = {parent for place in places for parent in place.parents} | {folder}
    for place, inside, _ in os.walk(folder):
        here = Path(place)
        if here in places or (here not in above and here != folder):
            inside.clear()
        if here not in places and here not in above:
            yield here
        inside.sort()


_NAMES = {
    "overview": "Overview",
    "lacking": "What is missing",
    "scores": "Scores",
    "losses": "Losses",
    "costs": "Costs",
    "routers": "Routers",
    "answers": "Answers",
    "configuration": "Configuration",
}


def _page(title: str, sections: Sequence[Html], runs: Sequence[Run], date: str) -> str:
    whole = join(sections)
    links: list[Part] = [el("a", name, href=f"#{id_}") for id_, name in _NAMES.items() if f' id="{id_}"' in whole]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", title),
        el("link", rel="icon", href="data:,"),
        el("style", Html(STYLE)),
    )
    body = el(
        "body",
        el("a", "Skip to the overview", href="#overview", class_="skip"),
        el("header", el("h1", title), el("p", f"{len(runs)} runs, read on {date}.", class_="note")),
        el("nav", listed(links), aria_label="Sections"),
        el("main", whole),
        el("footer", el("p", "Made by python -m inspection report.", class_="note")),
    )
    return f"<!DOCTYPE html>\n{el('html', head, body, lang='en')}\n"
