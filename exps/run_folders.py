"""Folders of runs: which are finished, their scores, and all that these follow from. Part of exps/collect.py."""

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RULES = ("published", "robust")

# What runs of one line may differ in: seed, places, how the work was shared out; and what a resolved value stands for.
FREE = {"seed", "ckpt_dir", "data_path", "output_dir", "save_every", "resume", "overwrite", "dry_run", "leak_tests"}
FREE |= {"device", "model_parallel_size", "batch_size", "accum_iter", "activation_checkpointing", "flash_attention2"}
FREE |= {
    "adapter_config",
    "keep_checkpoints",
    "epochs",
    "max_steps",
    "lr",
    "blr",
    "warmup_epochs",
    "adapter_sha256",
    "adapter_params_sha256",
}
COUNTS = ("steps", "rows_per_step", "trainable_parameters")
RESOLVED = ("base_fingerprint", "data_sha256", "rows", "warmup_steps", "lr")


@dataclass
class Run:
    """One run. scores: column -> percent by rule. settings: all that the scores follow from, the seed apart.
    means: the suites of those columns that are means. training: seconds, tokens_per_s, peak_memory_bytes. leaks: what
    was found of the tests in the training rows. record: config.json. answers: suite -> how it was answered."""

    folder: Path
    dataset: str
    model: str
    seed: int | None
    settings: dict[str, Any]
    scores: dict[str, dict[str, float]]
    means: dict[str, tuple[str, ...]]
    training: dict[str, float]
    leaks: list[str]
    record: dict[str, Any] | None
    scores_file: dict[str, Any]
    answers: dict[str, Any]


class Unfinished(Exception):
    """A run that is not to be in a table; says why."""


def find(folders: Iterable[Path]) -> tuple[list[Run], dict[Path, str]]:
    """The finished runs at and under the folders, untuned models first, and the unfinished ones with why. ValueError or
    OSError naming the file that is damaged."""
    places: dict[Path, None] = {}
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
        found = {path.parent.resolve() for name in _MARKS for path in folder.rglob(name)}
        places |= dict.fromkeys(sorted(found, key=_natural))
    runs, unfinished = [], {}
    for place in places:
        try:
            runs.append(read(place))
        except Unfinished as why:
            unfinished[place] = str(why)
    return sorted(runs, key=lambda run: run.record is not None), unfinished


_MARKS = ("scores.json", "log.jsonl", "*.jsonl.settings.json")  # a folder with one of these is a run


def read(folder: Path) -> Run:
    """One run from its folder. Raises Unfinished, or ValueError or OSError naming the file."""
    seeded = re.fullmatch(r"(?:(.+)-)?s(\d+)", folder.name)
    if seeded and not seeded[1]:
        model, dataset = folder.parent.name, folder.parent.parent.name
    else:
        model, dataset = seeded[1] if seeded else folder.name, folder.parent.name
    seed = int(seeded[2]) if seeded else None
    record, training, settings, leaks = None, {}, {}, []
    if (folder / "config.json").exists() or (folder / "log.jsonl").exists():
        record = _read_json(folder / "config.json")
        try:
            method, seed = record["adapter"]["method"], record["settings"]["seed"]
            settings, leaks = _settings(record), _leaks(record)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / 'config.json'}: not the record of a run ({error!r})") from None
        training = _training(folder / "log.jsonl", record["steps"])
        model = model if model.startswith(method) else f"{model}: {method}"
    if not (folder / "scores.json").exists():
        raise Unfinished("no scores.json")
    content = _read_json(folder / "scores.json")
    try:
        scores, means = _scores(content)
        files = {suite: Path(part["file"]).name for suite, part in content["suites"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'scores.json'}: not scores of `python -m evaluate` ({error!r})") from None
    answers = {}
    for suite, file in files.items():
        how = folder / f"{file}.settings.json"
        answers[suite] = _read_json(how) if how.exists() else {}
        settings |= {f"{suite}: {n}": v for n, v in answers[suite].items() if n not in FREE}
    settings |= {"tuned": record is not None, "tests": ", ".join(sorted(scores))}
    return Run(folder, dataset, model, seed, settings, scores, means, training, leaks, record, content, answers)


def _settings(record: dict[str, Any]) -> dict[str, Any]:
    """What a training followed from, with what typed values came to in their place."""
    for name in COUNTS:
        if not isinstance(record[name], int):
            raise TypeError(f"{name} is {record[name]!r}")
    typed = {name: value for name, value in record["settings"].items() if name not in FREE}
    return typed | record["adapter"] | {name: record[name] for name in (*COUNTS, *RESOLVED) if name in record}


def _leaks(record: dict[str, Any]) -> list[str]:
    found = [(one, one["exact"] + one["near"]) for one in record.get("leaks", {}).get("tests", [])]
    return [
        f"{count} of {one['rows']} rows of {'/'.join(Path(one['file']).parts[-2:])} stand in the training rows"
        for one, count in found
        if count
    ]


def _scores(content: dict[str, Any]) -> tuple[dict[str, dict[str, float]], dict[str, tuple[str, ...]]]:
    """Percent by rule of each column: a suite's, or its pass@k where several samples were drawn, then the means of
    families of several suites; and what those means are over."""
    found, means, names = {}, {}, {}
    for suite, part in content["suites"].items():
        rows, problems = part["rows"], part["problems"]
        names[suite] = f"({rows})" if rows == problems else f"({rows} of {problems})"
        for k in part.get("pass_at", {}).get("published", {}):
            found[f"{suite} pass@{k} {names[suite]}"] = {rule: _percent(part["pass_at"][rule][k]) for rule in RULES}
        if "pass_at" not in part:
            found[f"{suite} {names[suite]}"] = {rule: _percent(part[rule]["percent"]) for rule in RULES}
    for family, part in content["families"].items():
        if len(part["suites"]) > 1:
            column = f"mean, {family}"
            found[column] = {rule: _percent(part["mean"][rule]["percent"]) for rule in RULES}
            means[column] = tuple(f"{suite} {names[suite]}" for suite in part["suites"])
    return found, means


def _percent(value: Any) -> float:
    if isinstance(value, bool) or not 0 <= value <= 100:
        raise ValueError(f"{value!r} is no percentage")
    return float(value)


def _training(log: Path, steps: int) -> dict[str, float]:
    """Time, speed and memory over all steps. Raises Unfinished where steps are missing."""
    done = []
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            done.append([float(entry[n]) for n in ("step", "seconds", "tokens", "peak_memory_bytes")])
        except (ValueError, KeyError, TypeError):
            if number < len(lines):  # the last may have been cut short
                raise ValueError(f"{log}: line {number} is not a step of a run") from None
    if [entry[0] for entry in done] != list(range(1, steps + 1)):
        raise Unfinished(f"{len(done)} of {steps} steps in log.jsonl")
    seconds, tokens = (math.fsum(entry[i] for entry in done) for i in (1, 2))
    return {
        "seconds": seconds,
        "tokens_per_s": tokens / max(seconds, 1e-9),
        "peak_memory_bytes": int(max(entry[3] for entry in done)),
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return value


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Sorts s10 behind s9."""
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in re.split(r"(?a:(\d+))", str(path))]
