"""What a run records of itself: `config.json` at its start; with each step a progress bar, `log.jsonl`, TensorBoard."""

import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from llama.args import ModelArgs
from moa.config import AdapterConfig
from moa.files import atomic_write
from training.config import RunConfig
from training.schedule import Schedule

PACKAGES = ("torch", "numpy", "fairscale", "tiktoken", "flash-attn")


def start_record(
    config: RunConfig, adapter_config: AdapterConfig, args: ModelArgs, schedule: Schedule, hashes: dict[str, str]
) -> dict[str, Any]:
    """Return the record of a run that begins. hashes: of its base and its rows."""
    return {
        "settings": asdict(config.train) | config.adapter,
        "adapter": adapter_config.to_dict(),
        "base": asdict(args),
        "steps": schedule.steps,
        "warmup_steps": schedule.warmup_steps,
        "rows_per_step": schedule.rows_per_step,
        "lr": schedule.lr,
        "rows": schedule.n_rows,
        **hashes,
        **run_metadata(),
    }


def run_metadata() -> dict[str, Any]:
    """When, by what program, and on what machine the run goes."""
    return {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "processes": dist.get_world_size(),
        "git_revision": _git_revision(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "machine": {"platform": platform.platform(), "processor": platform.machine()},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Commit of this source tree, with "+changes" where it has uncommitted ones; None outside a git checkout."""
    git = ["git", "describe", "--always", "--abbrev=40", "--dirty=+changes", "--exclude=*"]
    try:
        done = subprocess.run(git, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


class RunLog:
    """The log of rank 0. A resumed run first drops the lines past the step that it goes on from."""

    def __init__(self, folder: Path, steps: int, done: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only one process needs it

        path = folder / "log.jsonl"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        damaged = sum(_step(line) == 0 for line in lines[:-1])  # the last one may have been cut short by a kill
        if damaged:
            print(f"{path}: {damaged} damaged line{'s' * (damaged > 1)} left out", file=sys.stderr)
        atomic_write(path, "".join(line + "\n" for line in lines if 0 < _step(line) <= done).encode())
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - open as long as the run goes on
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        # disable=None: a bar on a terminal, nothing elsewhere; there a line now and then takes its place.
        self._bar = tqdm(total=steps, initial=done, unit="step", disable=None, dynamic_ncols=True)
        self._steps, self._first, self._seconds = steps, done, 0.0

    def step(self, entry: dict[str, Any]) -> None:
        """Log one step: `step` (from 1), `loss` (None where it was not finite), `lr`, `tokens_per_s`, `seconds` and
        more; `skipped` says why a step was."""
        self._file.write(json.dumps(entry) + "\n")
        for name in ("loss", "lr", "tokens_per_s"):
            if entry[name] is not None:
                self._board.add_scalar(name, entry[name], entry["step"])
        step, loss = entry["step"], "not finite" if entry["loss"] is None else f"{entry['loss']:.3f}"
        speed = f"loss {loss}, {entry['tokens_per_s']:.0f} tokens/s"
        if "skipped" in entry:
            self._bar.write(f"{entry['skipped']}: skipped", file=sys.stderr)
        self._bar.set_postfix_str(speed, refresh=False)
        self._bar.update()
        self._seconds += entry["seconds"]
        if self._bar.disable and (step % 10 == 0 or step == self._steps):
            left = (self._steps - step) * self._seconds / (step - self._first)
            print(f"step {step}/{self._steps}, {speed}, {left / 60:.1f} min left", file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()


def _step(line: str) -> int:
    """The step of a line, 0 where the line is damaged."""
    try:
        step = json.loads(line)["step"]
        return step if type(step) is int else 0
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
