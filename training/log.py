"""What a run tells while it goes: a progress bar, `log.jsonl` with one line per step, TensorBoard."""

import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from moa.files import atomic_write


class RunLog:
    """Log of the main process. A resumed run first drops the lines past the step that it goes on from."""

    def __init__(self, folder: Path, steps: int, done: int):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only one process needs it

        path = folder / "log.jsonl"
        lines = _lines(path)
        damaged = sum(_step(line) == 0 for line in lines[:-1])  # the last one may have been cut short by a kill
        if damaged:
            print(f"{path}: {damaged} damaged line{'s' * (damaged > 1)} left out", file=sys.stderr)
        kept = [line for line in lines if 0 < _step(line) <= done]
        atomic_write(path, "".join(line + "\n" for line in kept).encode())
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


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _step(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return 0  # a line cut short by a crash
