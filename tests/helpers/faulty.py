"""finetune.py on two processes, with one thing that goes wrong. As a program, for test_faults.py:

    python tests/faulty.py FOLDER

does all of FAULTS, each in FOLDER/<name>, and writes what came of it to FOLDER/results.json.
"""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import llama.watch
import training.checkpoint
import training.run
from commands import train_flags, write_rows
from finetune import main as finetune
from forked import forked, wait
from llama.model import Losses, Transformer


class Fault(NamedTuple):
    """`what` happens on `rank` at these calls of the model's losses (from 1; with two steps per save, one per step; the
    estimate of memory has no part in it)."""

    what: str
    rank: int
    calls: tuple[int, ...]


FAULTS = {
    "killed": Fault("SIGKILL", 1, (3,)),
    "the first is killed": Fault("SIGKILL", 0, (3,)),
    "frozen": Fault("SIGSTOP", 1, (3,)),
    "refuses": Fault("refuses", 1, (3,)),
    "fault of the program": Fault("fault", 1, (3,)),
    "both refuse": Fault("refuses", -1, (3,)),
    "out of memory": Fault("memory", 1, (3,)),
    "taken away": Fault("SIGTERM", 1, (3,)),
    "Ctrl-C": Fault("SIGINT", 0, (3,)),
    "told twice": Fault("SIGTERM twice", 0, (3,)),
    "loss": Fault("loss", 1, (3,)),
    "loss, twice": Fault("loss", 1, (3, 4)),
    "gradient": Fault("gradient", 0, (3,)),
    "nothing": Fault("nothing", 0, ()),
    "clock": Fault("clock", -1, (2,)),
    "loss, twice, slow disk": Fault("loss slowly", 1, (3, 4)),
    "paused": Fault("SIGSTOP", -1, (3,)),
    "told thrice": Fault("SIGSTOP", 1, (3,)),
    "other base": Fault("other base", 1, ()),
}


def happen(what: str, losses: Losses) -> Losses:
    name, _, twice = what.partition(" ")
    if name in signal.Signals.__members__:
        for _ in range(2 if twice else 1):
            os.kill(os.getpid(), signal.Signals[name])
    if what == "refuses":
        raise ValueError("row 7 is not to its taste")
    if what == "fault":
        raise KeyError("surprise")
    if what == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if what == "clock":  # set back by two hours
        now = time.time
        time.time = lambda: now() - 7200
    if name == "loss":
        return Losses(losses.labels * torch.nan, losses.auxiliary)
    if what == "gradient":  # of a finite loss: that of the square root at 0
        return Losses(losses.labels + (losses.labels - losses.labels.detach()).sqrt(), losses.auxiliary)
    return losses


def faulty(fault: Fault, flags: list[str]) -> None:
    """finetune.py with the fault built in."""
    whole, count, here = Transformer.losses, 0, fault.rank in (-1, int(os.environ["RANK"]))

    def losses(self: Transformer, tokens: Tensor, *arguments: object) -> Losses:
        nonlocal count
        count += not tokens.is_meta
        found = whole(self, tokens, *arguments)
        return happen(fault.what, found) if here and count in fault.calls else found

    Transformer.losses = losses
    llama.watch.BEAT, llama.watch.SILENCE = 0.5, 5.0
    if fault.what == "loss slowly":
        write = training.checkpoint.write_torch
        training.checkpoint.write_torch = lambda *file: (time.sleep(5), write(*file))
    if fault.what == "other base" and here:
        training.run.fingerprint = lambda folder: "another"
    finetune(flags)


def result(name: str, fault: Fault, folder: Path, data: Path) -> dict[str, Any]:
    """Exit statuses (None: still there after a minute), what each process said, and what the run left."""
    folder.mkdir()
    logs = [folder / f"said{rank}.txt" for rank in (0, 1)]
    flags = train_flags(data, folder / "out", accum_iter=1, save_every=2)
    with forked(partial(faulty, fault, flags), logs) as pids:
        began = time.monotonic()
        if name == "paused":
            until_stopped(pids)
            time.sleep(7)  # longer than any silence
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        if name == "told thrice":  # the first, while it waits for the second
            until_stopped(pids[1:])
            for _ in range(3):
                time.sleep(0.5)
                os.kill(pids[0], signal.SIGTERM)
        statuses = wait([pid for rank, pid in enumerate(pids) if (fault.what, fault.rank) != ("SIGSTOP", rank)], 60)
    out = folder / "out"
    return {
        "statuses": statuses,
        "seconds": time.monotonic() - began,
        "said": [log.read_text() for log in logs],
        "left": sorted(f.name for f in out.iterdir()) if out.exists() else [],
    }


def until_stopped(pids: list[int]) -> None:
    for pid in pids:
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOWAIT)


def main(folder: Path) -> None:
    data = write_rows(folder / "rows.json")
    results = {name: result(name, fault, folder / name.replace(" ", "_"), data) for name, fault in FAULTS.items()}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
