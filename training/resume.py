"""Going on with a run: which checkpoints its folder holds, and what is taken from its record. Needs no torch."""

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cli import flags_of
from moa.config import AdapterConfig
from moa.reading import parse_json, read_text
from training.config import BATCH_SIZE, RESUMABLE_FIELDS, RunConfig, TrainConfig

# Flags whose files must be the same for a run to go on: name of the flag, and of the hash in the record.
HASHED_FILES = {
    "data_path": "data",
    "val_data_path": "val_data",
    "val_suite_path": "val_suite",
    "init_adapter": "init_adapter",
}
BEST = "checkpoint-BEST.pth"  # of the step of the lowest validation loss


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of a run's `checkpoint-<step>.pth`, oldest first."""
    matches = [(re.fullmatch(r"checkpoint-(\d+)\.pth", file.name), file) for file in folder.glob("checkpoint-*.pth")]
    return sorted((int(match[1]), file) for match, file in matches if match)


def restorable(folder: Path) -> list[Path]:
    """The checkpoints that a run can go on from, the last one first choice: BEST, then the numbered ones."""
    best = [folder / BEST] if (folder / BEST).is_file() else []
    return best + [file for _, file in checkpoints(folder)]


def merge_with_previous_run(config: RunConfig) -> RunConfig:
    """With --resume and a run in the output folder, take the flags that are not typed from the run's record.

    ValueError names a typed flag whose value differs from the run's start, or the record where it is damaged.
    """
    if not config.train.resume or not (config.record.exists() or restorable(config.folder)):
        return config
    start, n_layers = _read_start(config.record)
    typed = {name: value for name, value in asdict(config.train).items() if name in config.explicit}
    # A typed option of the adapters may also spell out what the method's preset came to
    before = asdict(start.train) | start.adapter
    adapter = AdapterConfig.from_dict({"method": start.train.method} | start.adapter | config.adapter, n_layers)
    now = adapter.to_dict() | typed
    for name in [*(typed.keys() - RESUMABLE_FIELDS), *config.adapter]:
        if now[name] != before[name]:
            value = "left out" if before[name] is None else before[name]
            raise ValueError(
                f"{config.folder}: the run was started with --{name} {value}, not {now[name]} "
                "(--overwrite in the place of --resume begins anew)"
            )
    # Each is asked for once, and the folder is the one whose record was read
    if restorable(config.folder):
        typed["init_adapter"] = None  # the checkpoint has all numbers
    once = {"overwrite": False, "dry_run": False, "leak_tests": None, "output_dir": str(config.folder)}
    return RunConfig(TrainConfig(**asdict(start.train) | once | typed), start.adapter, config.explicit)


def _read_start(path: Path) -> tuple[RunConfig, int]:
    """Read the settings of a run, with all of its adapters', and the number of layers. ValueError names the file.

    A flag that the run's revision did not have is at its default.
    """
    try:
        record = parse_json(read_text(path), str(path))
        settings, n_layers = record["settings"], record["base"]["n_layers"]
        flags = {flag.name: flag for flag in flags_of(TrainConfig)}
        start = TrainConfig(**{name: flags[name].convert(str(settings[name])) for name in flags.keys() & settings})
        adapter = AdapterConfig.from_dict(record["adapter"], n_layers).to_dict()
        del adapter["method"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        problem = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path}: not the record of a run that can be resumed ({problem})") from None
    return RunConfig(start, adapter, frozenset()), n_layers


def record_to_resume(config: RunConfig, hashes: dict[str, str], ranks: int) -> dict[str, Any] | None:
    """Return the record of the run to resume, with "has_checkpoint", or None where a run begins.

    ValueError where the folder holds a run and neither --resume nor --overwrite is given, or nothing to go on from is
    left of it but its adapter, or where that run had another base, other rows or other numbers of them. ranks:
    data-parallel ones.
    """
    flags, folder = config.train, config.folder
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: --output_dir is a file, expected a folder")
    existing, adapter = restorable(folder), folder / "adapter.pth"
    kept = existing or [adapter] * adapter.is_file()
    if flags.overwrite or not (kept or (flags.resume and config.record.exists())):
        return None
    if flags.resume and kept == [adapter]:
        raise ValueError(f"{folder}: holds adapter.pth, and no checkpoint to go on from (--overwrite begins anew)")
    if not flags.resume:
        raise ValueError(
            f"{folder}: holds a run already ({kept[-1].name}); give --resume to go on with it, --overwrite to "
            "begin anew, or another --output_dir"
        )
    record = parse_json(read_text(config.record), str(config.record))
    hashed = {"ckpt_dir": "base_fingerprint"} | {name: f"{key}_sha256" for name, key in HASHED_FILES.items()}
    for name, key in hashed.items():
        if key in hashes and hashes[key] != record.get(key):
            file = getattr(flags, name)
            raise ValueError(f"{file}: is not the --{name} that the run in {folder} was started with, by its contents")
    rows = record["rows_per_step"]
    if "accum_iter" in config.explicit and rows != flags.rows_per_rank * ranks:
        raise ValueError(
            f"{folder}: the run takes {rows} rows per step, not --batch_size {flags.batch_size or BATCH_SIZE} x "
            f"--accum_iter {flags.accum_iter} x {ranks} data-parallel ranks; leave --accum_iter out"
        )
    return record | {"has_checkpoint": bool(existing)}
