"""Run folders and groups of runs, for the report, the figures and exps/collect.py.

A run is what `finetune.py`, `generate.py` and `python -m evaluate --save_path` leave in a folder: config.json,
log.jsonl, the adapter, one file of predictions per test, scores.json. A folder is read in whatever state it is; what is
missing or damaged becomes a sentence. A group is the runs that differ in their seed alone. Needs no torch.
"""

import json
import math
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from inspection.html import visible
from training.config import RESUMABLE_FIELDS

RULES = ("published", "robust")
MARKS = ("config.json", "log.jsonl", "scores.json", "*.jsonl.settings.json")  # a folder with one of these is a run
LOGGED = ("seconds", "tokens", "peak_memory_bytes")

# Runs of one group may differ in what a resumed run may change, in their seed, and in how the length and the learning
# rate were given: RESOLVED holds what those came to.
NOT_COMPARED = RESUMABLE_FIELDS | {"seed", "flash_attention2", "epochs", "max_steps", "lr", "blr", "warmup_epochs"}
NOT_COMPARED |= {"adapter_sha256", "adapter_params_sha256"}
COUNTS = ("steps", "rows_per_step", "trainable_parameters")
RESOLVED = (*COUNTS, "base_fingerprint", "data_sha256", "rows", "warmup_steps", "lr")


class Score(NamedTuple):
    """Percent right, and half the width of its 95 % interval over the test rows (None where it is not known)."""

    percent: float
    half_width: float | None


class Spread(NamedTuple):
    """Mean and sample standard deviation (None of a single value) of values over seeds. half_width: of scores, the mean
    of those of their intervals."""

    mean: float
    deviation: float | None
    values: list[float]
    half_width: float | None = None


@dataclass
class Run:
    """One run folder.

    method: the folder's name, with the adapter's method behind it where the name does not begin so.
    record: config.json. numbers: COUNTS, and seconds, seconds_per_step, tokens_per_s, peak_memory_bytes, final_loss
    (mean of the last tenth of the steps) and adapter_bytes, as far as they are known. losses: (step, loss).
    scores: column -> rule -> Score; means: the tests that a column of means is over. answers: test -> predictions.
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
    losses: list[tuple[int, float]] = field(default_factory=list)
    scores_file: dict[str, Any] | None = None
    scores: dict[str, dict[str, Score]] = field(default_factory=dict)
    means: dict[str, tuple[str, ...]] = field(default_factory=dict)
    answers: dict[str, Path] = field(default_factory=dict)
    answer_settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return brief(self.method if self.seed is None else f"{self.method} s{self.seed}", 80)

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
        differs = ", ".join(f"{name} {_short(value)}" for name, value in self.differs.items())
        return brief(f"{self.method} ({differs})" if differs else self.method, 80)

    def run_name(self, run: Run) -> str:
        return self.name if run.seed is None else f"{self.name} s{brief(run.seed, 12)}"

    @property
    def trained(self) -> bool:
        return any(run.trained for run in self.runs)

    def over(self, name: str) -> Spread | None:
        """One of the runs' numbers; None where no run has it."""
        return _spread([run.numbers[name] for run in self.runs if name in run.numbers])

    def score(self, column: str, rule: str) -> Spread | None:
        scores = [run.scores[column][rule] for run in self.runs if column in run.scores]
        widths = _spread([score.half_width for score in scores if score.half_width is not None])
        spread = _spread([score.percent for score in scores])
        return spread and spread._replace(half_width=widths and widths.mean)


def _spread(values: list[float]) -> Spread | None:
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, values)


def find_runs(folders: Iterable[str | Path]) -> list[Run]:
    """The runs at and under the folders, each once, by path (s10 behind s9), untuned models first. ValueError where
    there is no such folder."""
    paths: dict[Path, Path] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        inside = {path.parent for mark in MARKS for path in folder.rglob(mark)}
        paths |= {path.resolve(): path for path in sorted(inside, key=_natural)}
    return sorted(map(read_run, paths.values()), key=lambda run: run.trained)


def read_run(folder: Path) -> Run:
    """The run in a folder. Nothing in its files makes this fail."""
    run = Run(folder, *_names(folder.resolve()))
    for file in sorted(folder.glob("*.jsonl"), key=_natural):
        if file.name not in ("log.jsonl", "verdicts.jsonl"):
            run.answers[file.stem] = file
    for file in sorted(folder.glob("*.jsonl.settings.json"), key=_natural):
        run.answer_settings[file.name.removesuffix(".jsonl.settings.json")] = _read_object(run, file.name) or {}
    _read_record(run)
    _read_log(run)
    _read_scores(run)
    for test, settings in run.answer_settings.items():
        run.settings |= {f"{test}: {name}": value for name, value in settings.items() if name not in NOT_COMPARED}
    if run.scores:
        run.settings["tests"] = ", ".join(sorted(run.scores))
    files = [file for name in ("adapter.pth", "adapter.safetensors") if (file := folder / name).is_file()]
    if files:
        run.numbers["adapter_bytes"] = files[0].stat().st_size
    elif run.trained:
        run.missing.append("no adapter file")
    if not run.answers:
        run.missing.append("no test was answered")
    parts = {re.sub(r"\.jsonl\.part\d+$", "", file.name) for file in folder.glob("*.jsonl.part*")}
    run.missing += [f"the answers to {name} are not complete" for name in sorted(parts)]
    return run


def _names(folder: Path) -> tuple[str, str, int | None]:
    """Method, data set and seed of DATASET/METHOD/sSEED, DATASET/METHOD-sSEED or DATASET/METHOD."""
    seeded = re.fullmatch(r"(?:(.+)-)?s(\d{1,9})", folder.name)
    if seeded is None:
        return folder.name, folder.parent.name, None
    if seeded[1]:
        return seeded[1], folder.parent.name, int(seeded[2])
    return folder.parent.name, folder.parent.parent.name, int(seeded[2])


def _read_record(run: Run) -> None:
    run.record = record = _read_object(run, "config.json")
    if record is None:
        if not (run.path / "config.json").exists() and (run.path / "log.jsonl").exists():
            run.damaged.append("config.json: no such file, so the settings are not known")
        return
    settings, adapter = (record[name] if isinstance(record.get(name), dict) else {} for name in ("settings", "adapter"))
    run.numbers |= {name: record[name] for name in COUNTS if type(record.get(name)) is int and is_number(record[name])}
    run.damaged += [f"config.json: no whole number {name!r}" for name in COUNTS if name not in run.numbers]
    method, seed = adapter.get("method"), settings.get("seed")
    if not isinstance(method, str) or type(seed) is not int:
        run.damaged.append("config.json: no settings with a seed, or no adapter with a method")
    if isinstance(method, str) and not run.method.startswith(method):
        run.method = f"{run.method}: {method}"
    run.seed = seed if type(seed) is int else run.seed
    run.settings = {name: value for name, value in settings.items() if name not in NOT_COMPARED} | adapter
    run.settings |= {name: record[name] for name in RESOLVED if name in record}


def _read_log(run: Run) -> None:
    """A last line that was cut short is left out."""
    lines, entries = (_read_text(run, "log.jsonl") or "").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        absent = [n for n in ("step", *LOGGED) if not isinstance(entry, dict) or not is_number(entry.get(n))]
        if absent and number < len(lines):
            run.damaged.append(f"log.jsonl: line {number} is not a step of a run: no number {absent[0]!r}")
        if not absent:
            entries.append(entry)
    run.logged_steps = len(entries)
    run.losses = [(entry["step"], float(entry["loss"])) for entry in entries if is_number(entry.get("loss"))]
    if not run.trained:
        return
    steps = run.numbers.get("steps")
    if steps != len(entries) or [entry["step"] for entry in entries] != list(range(1, len(entries) + 1)):
        run.unfinished.append(f"{len(entries)} of {'unknown' if steps is None else steps} steps in log.jsonl")
    if len(run.losses) < len(entries):
        run.missing.append(f"{len(entries) - len(run.losses)} of {len(entries)} steps have no loss that is a number")
    if entries:
        seconds, tokens, peaks = ([float(entry[name]) for entry in entries] for name in LOGGED)
        run.numbers |= {"seconds": math.fsum(seconds), "seconds_per_step": statistics.median(seconds)}
        run.numbers["tokens_per_s"] = math.fsum(tokens) / max(math.fsum(seconds), 1e-9)
        run.numbers["peak_memory_bytes"] = max(peaks)
    if run.losses:
        last = [loss for _, loss in run.losses[-max(len(run.losses) // 10, 1) :]]
        run.numbers["final_loss"] = statistics.fmean(last)


def _read_scores(run: Run) -> None:
    if not (run.path / "scores.json").exists():
        run.unfinished.append("no scores.json")
        return
    run.scores_file = _read_object(run, "scores.json")
    try:
        run.scores, run.means = _scores(run.scores_file) if run.scores_file is not None else ({}, {})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = brief(f"{type(error).__name__}: {error}")
        run.damaged.append(f"scores.json: not scores of `python -m evaluate --save_path` ({why})")


def _scores(content: dict[str, Any]) -> tuple[dict[str, dict[str, Score]], dict[str, tuple[str, ...]]]:
    """Scores by column and rule, and the tests that columns of means are over. A column is a test, or its pass@k where
    several samples were drawn, or the mean over a family of several tests."""
    scores, means, names = {}, {}, {}
    for test, part in content["suites"].items():
        rows, problems = part["rows"], part["problems"]
        names[test] = f"{test} ({rows})" if rows == problems else f"{test} ({rows} of {problems})"
        if "pass_at" not in part:
            scores[names[test]] = {rule: _score(part[rule]) for rule in RULES}
        for k in part.get("pass_at", {}).get("published", {}):
            by_rule = {rule: _score({"percent": part["pass_at"][rule][k]}) for rule in RULES}
            scores[names[test].replace(" (", f" pass@{k} (", 1)] = by_rule
    for family, part in content["families"].items():
        if len(part["suites"]) > 1:
            scores[f"mean, {family}"] = {rule: _score(part["mean"][rule]) for rule in RULES}
            means[f"mean, {family}"] = tuple(names[test] for test in part["suites"])
    return scores, means


def _score(part: dict[str, Any]) -> Score:
    percent, half_width = part["percent"], part.get("half_width")
    if not is_number(percent) or not 0 <= percent <= 100:
        raise ValueError(f"{percent!r} is no percentage")
    return Score(float(percent), float(half_width) if is_number(half_width) else None)


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
        differs = {name: run.settings[name] for name in _differing(alike[0].settings, run.settings)} if alike else {}
        group.differs = _merge_tests(differs, run)
        if group.name in {other.name for other in alike}:
            group.differs["run"] = len(alike) + 1
        groups.append(group)
    for dataset in dict.fromkeys(group.dataset for group in groups):
        _rename_means([run for group in groups if group.dataset == dataset for run in group.runs])
    return groups


def _differing(settings: dict[str, Any], others: dict[str, Any]) -> list[str]:
    return [name for name, value in settings.items() if name in others and others[name] != value]


def _merge_tests(settings: dict[str, Any], run: Run) -> dict[str, Any]:
    """Say once what holds for the answers to every test."""
    merged: dict[str, Any] = {}
    for name, value in settings.items():
        _, colon, setting = name.partition(": ")
        alike = colon and all(settings.get(f"{test}: {setting}") == value for test in run.answer_settings)
        merged[f"generate: {setting}" if alike else name] = value
    return merged


def _rename_means(runs: list[Run]) -> None:
    """Give a mean over other tests than another run's a column of its own."""
    for column in {column for run in runs for column in run.means}:
        if len({run.means[column] for run in runs if column in run.means}) > 1:
            for run in runs:
                if column in run.means:
                    run.scores[f"{column}: {', '.join(run.means.pop(column))}"] = run.scores.pop(column)


def columns_of(groups: Iterable[RunGroup]) -> list[str]:
    """The columns of scores that any of the runs has, means last."""
    columns = dict.fromkeys(column for group in groups for run in group.runs for column in run.scores)
    return sorted(columns, key=lambda column: column.startswith("mean, "))


def headlines(columns: list[str]) -> list[str]:
    """The columns to show first: the means, or the tests where there are none."""
    return [column for column in columns if column.startswith("mean, ")] or columns


def is_number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def brief(value: Any, length: int = 200) -> str:
    """A value from a file as visible text of at most about `length` characters."""
    try:
        text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = type(value).__name__
    return visible(text if len(text) <= length else text[: length - 1] + "…")


def _short(value: Any) -> str:
    """Of a hash its first ten digits."""
    return str(value)[:10] if re.fullmatch("[0-9a-f]{32,}", str(value)) else brief(value, 60)


def _read_text(run: Run, name: str) -> str | None:
    try:
        return (run.path / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        run.damaged.append(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})")
        return None


def _read_object(run: Run, name: str) -> dict[str, Any] | None:
    text = _read_text(run, name)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        run.damaged.append(f"{name}: not valid JSON ({error})")
        return None
    if not isinstance(value, dict):
        run.damaged.append(f"{name}: expected a JSON object")
        return None
    return value


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """A sorting key that puts s10 behind s9."""
    parts = re.split(r"(?a:(\d{1,9}))", str(path))
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
