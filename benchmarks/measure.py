"""Measuring kinds of work side by side, in one run and in turn; and the tables of what was found."""

import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch

X, T = TypeVar("X"), TypeVar("T")
CPU = torch.device("cpu")


def timed(work: Callable[[], T], device: torch.device = CPU) -> tuple[float, T]:
    """Seconds that `work` takes, until the device has done it, and what it returns."""
    _wait(device)
    begin = time.perf_counter()
    result = work()
    _wait(device)
    return time.perf_counter() - begin, result


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def turns(kinds: Iterable[T], inputs: Iterable[X]) -> Iterator[tuple[T, X]]:
    """All kinds with one input before the next: what else the machine does then falls on all of them. Every second time
    in the opposite order: no kind always follows the same other."""
    order = list(kinds)
    for x in inputs:
        yield from ((kind, x) for kind in order)
        order = order[::-1]


def in_turn(
    works: Mapping[str, Callable[[X], object]], inputs: Iterable[X], device: torch.device = CPU
) -> dict[str, list[float]]:
    """Seconds of each kind of work on each input (`turns`)."""
    seconds: dict[str, list[float]] = {kind: [] for kind in works}
    for kind, x in turns(works, inputs):
        seconds[kind].append(timed(lambda kind=kind, x=x: works[kind](x), device)[0])
    return seconds


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Median of the ratios of what was measured next to each other."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def own_process(module: str, words: Sequence[object]) -> str:
    """The last line that `python -m MODULE WORDS...` prints. ValueError with its error where it fails."""
    command = [sys.executable, "-m", module, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        said = (done.stderr.splitlines() or ["no word of why"])[-1].removeprefix("error: ")
        raise ValueError(f"python -m {module}, a process of its own, ended with status {done.returncode}: {said}")
    return done.stdout.splitlines()[-1]


@contextmanager
def apart(make: Callable[[], Callable[[X], T]], threads: int) -> Iterator[Callable[[X], T]]:
    """Work in a process of its own, for as long as the context: what another kind takes of the C library's memory, and
    gives back, changes what each block costs. `make` makes it there. ValueError with what went wrong there."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there, make, threads), daemon=True)
    process.start()
    there.close()

    def answer(*asked: X) -> T:
        try:
            for x in asked:
                here.send(x)
            done, result = here.recv()
        except (EOFError, OSError):
            process.join()
            raise ValueError(f"a process that was measured ended with status {process.exitcode}") from None
        if not done:
            raise ValueError(f"a process that was measured failed: {result}")
        return result

    try:
        answer()  # it is made
        yield answer
    finally:
        process.terminate()
        process.join()


def _serve(parent: Connection, make: Callable[[], Callable[[X], T]], threads: int) -> None:
    try:
        torch.set_num_threads(threads)
        work = make()
        parent.send((True, None))
        while True:
            parent.send((True, work(parent.recv())))
    except EOFError:  # the parent is gone
        pass
    except Exception as error:
        parent.send((False, f"{type(error).__name__}: {error}"))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    first, *others = ("| " + " | ".join(row) + " |" for row in (heads, *rows))
    return "\n".join([first, "|" + "---|" * len(heads), *others])


def figure(value: float | None, digits: int = 2) -> str:
    """A cell with a number, or a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"
