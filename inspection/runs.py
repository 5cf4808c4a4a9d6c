"""Run folders and groups of runs, for the report and exps/collect.py.

A run is what `finetune.py`, `generate.py` and `python -m evaluate --save_path` leave in a folder: config.json,
log.jsonl, the adapter, one file of predictions per test, scores.json. A folder is read in whatever state it is; what is
missing or damaged becomes a sentence. A group is the runs that differ in their seed alone.
"""

import json
import math
import re
import statistics
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from inspection.html import visible
from moa.reading import parse_json, read_text
from training.config import RESUMABLE_FIELDS

RULES = ("published", "robust")
MARKS = ("config.json", "log.jsonl", "scores.json", "*.jsonl.settings.json")  # a folder with one of these is a run
SETTINGS = ".jsonl.settings.json"

# Runs of one group may differ in what a resumed run may change, in their seed, and in how the length and the learning
# rate were given: RESOLVED holds what those came to.
NOT_COMPARED = RESUMABLE_FIELDS | {"seed", "flash_attention2", "epochs", "max_steps", "lr", "blr", "warmup_epochs"}
NOT_COMPARED |= {"init_adapter", "adapter_sha256", "adapter_params_sha256"}
COUNTS = ("steps", "rows_per_step", "trainable_parameters")
RESOLVED = (*COUNTS, "base_fingerprint", "data_sha256", "init_adapter_sha256", "rows", "warmup_steps", "lr")


NONE = "–"  # what is not known, in a table


class Quantity(NamedTuple):
    """How a number is shown: its name, how far to divide it to get the unit in the name, its format."""

    label: str
    unit: float = 1
    form: str = ",.0f"


QUANTITIES = {
    "percent": Quantity("%", form=".1f"),
    "trainable_parameters": Quantity("trained parameters"),
    "rows_per_step": Quantity("rows per step"),
    "final_loss": Quantity("final loss", form=".2f"),
    "val_loss": Quantity("lowest validation loss", form=".3f"),
    "best_step": Quantity("at step"),
    "val_score": Quantity("score there, %", form=".1f"),
    "seconds": Quantity("training, min", 60, ",.1f"),
    "seconds_per_step": Quantity("a step, s", form=",.2f"),
    "tokens_per_s": Quantity("tokens/s"),
    "peak_memory_bytes": Quantity("peak memory, GB", 1e9, ",.2f"),
    "adapter_bytes": Quantity("adapter file, MB", 1e6, ",.1f"),
}


class Spread(NamedTuple):
    """Mean and sample standard deviation (None of a single value) of values over seeds. half_width: of scores, the mean
    of those of their intervals."""

    mean: float
    deviation: float | None
    values: list[float]
    half_width: float | None = None


def spread_of(values: list[float]) -> Spread | None:
    """None of no values."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, values)


def show(spread: Spread | None, name: str, between: str = " ± ") -> str:
    """A quantity's mean, and its deviation over the seeds where there is one."""
    if spread is None:
        return NONE
    _, unit, form = QUANTITIES[name]
    deviation = f"{between}{spread.deviation / unit:{form}}" if spread.deviation else ""
    return f"{spread.mean / unit:{form}}{deviation}"


@dataclass
class Run:
    """One run folder.

    method: the folder's name, with the adapter's method behind it where the name does not begin so.
    record: config.json. numbers: those of QUANTITIES that are known, and `steps`; final_loss is the mean of the last
    tenth of the steps. losses, val_losses: (step, loss).
    scores: column -> rule -> Spread; means: the tests that a column of means is over.
    unfinished: reasons why its scores are not final; damaged: "FILE: what is wrong with it"; missing: the rest that a
    finished run would have.
    """

    path: Path
    method: str
    dataset: str
    seed: int | None
    record: dict[str, Any] | None = None
    numbers: dict[str, float] = field(default_factory=dict)
    logged_steps: int = 0
    stopped_early: bool = False
    losses: list[tuple[int, float]] = field(default_factory=list)
    val_losses: list[tuple[int, float]] = field(default_factory=list)
    scores_file: dict[str, Any] | None = None
    scores: dict[str, dict[str, Spread]] = field(default_factory=dict)
    means: dict[str, list[str]] = field(default_factory=dict)
    answer_settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def trained(self) -> bool:
        return self.record is not None or self.logged_steps > 0

    @property
    def problems(self) -> list[str]:
        return [*self.unfinished, *self.damaged, *self.missing]


@dataclass
class RunGroup:
    """Runs of one method on one data set that differ in their seed alone. settings: what their scores follow from.
    differs: in what they differ from the method's first group."""

    dataset: str
    method: str
    runs: list[Run]
    settings: dict[str, Any]
    differs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        differs = ", ".join(f"{name} {brief(value, 32)}" for name, value in self.differs.items())
        return brief(f"{self.method} ({differs})" if differs else self.method, 80)

    def run_name(self, run: Run) -> str:
        return self.name if run.seed is None else f"{self.name} s{run.seed}"

    @property
    def trained(self) -> bool:
        return any(run.trained for run in self.runs)

    def over(self, name: str) -> Spread | None:
        """One of the runs' numbers; None where no run has it."""
        return spread_of([run.numbers[name] for run in self.runs if name in run.numbers])

    def score(self, column: str, rule: str) -> Spread | None:
        scores = [run.scores[column][rule] for run in self.runs if column in run.scores]
        widths = [score.half_width for score in scores if score.half_width is not None]
        spread = spread_of([score.mean for score in scores])
        return spread and spread._replace(half_width=statistics.fmean(widths) if widths else None)


def find_runs(folders: Iterable[str | Path]) -> list[Run]:
    """The runs at and under the folders, each once, by path (s10 behind s9), untuned models first. ValueError where
    there is none, or no such folder."""
    paths: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        inside = {path.parent for mark in MARKS for path in folder.rglob(mark)}
        paths |= {path.resolve(): path for path in sorted(inside, key=_natural)}
    if not paths:
        names = ", ".join(map(str, folders))
        raise ValueError(f"{names}: no run in it (a folder with config.json, log.jsonl or scores.json)")
    return sorted(map(read_run, paths.values()), key=lambda run: run.trained)


@contextmanager
def expecting(path: str | Path, what: str) -> Iterator[None]:
    """Turn whatever reading a damaged file raises into a ValueError that names it and what was expected."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        if str(error).startswith(f"{path}: "):
            raise
        raise ValueError(f"{path}: not {what} ({brief(f'{type(error).__name__}: {error}')})") from None


def read_run(folder: Path) -> Run:
    """The run in a folder. What is wrong with one of its files stands in `damaged`."""
    run = Run(folder, *_names(folder.resolve()))
    readers = [("config.json", "the record of finetune.py", _read_record)]
    readers += [("log.jsonl", "the log of finetune.py", _read_log)]
    readers += [("scores.json", "scores of `python -m evaluate --save_path`", _read_scores)]
    for file in sorted(folder.glob(f"*{SETTINGS}")):
        readers.append((file.name, "the settings of generate.py", _read_answer_settings))
    for name, what, read in readers:
        try:
            if (folder / name).exists():
                with expecting(name, what):
                    read(run, name, read_text(folder / name))
        except (ValueError, OSError) as error:
            run.damaged.append(str(error))
    _find_missing(run)
    return run


def _names(folder: Path) -> tuple[str, str, int | None]:
    """Method, data set and seed of DATASET/METHOD/sSEED, DATASET/METHOD-sSEED or DATASET/METHOD."""
    dataset, method, seed = re.search(r"([^/]*)/([^/]+?)(?:[-/]s(\d+))?$", str(folder)).groups()
    return method, dataset, None if seed is None else int(seed)


def _read_record(run: Run, name: str, text: str) -> None:
    record = parse_json(text, name)
    settings, adapter, counts = record["settings"], record["adapter"], {name: record[name] for name in COUNTS}
    if not all(type(number) is int for number in (settings["seed"], *counts.values())):
        raise ValueError(f"seed, {', '.join(COUNTS)}: expected whole numbers")
    if not run.method.startswith(adapter["method"]):
        run.method = f"{run.method}: {adapter['method']}"
    run.record, run.seed, run.numbers = record, settings["seed"], counts
    run.settings |= {name: value for name, value in settings.items() if name not in NOT_COMPARED} | adapter
    run.settings |= {name: record[name] for name in RESOLVED if name in record}


def _read_log(run: Run, name: str, text: str) -> None:
    lines, steps, val_scores = text.splitlines(), [], {}
    for number, line in enumerate(lines, 1):
        try:
            with expecting(f"line {number}", "a step"):
                entry = parse_json(line, f"line {number}")
                step, *numbers = (float(entry[key]) for key in ("step", "seconds", "tokens", "peak_memory_bytes"))
                for losses, key in ((run.losses, "loss"), (run.val_losses, "val_loss")):
                    if entry.get(key) is not None:
                        losses.append((int(step), float(entry[key])))
                if entry.get("val_score") is not None:
                    val_scores[int(step)] = float(entry["val_score"])
                steps.append(numbers)
                run.stopped_early = entry.get("early_stop") is True
        except ValueError as error:
            if number < len(lines):  # the last one may have been cut short
                run.damaged.append(f"{name}: {error}")
    run.logged_steps = len(steps)
    if steps:
        seconds, tokens, peaks = zip(*steps, strict=True)
        run.numbers |= {"seconds": math.fsum(seconds), "seconds_per_step": statistics.median(seconds)}
        run.numbers |= {"tokens_per_s": sum(tokens) / max(sum(seconds), 1e-9), "peak_memory_bytes": max(peaks)}
    if run.losses:
        last = run.losses[-max(len(run.losses) // 10, 1) :]
        run.numbers["final_loss"] = statistics.fmean(loss for _, loss in last)
    if run.val_losses:
        run.numbers["val_loss"], best = min((loss, step) for step, loss in run.val_losses)
        run.numbers["best_step"] = best
        if best in val_scores:
            run.numbers["val_score"] = val_scores[best]


def _read_scores(run: Run, name: str, text: str) -> None:
    """A column is a test, or its pass@k where several samples were drawn, or the mean over a family of tests."""
    content, scores, means, columns = parse_json(text, name), {}, {}, {}
    for test, part in content["suites"].items():
        rows, problems = part["rows"], part["problems"]
        count = f"({rows})" if rows == problems else f"({rows} of {problems})"
        columns[test] = f"{test} {count}"
        if "pass_at" not in part:
            scores[columns[test]] = {rule: _score(part[rule]) for rule in RULES}
        for k in part.get("pass_at", {}).get("published", {}):
            by_rule = {rule: _score({"percent": part["pass_at"][rule][k]}) for rule in RULES}
            scores[f"{test} pass@{k} {count}"] = by_rule
    for family, part in content["families"].items():
        if len(part["suites"]) > 1:
            scores[f"mean, {family}"] = {rule: _score(part["mean"][rule]) for rule in RULES}
            means[f"mean, {family}"] = [columns[test] for test in part["suites"]]
    run.scores_file, run.scores, run.means = content, scores, means
    run.settings["tests"] = ", ".join(sorted(scores))


def _score(part: dict[str, Any]) -> Spread:
    if not 0 <= part["percent"] <= 100:
        raise ValueError(f"{part['percent']} is no percentage")
    return Spread(part["percent"], None, [part["percent"]], part.get("half_width"))


def _read_answer_settings(run: Run, name: str, text: str) -> None:
    test, settings = name.removesuffix(SETTINGS), dict(parse_json(text, name))
    run.answer_settings[test] = settings
    run.settings |= {f"{test}: {name}": value for name, value in settings.items() if name not in NOT_COMPARED}


def _find_missing(run: Run) -> None:
    if run.trained:
        steps = run.numbers.get("steps", "unknown")
        if steps != run.logged_steps and not run.stopped_early:
            run.unfinished.append(f"{run.logged_steps} of {steps} steps in log.jsonl")
        if len(run.losses) < run.logged_steps:
            lacking = run.logged_steps - len(run.losses)
            run.missing.append(f"{lacking} of {run.logged_steps} steps have no loss that is a number")
        files = [file for file in run.path.glob("adapter.*") if file.suffix in (".pth", ".safetensors")]
        if files:
            run.numbers["adapter_bytes"] = files[0].stat().st_size
        else:
            run.missing.append("no adapter file")
    if not (run.path / "scores.json").exists():
        run.unfinished.append("no scores.json")


def group_runs(runs: Iterable[Run]) -> list[RunGroup]:
    """Runs by data set, method and settings, in the order in which they come. Settings that only one of two runs has do
    not keep them apart: an unfinished run has not been tested yet. A second run of a seed has a group of its own."""
    groups: list[RunGroup] = []
    for run in runs:
        alike = [group for group in groups if (group.dataset, group.method) == (run.dataset, run.method)]
        fitting = [group for group in alike if not _differing(group.settings, run.settings)]
        fitting = [group for group in fitting if run.seed not in {other.seed for other in group.runs}]
        if fitting:
            fitting[0].runs.append(run)
            fitting[0].settings |= run.settings
            continue
        group = RunGroup(run.dataset, run.method, [run], dict(run.settings))
        # What holds for the answers to every test is named once
        differing = _differing(alike[0].settings, run.settings) if alike else []
        group.differs = {name.split(": ")[-1]: run.settings[name] for name in differing}
        if group.name in {other.name for other in alike}:
            group.differs["run"] = len(alike) + 1
        groups.append(group)
    for members in by_dataset(groups).values():
        _rename_means([run for group in members for run in group.runs])
    return groups


def _differing(settings: dict[str, Any], others: dict[str, Any]) -> list[str]:
    return [name for name, value in settings.items() if name in others and others[name] != value]


def _rename_means(runs: list[Run]) -> None:
    """Give a mean over other tests than another run's a column of its own."""
    for column in {column for run in runs for column in run.means}:
        with_it = [run for run in runs if column in run.means]
        if any(run.means[column] != with_it[0].means[column] for run in with_it):
            for run in with_it:
                run.scores[f"{column}: {', '.join(run.means.pop(column))}"] = run.scores.pop(column)


def by_dataset(groups: Iterable[RunGroup]) -> dict[str, list[RunGroup]]:
    datasets: dict[str, list[RunGroup]] = {}
    for group in groups:
        datasets.setdefault(group.dataset, []).append(group)
    return datasets


def columns_of(groups: Iterable[RunGroup]) -> list[str]:
    """The columns of scores that any of the runs has, means last."""
    columns = dict.fromkeys(column for group in groups for run in group.runs for column in run.scores)
    return sorted(columns, key=lambda column: column.startswith("mean, "))


def headlines(columns: list[str]) -> list[str]:
    """The columns to show first: the means, or the tests where there are none."""
    return [column for column in columns if column.startswith("mean, ")] or columns


def brief(value: Any, length: int = 200) -> str:
    """A value from a file as visible text of at most about `length` characters."""
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    return visible(text if len(text) <= length else text[: length - 1] + "…")


def _natural(path: Path) -> list[str | int]:
    """A sorting key that puts s10 behind s9."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d{1,9})", str(path)))]
