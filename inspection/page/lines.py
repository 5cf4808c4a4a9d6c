"""Lines of the report: runs that differ in their seed alone, and figures of them as mean and spread."""

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from inspection.page.marks import Style, style
from inspection.runs import RULES, Run
from moa.reading import parse_json, read_text

# What runs of one line may differ in: seed, places, how the work was shared out; and what a resolved value stands for
FREE = frozenset(
    "seed ckpt_dir data_path output_dir save_every resume overwrite dry_run leak_tests device model_parallel_size "
    "batch_size accum_iter activation_checkpointing flash_attention2 adapter_config keep_checkpoints epochs max_steps "
    "lr blr warmup_epochs adapter_sha256 adapter_params_sha256".split()
)
RESOLVED = ("steps", "rows_per_step", "trainable_parameters", "base_fingerprint", "data_sha256", "rows")
RESOLVED += ("warmup_steps", "lr")


class Score(NamedTuple):
    """A percentage and half the width of its 95 % interval, in points."""

    percent: float
    half_width: float | None


class Suite(NamedTuple):
    """A column of scores: a test, or the mean over several. rows: how many of how many were answered."""

    name: str
    rows: str
    mean: bool


class Spread(NamedTuple):
    """mean and sample standard deviation (None of a single value) of values over seeds."""

    mean: float
    deviation: float | None
    values: list[float]


@dataclass
class Line:
    """Runs of one method on one data set that differ in their seed alone. differs: in what they differ from the
    method's first line. compared: the settings of its first run that has any."""

    dataset: str
    method: str
    runs: list[Run]
    compared: dict[str, Any]
    look: Style
    differs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        told = ", ".join(f"{name} {brief(value, 20)}" for name, value in self.differs.items())
        return brief(f"{self.method} ({told})" if told else self.method, 80)

    def run_name(self, run: Run) -> str:
        return self.name if run.seed is None else f"{self.name} s{brief(run.seed, 12)}"

    @property
    def parameters(self) -> list[int]:
        """The numbers of trained parameters that its runs tell."""
        return sorted({run.trainable_parameters for run in self.runs if is_number(run.trainable_parameters)})

    @property
    def trained(self) -> bool:
        return any(run.record is not None or run.log for run in self.runs)

    def over(self, value: Callable[[Run], float | None]) -> Spread | None:
        """Of the runs that have the value; None where none has."""
        values = [one for run in self.runs if (one := value(run)) is not None]
        if not values:
            return None
        return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, values)

    def score(self, column: Suite, rule: str) -> tuple[Spread, float | None] | None:
        """The percentage over seeds, and the mean of their intervals' half-widths."""

        def scored(run: Run) -> Score | None:
            return scores_of(run).get(column, {}).get(rule)

        spread = self.over(lambda run: None if (one := scored(run)) is None else one.percent)
        widths = self.over(lambda run: None if (one := scored(run)) is None else one.half_width)
        return None if spread is None else (spread, None if widths is None else widths.mean)


def lines_of(runs: Iterable[Run]) -> list[Line]:
    """Runs in lines, in the order in which they come; a method looks the same wherever it stands."""
    lines: list[Line] = []
    looks: dict[str, Style] = {}
    for run in runs:
        settings = compared(run)
        own = [line for line in lines if (line.dataset, line.method) == (run.dataset, run.method)]
        for line in own:
            seeds = {one.seed for one in line.runs}
            if run.seed not in seeds and _agree(line.compared, settings):
                line.runs.append(run)
                line.compared = line.compared or settings
                break
        else:
            look = looks.setdefault(f"{run.method} {len(own)}", style(len(looks)))
            lines.append(Line(run.dataset, run.method, [run], settings, look))
    first: dict[tuple[str, str], Line] = {}
    for line in lines:
        usual = first.setdefault((line.dataset, line.method), line).compared
        line.differs = {name: value for name, value in line.compared.items() if name in usual and usual[name] != value}
    names: dict[tuple[str, str], int] = {}
    for line in lines:
        same = names[line.dataset, line.name] = names.get((line.dataset, line.name), 0) + 1
        if same > 1:  # two runs of one seed
            line.differs["run"] = same
    return lines


def _agree(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """In all that is known of both: an unfinished run has not yet been tested."""
    return all(other[name] == value for name, value in one.items() if name in other)


def compared(run: Run) -> dict[str, Any]:
    """All that a run's scores follow from, the seed apart, with what typed values came to in their place."""
    typed = {name: value for name, value in run.settings.items() if name not in FREE}
    resolved = {name: run.record[name] for name in RESOLVED if run.record and name in run.record}
    answers = {
        f"{suite}: {name}": value
        for suite, settings in answering(run).items()
        for name, value in settings.items()
        if name not in FREE
    }
    return typed | run.adapter | resolved | answers


def answering(run: Run) -> dict[str, dict[str, Any]]:
    """How each test was answered, as far as a file beside the answers tells."""
    found = {}
    for suite, file in run.answers.items():
        try:
            value = parse_json(read_text(file.with_name(f"{file.name}.settings.json")), "")
        except (ValueError, OSError):
            continue
        if isinstance(value, dict):
            found[suite] = value
    return found


def scores_of(run: Run) -> dict[Suite, dict[str, Score]]:
    """The scores of a run by column and rule: each test's, then the means of families of several tests. What is not as
    `python -m evaluate --save_path` writes it is left out."""
    found: dict[Suite, dict[str, Score]] = {}
    suites = _dict(_dict(run.scores).get("suites"))
    rows: dict[str, str] = {}
    for name, part in suites.items():
        part = _dict(part)
        count, problems = part.get("rows"), part.get("problems")
        rows[name] = f"{count} rows" if count == problems else f"{brief(count)} of {brief(problems)} rows"
        _take(found, Suite(name, rows[name], False), part)
    for family, part in _dict(_dict(run.scores).get("families")).items():
        part = _dict(part)
        members = part.get("suites")
        if isinstance(members, list) and len(members) > 1 and all(isinstance(one, str) for one in members):
            over = ", ".join(f"{one} ({rows.get(one, '?')})" for one in members)
            _take(found, Suite(f"mean, {family}", f"over {over}", True), _dict(part.get("mean")))
    return found


def _take(found: dict[Suite, dict[str, Score]], column: Suite, part: dict[str, Any]) -> None:
    both = {rule: _score(_dict(part.get(rule))) for rule in RULES}
    known = {rule: score for rule, score in both.items() if score is not None}
    if len(known) == len(RULES):
        found[column] = known


def _score(part: dict[str, Any]) -> Score | None:
    percent, half_width = part.get("percent"), part.get("half_width")
    if not is_number(percent) or not 0 <= percent <= 100:
        return None
    return Score(float(percent), float(half_width) if is_number(half_width) and 0 <= half_width <= 100 else None)


def columns_of(lines: Iterable[Line]) -> list[Suite]:
    """The columns of scores that any of the runs has, tests first."""
    names = dict.fromkeys(column for line in lines for run in line.runs for column in scores_of(run))
    return sorted(names, key=lambda column: column.mean)


def label(column: Suite, columns: Iterable[Suite]) -> str:
    """A column's name, with how many rows where another column has the same: those are not to be compared."""
    return f"{column.name} ({column.rows})" if sum(one.name == column.name for one in columns) > 1 else column.name


def headlines(columns: list[Suite]) -> list[Suite]:
    """The columns to show first: the means, or the tests where there are none."""
    return [column for column in columns if column.mean] or columns


def is_number(value: Any) -> bool:
    """Whether it can be reckoned with: JSON also holds integers beyond any float."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def brief(value: Any, length: int = 200) -> str:
    """A value from a file as a page can show it."""
    try:
        shown = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        shown = str(type(value).__name__)
    return shown if len(shown) <= length else shown[: length - 1] + "…"
