"""finetune.py on two processes, with one thing that goes wrong. For test_faults.py:

    python tests/helpers/faulty.py FOLDER

does all of FAULTS, each in FOLDER/<name>, and writes FOLDER/results.json. Under torchrun, as a faulty finetune.py:

    torchrun --nproc_per_node 2 tests/helpers/faulty.py FAULT --data_path ...
"""

import json
import os
import shutil
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import training.run_folder  # noqa: F401 - loaded once, before the processes are forked
from commands import train_flags, write_rows
from finetune import main as finetune
from forked import forked, wait
from llama.model import Losses
from tiny import BASE


class Fault(NamedTuple):
    """`what` happens on `rank` (-1: on both) in these of the model's forward passes, one per step, counted from 1."""

    what: str
    rank: int
    passes: tuple[int, ...] = (3,)


FAULTS = {
    "nothing": Fault("nothing", 0),
    "killed": Fault("SIGKILL", 1),
    "the first is killed": Fault("SIGKILL", 0),
    "refuses": Fault("refuses", 1),
    "fault of the program": Fault("fault", 1),
    "both refuse": Fault("refuses", -1),
    "out of memory": Fault("memory", 1),
    "taken away": Fault("SIGTERM", 1),
    "Ctrl-C": Fault("SIGINT", 0),
    "signalled twice": Fault("SIGTERM twice", 0),
    "loss": Fault("loss", 1),
    "loss, twice": Fault("loss", 1, (3, 4)),
    "gradient": Fault("gradient", 0),
    "other base": Fault("other base", 1),
}


def happen(what: str, losses: Losses) -> Losses:
    name, _, twice = what.partition(" ")
    if name in signal.Signals.__members__:
        for _ in range(2 if twice else 1):
            os.kill(os.getpid(), signal.Signals[name])
    if what == "refuses":
        raise ValueError("row 7 is not acceptable")
    if what == "fault":
        raise KeyError("surprise")
    if what == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    if what == "loss":
        return losses._replace(ce_loss=losses.ce_loss * torch.nan)
    if what == "gradient":  # of a finite loss: that of the square root at 0
        return losses._replace(ce_loss=losses.ce_loss + (losses.ce_loss - losses.ce_loss.detach()).sqrt())
    return losses


def faulty(fault: Fault, flags: list[str]) -> None:
    """finetune.py with the fault built in."""
    count, is_here = 0, fault.rank in (-1, int(os.environ["RANK"]))

    def hook(module: nn.Module, inputs: tuple, output: Any) -> Any:
        nonlocal count
        if not isinstance(output, Losses) or output.ce_loss.is_meta:
            return output
        count += 1
        return happen(fault.what, output) if is_here and count in fault.passes else output

    nn.modules.module.register_module_forward_hook(hook)
    if fault.what == "other base" and is_here:
        flags[flags.index(str(BASE))] = str(Path(flags[flags.index("--output_dir") + 1]).parent / "base")
    finetune(flags)


def result(fault: Fault, folder: Path, data: Path) -> dict[str, Any]:
    """Exit statuses (None: still there after a minute), what each process printed, and the files of the run."""
    folder.mkdir()
    shutil.copytree(BASE, folder / "base")
    params = folder / "base" / "params.json"
    params.write_text(params.read_text() + "\n")
    logs = [folder / f"printed{rank}.txt" for rank in (0, 1)]
    flags = train_flags(data, folder / "out", accum_iter=1, save_every=2)
    with forked(partial(faulty, fault, flags), logs) as pids:
        statuses = wait(pids, 60)
    files = sorted(f.name for f in (folder / "out").iterdir()) if (folder / "out").exists() else []
    return {"statuses": statuses, "printed": [log.read_text() for log in logs], "files": files}


def main(folder: Path) -> None:
    data = write_rows(folder / "rows.json")
    results = {name: result(fault, folder / name.replace(" ", "_"), data) for name, fault in FAULTS.items()}
    (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    if "RANK" in os.environ:
        faulty(FAULTS[sys.argv[1]], sys.argv[2:])
    else:
        main(Path(sys.argv[1]))
