"""Lines of a table: runs that may be averaged, because they differ in nothing but the seed. Part of exps/collect.py."""

import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from run_folders import Run


@dataclass
class Line:
    """Runs that differ in their seed alone. differs: settings that tell it from other lines of the same model."""

    dataset: str
    model: str
    runs: list[Run]
    differs: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        differs = ", ".join(f"{name} {_short(value)}" for name, value in self.differs.items())
        return f"{self.model} ({differs})" if differs else self.model

    def recorded(self, name: str) -> Any:
        """An entry of config.json in which the runs agree, None for an untuned model."""
        return self.runs[0].record[name] if self.runs[0].record else None

    def score(self, column: str, rule: str) -> tuple[float, float | None] | None:
        """Mean and sample standard deviation (None for a single run); None where a run has no such score."""
        return _spread(run.scores.get(column, {}).get(rule) for run in self.runs)

    def trained(self, name: str) -> tuple[float, float | None] | None:
        """The same of `seconds` or `tokens_per_s`."""
        return _spread(run.training.get(name) for run in self.runs)

    def peak(self) -> float | None:
        return max((run.training["peak_memory_bytes"] for run in self.runs if run.training), default=None)


def lines_of(runs: list[Run]) -> tuple[list[Line], list[str]]:
    """Runs by data set, model and settings, in the order in which they come; and what a reader should know. ValueError
    where two runs are of the same seed."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.dataset, run.model), []).append(run)
    lines, notes = [], []
    for (dataset, model), members in groups.items():
        differing, unknown = _compared(members)
        if unknown:
            notes.append(f"{dataset}/{model}: not every run's record has {', '.join(unknown)}: not compared")
        parts: dict[str, list[Run]] = {}
        for run in members:
            parts.setdefault(_key(run.settings.get(name) for name in differing), []).append(run)
        for part in parts.values():
            _refuse_equal_seeds(part)
            differs = {name: part[0].settings.get(name) for name in differing}
            lines.append(Line(dataset, model, part, _without_suites(differs, part[0])))
            if differs:
                listed = ", ".join(run.folder.name for run in part)
                notes.append(f"{dataset}/{model}: runs with other settings, not averaged: {lines[-1].name}: {listed}")
    for dataset in dict.fromkeys(line.dataset for line in lines):
        own = [line for line in lines if line.dataset == dataset]
        _tell_means_apart([run for line in own for run in line.runs])
        notes += _unlike(dataset, own)
        leaks = dict.fromkeys(leak for line in own for run in line.runs for leak in run.leaks)
        notes += [f"{dataset}: {leak}" for leak in leaks]
    return lines, notes


def _key(values: Iterable[Any]) -> str:
    return json.dumps(list(values), sort_keys=True)


def _compared(runs: list[Run]) -> tuple[list[str], list[str]]:
    """Settings in which the runs differ, and those that only some records have (of a test that all have)."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    suites = set.intersection(*(set(run.answers) for run in runs))
    differing = [n for n in names if len({_key([run.settings[n]]) for run in runs if n in run.settings}) > 1]
    partly = [n for n in names if not all(n in run.settings for run in runs)]
    return differing, [n for n in partly if ": " not in n or n.split(": ")[0] in suites]


def _without_suites(differs: dict[str, Any], run: Run) -> dict[str, Any]:
    """The same said once where it holds for every suite."""
    found: dict[str, Any] = {}
    for name, value in differs.items():
        suite, colon, setting = name.partition(": ")
        alike = colon and all(_key([differs.get(f"{s}: {setting}")]) == _key([value]) for s in run.answers)
        found[f"generate: {setting}" if alike else name] = value
    return found


def _refuse_equal_seeds(runs: list[Run]) -> None:
    seen: dict[int | None, Run] = {}
    for run in runs:
        if run.seed in seen:
            raise ValueError(f"{seen[run.seed].folder} and {run.folder}: two runs of seed {run.seed}, leave one out")
        seen[run.seed] = run


def _tell_means_apart(runs: list[Run]) -> None:
    """A mean over other suites than another run's gets a column of its own."""
    for column in {column for run in runs for column in run.means}:
        if len({run.means[column] for run in runs if column in run.means}) > 1:
            for run in runs:
                if column in run.means:
                    longer = f"{column}: {', '.join(run.means[column])}"
                    run.scores = {longer if name == column else name: value for name, value in run.scores.items()}


def _unlike(dataset: str, lines: list[Line]) -> list[str]:
    """What keeps the lines of a table from being compared: another base, other rows, other ways to answer."""
    differing, _ = _compared([line.runs[0] for line in lines])
    named = [name for name in differing if ": " in name or name in ("base_fingerprint", "data_sha256")]
    told = ", ".join(dict.fromkeys(name.split(": ")[-1] for name in named))
    return [f"{dataset}: the lines do not all have the same {told}"] if told else []


def _spread(values: Iterable[float | None]) -> tuple[float, float | None] | None:
    known = list(values)
    if None in known:
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def _short(value: Any) -> str:
    text = str(value)
    return text[:10] if re.fullmatch("[0-9a-f]{32,}", text) else text
