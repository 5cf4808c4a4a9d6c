"""What the steps of a run leave behind: a progress bar, `log.jsonl`, TensorBoard, checkpoints; also on an early end."""

import importlib
import json
import math
import os
import re
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from llama.distributed import is_rank0
from llama.model import Transformer
from moa.files import atomic_write, read_json
from moa.state import assert_replicas_equal
from training.checkpoint import save, state_dict
from training.config import TrainConfig
from training.loop import NonFiniteLoss, Stopped, TrainState
from training.schedule import Schedule
from training.validation import Validation

SCALARS = ("loss", "lr", "tokens_per_s", "val_loss", "val_score")  # of an entry of the log, to draw


def log_rank0(text: str) -> None:
    """Print a line for the user, once for all processes."""
    if is_rank0():
        print(text, file=sys.stderr, flush=True)


class Recorder:
    """Logs each step, and validates where that is due. Writes a checkpoint every `save_every` steps, at the lowest
    validation loss, at the end, and before an early end in order.

    A context manager around `training.loop.train`, which calls `on_step` and `stop_signal`. All processes have one,
    rank 0 writes. params: of the adapter (`moa.adapter_file.adapter_params`).
    """

    def __init__(
        self,
        folder: Path,
        flags: TrainConfig,
        schedule: Schedule,
        model: Transformer,
        optimizer: torch.optim.AdamW,
        state: TrainState,
        params: dict[str, Any],
        validation: Validation | None = None,
    ):
        self._model, self._optimizer, self._state, self._params = model, optimizer, state, params
        self._steps, self._save_every = schedule.steps, flags.save_every or schedule.steps_per_epoch
        self._saved, self._validation = state.done, validation
        self._folder, self._keep = folder, flags.keep_checkpoints
        self._open = ExitStack()
        self._shutdown = self._open.enter_context(GracefulShutdown())
        self._log = RunLog(folder, schedule.steps, state.done, flags.report_to) if is_rank0() else None
        if self._log:
            self._open.callback(self._log.close)

    def on_step(self, entry: dict[str, Any]) -> None:
        step, lowest = entry["step"], False
        if self._validation and (step % self._validation.every == 0 or step == self._steps):
            loss, best = self._validation.loss(self._model), self._state.best
            lowest = best.update(step, loss, self._validation.patience)
            entry = entry | {"val_loss": loss if math.isfinite(loss) else None}
            if self._validation.score and math.isfinite(loss):
                entry["val_score"] = self._validation.score()
            if best.stop:
                entry["early_stop"] = True
        if self._log:
            self._log.step(entry)
            if "val_loss" in entry:
                score = f", score {entry['val_score']:.1f} %" if "val_score" in entry else ""
                result = "the lowest so far" if lowest else best
                self._log.note(f"step {step}: validation loss {loss:.4f}{score}; {result}")
        numbered = step % self._save_every == 0 or self._state.is_complete(self._steps)
        if numbered or lowest:
            self._save(numbered, lowest)

    def stop_signal(self) -> int:
        return self._shutdown.signum

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with self._open:  # closes all
            if isinstance(error, (NonFiniteLoss, Stopped)):
                self._end_early(error)

    def _save(self, numbered: bool, best: bool) -> None:
        assert_replicas_equal(self._model)
        content = state_dict(self._model, self._optimizer, self._state, self._params)
        if is_rank0():
            save(self._folder, content, self._keep, numbered, best)
        if numbered:
            self._saved = self._state.done

    def _end_early(self, error: NonFiniteLoss | Stopped) -> None:
        if self._saved != self._state.done:
            self._save(numbered=True, best=False)
        dist.barrier()  # no process ends, and takes the others along, before the checkpoint is on the disk
        done = self._state.done
        result = f"checkpoint-{done}.pth is saved" if done else "no step was done"
        if isinstance(error, NonFiniteLoss):
            raise NonFiniteLoss(f"{error} ({result})") from None
        log_rank0(f"stopped by {error.name} after step {done}: {result}; the same command with --resume goes on")


class GracefulShutdown:
    """Notes SIGTERM (a node is taken away) and SIGINT (Ctrl-C) while it is entered: `signum` is the first, 0 before.

    A third one ends the process at once, not a second: torchrun passes on what its processes have had already.
    """

    def __init__(self) -> None:
        self.signum = self._count = 0

    def __enter__(self) -> "GracefulShutdown":
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signum = self.signum or number
        self._count += 1
        if self._count == 3:
            os._exit(128 + number)


class RunLog:
    """The log of rank 0. A resumed run first drops the lines past the step that it goes on from."""

    def __init__(self, folder: Path, steps: int, done: int, report_to: str | None = None):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only one process needs it

        path = folder / "log.jsonl"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        damaged = sum(_step(line) == 0 for line in lines[:-1])  # the last one may have been cut short by a kill
        if damaged:
            print(f"{path}: {damaged} damaged line{'s' * (damaged > 1)} left out", file=sys.stderr)
        atomic_write(path, "".join(line + "\n" for line in lines if 0 < _step(line) <= done).encode())
        self._file = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - open as long as the run goes on
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)
        self._tracker = start_tracker(report_to, folder, done > 0) if report_to else None
        # disable=None: a bar on a terminal, nothing elsewhere; there a line now and then takes its place.
        self._bar = tqdm(total=steps, initial=done, unit="step", disable=None, dynamic_ncols=True)
        self._steps, self._first, self._seconds = steps, done, 0.0

    def step(self, entry: dict[str, Any]) -> None:
        """Log the entry of a step, as `training.loop.train` gives it."""
        self._file.write(json.dumps(entry) + "\n")
        scalars = {name: entry[name] for name in SCALARS if entry.get(name) is not None}
        for name, value in scalars.items():
            self._board.add_scalar(name, value, entry["step"])
        if self._tracker:
            self._tracker.log(scalars, step=entry["step"])
        step, loss = entry["step"], "not finite" if entry["loss"] is None else f"{entry['loss']:.3f}"
        speed = f"loss {loss}, {entry['tokens_per_s']:.0f} tokens/s"
        if "skipped" in entry:
            self.note(f"{entry['skipped']}: skipped")
        self._bar.set_postfix_str(speed, refresh=False)
        self._bar.update()
        self._seconds += entry["seconds"]
        if self._bar.disable and (step % 10 == 0 or step == self._steps):
            left = (self._steps - step) * self._seconds / (step - self._first)
            print(f"step {step}/{self._steps}, {speed}, {left / 60:.1f} min left", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """Print a line for the user."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        self._board.close()
        self._file.close()
        if self._tracker:
            self._tracker.finish()


def start_tracker(name: str, folder: Path, resumes: bool) -> ModuleType:
    """Begin a run of trackio or wandb, named after the folder, or go on with it -> the package, to log to.

    wandb writes into the folder, for `wandb sync`, unless its own WANDB_MODE says otherwise.
    """
    tracker, record = importlib.import_module(name), read_json(folder / "config.json")
    run = {"project": "moa", "name": folder.name, "config": record["settings"]}
    run["resume"] = "allow" if resumes else "never"
    if name == "wandb":
        run_id = re.sub(r"\W", "-", f"{folder.name}-{record['started']}")  # a resumed run is the same one
        run |= {"id": run_id, "dir": str(folder), "mode": os.environ.get("WANDB_MODE", "offline")}
    tracker.init(**run)
    return tracker


def _step(line: str) -> int:
    """The step of a line, 0 where the line is damaged."""
    try:
        step = json.loads(line)["step"]
        return step if type(step) is int else 0
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
