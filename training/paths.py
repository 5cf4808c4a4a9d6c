"""A run's folder: what lies where. Needs no torch."""

import re
from pathlib import Path

CONFIG = "config.json"  # the record of the run's start
LOCK = ".lock"  # held by the process that writes there
DAMAGED = ".damaged"  # behind the name of a checkpoint that could not be read


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of a run's `checkpoint-<step>.pth`, oldest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)\.pth", f.name), f) for f in folder.glob("checkpoint-*.pth")]
    return sorted((int(match[1]), file) for match, file in found if match)


def resolve(path: Path) -> Path:
    """The checkpoint meant: a file itself, or the newest where a folder or .../checkpoint-LAST.pth is named."""
    if path.is_file() or not (path.is_dir() or path.name == "checkpoint-LAST.pth"):
        return path
    folder = path if path.is_dir() else path.parent
    found = checkpoints(folder)
    if not found:
        raise ValueError(f"{folder}: no checkpoint-STEP.pth in it")
    return found[-1][1]
