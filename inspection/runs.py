"""Folders of runs, read whatever state they are in: what a run was, what it logged, how it was scored, what it lacks.

A run is what `finetune.py`, `generate.py` and `python -m evaluate` leave in a folder: config.json, log.jsonl,
adapter.pth, one file of predictions per test, scores.json. Needs no torch.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moa.reading import parse_json, read_text

RULES = ("published", "robust")
MARKS = ("config.json", "log.jsonl", "scores.json", "*.jsonl.settings.json")  # a folder with one of these is a run


@dataclass
class Run:
    """One run. method: the adapter's, or the folder's name where there is none (a base that was only tested).
    record: config.json. settings, adapter: the flags of the training and of its adapters. steps: those that were asked
    for. log: an entry per step. scores: scores.json, None where there is none. answers: test -> file of predictions.
    missing: what a finished run would have and this one has not, as sentences; empty for a finished run."""

    path: Path
    method: str
    dataset: str
    seed: int | None
    record: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    trainable_parameters: int | None = None
    steps: int | None = None
    log: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, Any] | None = None
    answers: dict[str, Path] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.method if self.seed is None else f"{self.method} s{self.seed}"

    @property
    def seconds(self) -> float | None:
        """Time of all logged steps."""
        times = _numbers(self.log, "seconds")
        return sum(times) if times else None

    @property
    def peak_memory_bytes(self) -> float | None:
        return max(_numbers(self.log, "peak_memory_bytes"), default=None)

    def mean_score(self, rule: str) -> float | None:
        """Percent over all tests by one of RULES; None where it was not scored."""
        return self._mean(rule, "percent")

    def half_width(self, rule: str) -> float | None:
        """Half of the 95 % interval around it that the number of problems leaves, in percent."""
        return self._mean(rule, "half_width")

    def _mean(self, rule: str, name: str) -> float | None:
        value = self.scores
        for key in ("mean", rule, name):
            value = value.get(key) if isinstance(value, dict) else None
        return float(value) if _is_number(value) else None


def find_runs(folder: str | Path) -> list[Run]:
    """The runs at and under a folder, in the order of their paths (s10 behind s9), those that only tested a base
    first. ValueError where there is no such folder; an empty list where it holds no run."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    places = {path.parent for mark in MARKS for path in folder.rglob(mark)}
    runs = [read_run(place) for place in sorted(places, key=_natural)]
    return sorted(runs, key=lambda run: run.record is not None or bool(run.log))


def read_run(folder: str | Path) -> Run:
    """The run in a folder. What is not there or cannot be read becomes a sentence in `missing`; ValueError only where
    there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    missing: list[str] = []
    run = Run(folder, *_names(folder), missing=missing)
    run.record, run.scores = _object(folder / "config.json", missing), _object(folder / "scores.json", missing)
    run.answers = _answers(folder)
    if run.record is not None:
        _take_record(run)
    run.log = _log(folder / "log.jsonl", missing)
    trained = run.record is not None or run.log or (folder / "config.json").exists()
    if trained:
        if run.record is None and not (folder / "config.json").exists():
            missing.append("config.json is not there: the settings are not known")
        if run.steps is None or len(run.log) < run.steps:
            missing.append(f"the training stands at step {len(run.log)} of {run.steps or 'an unknown number'}")
        if not (folder / "adapter.pth").is_file():
            missing.append("adapter.pth is not there")
    if not run.answers:
        missing.append("no test was answered")
    if not (folder / "scores.json").exists():
        missing.append("scores.json is not there: the answers were not scored")
    unfinished = sorted({re.sub(r"\.jsonl\.part\d+$", "", file.name) for file in folder.glob("*.jsonl.part*")})
    missing += [f"the answers to {name} are not complete" for name in unfinished]
    return run


def _names(folder: Path) -> tuple[str, str, int | None]:
    """Method, data set and seed as DATASET/METHOD/sSEED or METHOD-sSEED tell them."""
    folder = folder.resolve()
    seeded = re.fullmatch(r"(?:(.+)-)?s(\d{1,9})", folder.name)
    if seeded is None:
        return folder.name, folder.parent.name, None
    if seeded[1]:
        return seeded[1], folder.parent.name, int(seeded[2])
    return folder.parent.name, folder.parent.parent.name, int(seeded[2])


def _take_record(run: Run) -> None:
    """What config.json tells, as far as it is what finetune.py writes."""
    for name in ("settings", "adapter"):
        value = run.record.get(name)
        if isinstance(value, dict):
            setattr(run, name, value)
        else:
            run.missing.append(f"config.json has no object {name!r}")
    if isinstance(run.adapter.get("method"), str) and not run.method.startswith(run.adapter["method"]):
        run.method = run.adapter["method"]
    if type(run.settings.get("seed")) is int:
        run.seed = run.settings["seed"]
    for name in ("trainable_parameters", "steps"):
        if type(run.record.get(name)) is int:
            setattr(run, name, run.record[name])
        else:
            run.missing.append(f"config.json does not tell {name!r}")


def _object(path: Path, missing: list[str]) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file, or none that can be read (which `missing` then says)."""
    if not path.exists():
        return None
    try:
        value = parse_json(read_text(path), path.name)
    except (ValueError, OSError) as error:
        missing.append(f"{path.name} cannot be read: {_sentence(error)}")
        return None
    if not isinstance(value, dict):
        missing.append(f"{path.name} holds no JSON object")
        return None
    return value


def _log(path: Path, missing: list[str]) -> list[dict[str, Any]]:
    """The steps of log.jsonl. A last line that was cut short is left out; other lines that are no step are told."""
    if not path.exists():
        return []
    try:
        lines = [line for line in read_text(path).split("\n") if line.strip()]
    except (ValueError, OSError) as error:
        missing.append(f"log.jsonl cannot be read: {_sentence(error)}")
        return []
    entries, damaged = [], 0
    for number, line in enumerate(lines, 1):
        try:
            entry = parse_json(line, "")
        except ValueError:
            entry = None
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            entries.append(entry)
        elif number < len(lines):
            damaged += 1
    if damaged:
        missing.append(f"log.jsonl has {damaged} damaged line{'s' * (damaged > 1)}")
    return entries


def _answers(folder: Path) -> dict[str, Path]:
    found = sorted(folder.glob("*.jsonl"), key=_natural)
    return {file.stem: file for file in found if file.name != "log.jsonl" and file.is_file()}


def _numbers(log: list[dict[str, Any]], name: str) -> list[float]:
    return [entry[name] for entry in log if _is_number(entry.get(name))]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _sentence(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Sorts s10 behind s9."""
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in re.split(r"(?a:(\d{1,9}))", str(path))]
