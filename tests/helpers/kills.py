"""A small run on two processes, killed (SIGKILL) again and again at random moments, and resumed each time:

    PYTHONPATH=.:tests/helpers python tests/helpers/kills.py --kills 50 [--seed 0]

ends with the same bytes of adapter, moments and losses as a run that nobody disturbed, and with nothing left over. A
checkpoint is written after every step, so that many of the kills fall into a save. Prints what was hit, and raises
AssertionError where anything differs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch

import training.run_folder  # noqa: F401 - loaded once, before the processes are forked
from commands import train_flags, write_rows
from finetune import main as finetune
from forked import ended, forked, wait
from training.checkpoint import MOMENTS

STEPS_PER_KILL = 8  # of the whole run: most kills find it still going


def unbroken(flags: list[str], log: Path) -> None:
    with forked(partial(finetune, flags), [log, log]) as pids:
        statuses = wait(pids, 300)
    assert statuses == [0, 0], (statuses, log.read_text())


def attempt(flags: list[str], out: Path, log: Path, chance: random.Random) -> str | None:
    """Start or resume a run and kill one process or both.

    Returns what was hit; None where the run came to its end first.
    """
    moment = chance.choices(["starting", "anywhere", "saving"], [15, 50, 35])[0]
    # Before they have found each other only torchrun, which is not here, could tell one that the other is gone
    victims = [0, 1] if moment == "starting" else chance.choice([[0], [1], [0, 1]])
    with forked(partial(finetune, flags), [log, log]) as pids:
        if moment == "starting":
            time.sleep(chance.uniform(0, 2))
        else:
            low, end = len(lines(out)), time.monotonic() + 120
            while time.monotonic() < end and ended(pids[0]) is None:
                now = len(lines(out))  # the log is cut back to the checkpoint first, then grows
                if now > low and (moment == "anywhere" or being_written(out)):
                    break
                low = min(low, now)
                time.sleep(0.0005)  # leaves the processors to the run
            if moment == "anywhere":
                time.sleep(chance.expovariate(1 / 0.05))
        if ended(pids[0]) is not None or ended(pids[1]) is not None:
            statuses = wait(pids, 60)
            assert statuses == [0, 0], (statuses, log.read_text()[-3000:])
            return None
        for victim in victims:
            os.kill(pids[victim], signal.SIGKILL)
        half_written = being_written(out)
        assert None not in wait(pids, 60), "a process outlived the other by a minute"
    return "in a save" if half_written else moment


def being_written(out: Path) -> bool:
    return any(out.glob(".checkpoint-*.tmp"))


def lines(out: Path) -> list[str]:
    try:
        return (out / "log.jsonl").read_text().splitlines()
    except FileNotFoundError:  # not begun, or being put back to the checkpoint
        return []


def content(out: Path, step: int | str) -> dict[str, Any]:
    return torch.load(out / f"checkpoint-{step}.pth", weights_only=True)


def compare(out: Path, expected: Path, steps: int) -> None:
    """Every number that the run leaves, and every file."""
    assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in expected.iterdir())
    for step in (steps, "BEST"):
        checkpoint, undisturbed = content(out, step), content(expected, step)
        for key, tensor in undisturbed["adapter"].items():
            assert torch.equal(checkpoint["adapter"][key], tensor), key
        for name in MOMENTS:
            for key, tensor in undisturbed["optimizer"][name].items():
                assert torch.equal(checkpoint["optimizer"][name][key], tensor), (name, key)
        assert checkpoint["validation"] == undisturbed["validation"]
    logs = [
        [(entry["step"], entry["loss"], entry.get("val_loss")) for entry in map(json.loads, lines(folder))]
        for folder in (out, expected)
    ]
    assert logs[0] == logs[1] and [step for step, *_ in logs[0]] == list(range(1, steps + 1))


def main(kills: int, seed: int, folder: Path) -> Counter:
    """Counts of what was hit."""
    steps, chance, hit = STEPS_PER_KILL * kills, random.Random(seed), Counter()
    data = write_rows(folder / "rows.json")
    settings = {"max_steps": steps, "accum_iter": 1, "save_every": 1, "keep_checkpoints": 2}
    settings |= {"val_share": 0.25, "eval_every": 3}
    unbroken(train_flags(data, folder / "unbroken", **settings), folder / "unbroken.txt")
    out, log = folder / "killed", folder / "killed.txt"
    flags = [*train_flags(data, out, **settings), "--resume"]
    missed = 0
    while hit.total() < kills:
        what = attempt(flags, out, log, chance)
        if what is None:  # over before it was hit, on a machine with other work: once more from the start
            missed += 1
            assert missed <= kills, f"{missed} runs came to their end, after {hit.total()} of {kills} kills"
            compare(out, folder / "unbroken", steps)
            shutil.rmtree(out)
        else:
            hit[what] += 1
    unbroken(flags, log)
    assert "Traceback" not in log.read_text(), log.read_text()
    compare(out, folder / "unbroken", steps)
    return hit


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(main(args.kills, args.seed, Path(scratch))))
