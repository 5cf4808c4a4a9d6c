"""What the measurements share: flags, processes that take turns, their figures and tables, and shapes of models."""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tabulate import tabulate

from cli import flag
from demo.model import ensure_model
from demo.problems import ensure_data
from llama.distributed import bf16_is_fast
from moa.methods import METHODS

T = TypeVar("T")
Figures = dict[str, Any]
Cell = Callable[[Figures], str]
CPU = torch.device("cpu")
REPO = Path(__file__).resolve().parent.parent
BASE, TRANSFORMERS, PEFT = "base", "transformers", "PEFT lora"  # kinds of work beside our methods
LLAMA_CPP = "llama.cpp"
PEERS = (TRANSFORMERS, PEFT)
ALL_METHODS = [method for method in METHODS if method != "custom"]

LLAMA_3_1: dict[str, dict[str, Any]] = {
    "8B": {
        **dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, vocab_size=128256, multiple_of=1024),
        **dict(ffn_dim_multiplier=1.3, norm_eps=1e-5, rope_theta=500000.0, use_scaled_rope=True),
    }
}
SMOLLM2_135M: dict[str, Any] = {
    **dict(dim=576, n_layers=30, n_heads=9, n_kv_heads=3, vocab_size=49152, multiple_of=256),
    **dict(ffn_dim_multiplier=1.0, norm_eps=1e-5, rope_theta=100000.0),
}
TINY: dict[str, Any] = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=512, multiple_of=32)
SHAPES = LLAMA_3_1 | {"SMOLLM2_135M": SMOLLM2_135M, "tiny": TINY}  # those that `gpu` measures


# Flags


def methods_named(text: str) -> list[str]:
    """Split --methods: names with commas, "all", or "" for none. ValueError for one that is unknown or repeated."""
    methods = ALL_METHODS if text == "all" else text.split(",") if text else []
    for method in methods:
        if method not in ALL_METHODS:
            raise ValueError(f"--methods: {method!r} is none of {', '.join(ALL_METHODS)} (or all)")
        if methods.count(method) > 1:
            raise ValueError(f"--methods: {method} is there twice")
    return list(methods)


@dataclass(frozen=True)
class SideBySide:
    """Flags of measurements of several kinds of work on one base."""

    ckpt_dir: str | None = flag(None, help="base model, a folder in Meta's layout; default: the demo model")
    data_path: str | None = flag(None, help="rows, JSON or JSON lines; default: the demo's")
    rounds: int = flag(3, least=1, help="processes of each kind")
    threads: int = flag(torch.get_num_threads(), least=1, help="threads of each process")
    bf16: bool | None = flag(None, help="base in bf16; default: where the hardware multiplies bf16")
    json: str | None = flag(None, help="write the figures to this file too")

    def base_folder(self) -> str:
        """Return the base model's folder."""
        return str(Path(self.ckpt_dir or ensure_model()).resolve())

    def rows_file(self, split: int = 0) -> str:
        """Return the file of rows. split: 0 or 1, the demo's training or test rows where none is given."""
        return str(Path(self.data_path or ensure_data()[split]).resolve())

    def use_bf16(self) -> bool:
        """Say whether the base is in bf16."""
        return bf16_is_fast(CPU) if self.bf16 is None else self.bf16

    def conditions(self) -> str:
        """Describe what a table's figures depend on."""
        return f"{'bf16' if self.use_bf16() else 'fp32'}, {self.threads} threads, {self.rounds} rounds"


# Processes in turn


def timed(work: Callable[[], T], device: torch.device = CPU) -> tuple[float, T]:
    """Return the seconds that `work` takes until the device has done it, and its result."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    begin = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - begin, result


def run_process(words: Sequence[object], threads: int, folder: str | Path = REPO) -> str:
    """Run `python WORDS...` in a folder and return what it prints. ValueError with its last line where it fails."""
    command = [sys.executable, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        reason = (done.stderr.splitlines() or ["it printed nothing"])[-1].removeprefix("error: ")
        name = " ".join(command[1:3])
        raise ValueError(f"{folder}: python {name} ... ended with status {done.returncode}: {reason}")
    return done.stdout


def interleave(kinds: Sequence[T], rounds: int) -> Iterator[T]:
    """Yield each kind once a round, every second round in the opposite order (ABBA).

    What else the machine does falls on all kinds, and none always follows the same other.
    """
    for i in range(rounds):
        yield from kinds if i % 2 == 0 else reversed(kinds)


def measure_in_turn(works: Mapping[str, Callable[[], Figures]], rounds: int) -> dict[str, list[Figures]]:
    """Do each work once a round (`interleave`) and print its time -> results of each, a result a round.

    A result has "seconds", a list of times in one process, and "peak_memory_bytes". It gets "cpu_seconds", the CPU time
    of the process from start to end.
    """
    results: dict[str, list[Figures]] = {name: [] for name in works}
    for name in interleave(list(works), rounds):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = works[name]()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        results[name].append(result | {"cpu_seconds": cpu_seconds})
        seconds, memory = statistics.median(result["seconds"]), result["peak_memory_bytes"] / 1e9
        print(f"{name}: {seconds:.3f} s, {memory:.2f} GB", file=sys.stderr, flush=True)
    return results


def run_only(module: str, argv: Sequence[str], kind: str, threads: int) -> Callable[[], Figures]:
    """Return a work for `measure_in_turn`: a benchmark with --only KIND, whose last line is JSON, in a process."""
    return lambda: json.loads(run_process(["-m", module, *argv, "--only", kind], threads).splitlines()[-1])


def median(results: Sequence[Mapping[str, Any]], name: str) -> float:
    """Return the median over processes of a figure, or of each one's median where it has a list of them."""
    values = [result[name] for result in results]
    return statistics.median(statistics.median(v) if isinstance(v, list) else v for v in values)


# What is made of the figures


def table(columns: Sequence[tuple[str, Cell]], rows: Sequence[Figures]) -> str:
    """Return a Markdown table of columns, each a head and what makes a cell of a row's figures."""
    heads, cells = zip(*columns, strict=True)
    return tabulate([[cell(row) for cell in cells] for row in rows], heads, tablefmt="pipe", disable_numparse=True)


def number(name: str, digits: int = 2, unit: float = 1) -> Cell:
    """Return what makes a cell of a figure, or a dash where there is none or nothing."""
    return lambda figures: f"{figures[name] / unit:,.{digits}f}" if figures[name] else "-"


def multiple(name: str, other: Figures | None) -> Cell:
    """Return what makes a cell of a figure as a multiple of another kind's, or a dash where that was not measured."""
    return lambda figures: f"{figures[name] / other[name]:.2f}" if other else "-"
