"""The section that says most at a glance: a line per method, and what each run lacks."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from inspection.page.curves import final_loss, losses
from inspection.page.lines import Line, Suite, brief, columns_of, headlines, is_number, label, scores_of
from inspection.page.markup import Column, Html, Part, el, join, table
from inspection.runs import RULES, Run


def section(
    datasets: dict[str, list[Line]],
    empty: Sequence[Path],
    notes: dict[str, list[str]],
    seconds_per_answer: dict[str, float],
) -> Html:
    """empty: folders that hold no run. notes: by a run's path, what the reading of its answers brought up.
    seconds_per_answer: by method, where it was measured."""
    parts: list[Part] = [el("h2", "Overview", id="overview")]
    for dataset, lines in datasets.items():
        parts += [el("h3", f"Runs on {dataset}"), _dataset(dataset, lines, notes, seconds_per_answer)]
    told = "A ± behind a score is half of its 95 % interval over the test rows, in points; sd is the standard deviation"
    told += " over seeds. Losses are means of the last tenth of the logged steps; time is the median of the steps and"
    told += " compares methods only where nothing else ran beside them; memory is the largest of the main process."
    parts.append(el("p", told, class_="note"))
    return el("section", *parts, _lacking(datasets, empty, notes))


def _dataset(
    dataset: str, lines: Sequence[Line], notes: dict[str, list[str]], seconds_per_answer: dict[str, float]
) -> Html:
    shown = headlines(columns_of(lines))
    columns = [Column("method"), Column("seeds"), Column("state"), Column("trained parameters", True)]
    columns += [Column("steps", True), Column("final loss", True)]
    columns += [Column(f"{label(column, shown)}, {rule} %", True) for column in shown for rule in RULES]
    columns += [Column("s per step", True), Column("peak memory", True)]
    columns += [Column("s per answer", True)] if seconds_per_answer else []
    rows = []
    for line in lines:
        row: list[Part] = [line.name, _seeds(line), _state(line, notes), parameters(line), _steps(line)]
        row += [_spread(line, final_loss)]
        row += [score_cell(line, column, rule) for column in shown for rule in RULES]
        row += [_spread(line, seconds_per_step), memory(line)]
        if seconds_per_answer:
            row.append(f"{seconds_per_answer[line.name]:.3f}" if line.name in seconds_per_answer else _NONE)
        rows.append(row)
    return table(f"The methods on {dataset}; {_NONE}: not trained, or not known", columns, rows)


def _seeds(line: Line) -> str:
    return ", ".join("not told" if run.seed is None else brief(run.seed, 12) for run in line.runs)


def _state(line: Line, notes: dict[str, list[str]]) -> Html:
    lacking = [run for run in line.runs if lacks(run)]
    if lacking:
        told = "incomplete" if len(line.runs) == 1 else f"{len(lacking)} of {len(line.runs)} incomplete"
        return el("a", told, href="#lacking", class_="state")
    noted = any(notes.get(str(run.path)) for run in line.runs)
    done = el("span", "complete", class_="state done")
    return join([done, ", ", el("a", "see notes", href="#lacking")]) if noted else done


def parameters(line: Line) -> str:
    """The number of trained parameters."""
    return ", ".join(f"{count:,}" for count in line.parameters) or _NONE


def _steps(line: Line) -> str:
    told = []
    for run in line.runs:
        if run.log or run.steps:
            of = "" if len(run.log) == run.steps else f" of {'?' if run.steps is None else brief(run.steps, 12)}"
            told.append(f"{len(run.log):,}{of}")
    return ", ".join(dict.fromkeys(told)) or _NONE


_NONE = "–"


def _spread(line: Line, value: Callable[[Run], float | None], digits: int = 2) -> Part:
    found = line.over(value)
    if found is None:
        return _NONE
    shown = f"{found.mean:.{digits}f}"
    return shown if found.deviation is None else join([shown, _under(f"sd {found.deviation:.{digits}f}")])


def _under(text: str) -> Html:
    return el("span", text, class_="under")


def score_cell(line: Line, column: Suite, rule: str) -> Part:
    """A score with its interval; below, where there are several seeds, each and their deviation."""
    found = line.score(column, rule)
    if found is None:
        return _NONE
    spread, half_width = found
    shown = f"{spread.mean:.1f}" + ("" if half_width is None else f" ± {half_width:.1f}")
    if spread.deviation is None:
        return shown
    seeds = ", ".join(f"{value:.1f}" for value in spread.values)
    return join([shown, _under(f"seeds {seeds}; sd {spread.deviation:.1f}")])


def seconds_per_step(run: Run) -> float | None:
    """The median over the logged steps."""
    found = [entry["seconds"] for entry in run.log if is_number(entry.get("seconds"))]
    return statistics.median(found) if found else None


def peak_memory(run: Run) -> float | None:
    """The largest of the logged steps, in bytes."""
    found = [entry["peak_memory_bytes"] for entry in run.log if is_number(entry.get("peak_memory_bytes"))]
    return float(max(found)) if found else None


def memory(line: Line) -> str:
    """The largest of its runs."""
    found = line.over(peak_memory)
    return f"{max(found.values) / 2**30:.2f} GiB" if found else _NONE


def lacks(run: Run) -> list[str]:
    """What a run lacks, and what in its record a reader should know, as sentences."""
    found = list(run.missing)
    scored = {column.name.casefold() for column in scores_of(run)}
    if run.scores is not None and not scored:
        found.append("scores.json holds no scores as `python -m evaluate --save_path` writes them")
    if run.steps is not None and len(run.log) > run.steps:
        found.append(f"log.jsonl has {len(run.log):,} steps, more than config.json asks for")
    skipped = len(run.log) - len(losses(run))
    if skipped:
        found.append(f"{skipped} logged step{'s have' if skipped > 1 else ' has'} no loss that is a number")
    return found


def _lacking(datasets: dict[str, list[Line]], empty: Sequence[Path], notes: dict[str, list[str]]) -> Html:
    rows: list[list[Part]] = []
    for dataset, lines in datasets.items():
        for line in lines:
            for run in line.runs:
                told = [*lacks(run), *_untested(run, lines), *notes.get(str(run.path), [])]
                if told:
                    rows.append([f"{dataset}: {line.run_name(run)}", el("ul", *(el("li", one) for one in told))])
        rows += [[f"{dataset}: seed {brief(seed, 12)}", told] for seed, told in _seeds_apart(lines)]
    rows += [
        [str(path), "the folder holds no run: no config.json, log.jsonl, answers or scores.json"] for path in empty
    ]
    head = el("h3", "What is missing", id="lacking")
    if not rows:
        return join([head, el("p", "Nothing: every run is trained to its last step, answered and scored.")])
    return join([head, table("Runs that lack something, and what", [Column("run"), Column("what")], rows)])


def _untested(run: Run, lines: Sequence[Line]) -> list[str]:
    """Tests that others have been scored on, and this run has not. (A run without any scores says so already.)"""
    own = {column.name for column in scores_of(run)}
    others = dict.fromkeys(column.name for column in columns_of(lines) if not column.mean)
    absent = [name for name in others if name not in own]
    return [f"not scored on {', '.join(absent)}, as other runs are"] if own and absent else []


def _seeds_apart(lines: Sequence[Line]) -> list[tuple[int, str]]:
    """Seeds that only some of the trained methods have a run of."""
    methods = dict.fromkeys(line.method for line in lines if line.trained)
    seeds: dict[int, set[str]] = {}
    for line in lines:
        for run in line.runs:
            if run.seed is not None and line.trained:
                seeds.setdefault(run.seed, set()).add(line.method)
    found = []
    for seed in sorted(seeds):
        absent = [method for method in methods if method not in seeds[seed]]
        if absent:
            found.append(
                (seed, f"no folder for {', '.join(absent)}; there is one for {', '.join(sorted(seeds[seed]))}")
            )
    return found
