"""The section of scores: figures with intervals, a table per data set, and scores beside what they cost to train."""

from collections.abc import Sequence

from inspection.page.figures import Mark, Spot, dots, scatter
from inspection.page.lines import Line, Suite, columns_of, headlines, label
from inspection.page.marks import PUBLISHED, ROBUST, Style, legend
from inspection.page.markup import Column, Html, Part, el, folded, table
from inspection.page.overview import score_cell
from inspection.runs import RULES

_LOOKS: dict[str, Style] = dict(zip(RULES, (PUBLISHED, ROBUST), strict=True))


def section(datasets: dict[str, list[Line]]) -> Html | None:
    """The section, None where nothing was scored."""
    parts: list[Part] = []
    for dataset, lines in datasets.items():
        columns = columns_of(lines)
        if columns:
            parts += [el("h3", f"Scores on {dataset}"), *_dataset(dataset, lines, columns)]
    if not parts:
        return None
    told = (
        "published: the rule behind the paper's tables; robust: what a reader would take as the answer. Bars are 95 %"
    )
    told += " intervals over the test rows, cut off at 0 and 100; where bars overlap widely, methods may be alike."
    return el("section", el("h2", "Scores", id="scores"), el("p", told, class_="note"), *parts)


def _dataset(dataset: str, lines: Sequence[Line], columns: list[Suite]) -> list[Part]:
    first = headlines(columns)
    figures = [_figure(dataset, lines, column, label(column, columns)) for column in first]
    scatters = [_scatter(dataset, lines, column, label(column, columns)) for column in first]
    rest = [_figure(dataset, lines, column, label(column, columns)) for column in columns if column not in first]
    parts: list[Part] = [
        el("div", *figures, *scatters, class_="figures"),
        _table(dataset, lines, columns),
    ]
    if rest:
        parts.append(folded("A figure for each test", el("div", *rest, class_="figures")))
    return parts


def _figure(dataset: str, lines: Sequence[Line], column: Suite, name: str) -> Html:
    rows, several = [], False
    for line in lines:
        marks = []
        for rule, look in _LOOKS.items():
            found = line.score(column, rule)
            if found is not None:
                spread, half_width = found
                singles = spread.values if spread.deviation is not None else []
                several = several or bool(singles)
                marks.append(Mark(spread.mean, half_width, singles, look, f"{line.name}: {spread.mean:.1f} % {rule}"))
        if marks:
            rows.append((line.name, marks))
    told = f"{column.name} ({column.rows}): percent right by both rules, with 95 % intervals."
    told += " Upright ticks are single seeds." if several else ""
    figure = dots(f"{name} of the methods on {dataset}", told, rows, "percent right", 100)
    return el("figure", figure, legend([(rule, look) for rule, look in _LOOKS.items()]), el("figcaption", told))


def _scatter(dataset: str, lines: Sequence[Line], column: Suite, name: str) -> Html | None:
    spots, named = [], []
    for line in lines:
        found = line.score(column, "robust")
        if found is not None and line.parameters and line.parameters[0] > 0:
            spots.append(Spot(float(line.parameters[0]), found[0].mean, found[1], line.name, line.look))
            named.append((line.name, line.look))
    if len(spots) < 2:
        return None
    told = f"{name}, robust rule, against the number of trained parameters (log scale), with 95 % intervals."
    title = f"{name} against trained parameters on {dataset}"
    figure = scatter(title, told, spots, "trained parameters", "percent right, robust rule")
    return el("figure", figure, legend(named), el("figcaption", told))


def _table(dataset: str, lines: Sequence[Line], columns: Sequence[Suite]) -> Html:
    heads = [Column("method")]
    heads += [Column(f"{label(column, columns)}, {rule} %", True) for column in columns for rule in RULES]
    rows = [[line.name, *(score_cell(line, column, rule) for column in columns for rule in RULES)] for line in lines]
    answered = "; ".join(f"{column.name}: {column.rows}" for column in columns if not column.mean)
    return table(f"Scores on {dataset}. Rows answered: {answered}", heads, rows)
