"""How cost grows: of a training step with rows' length, rows, rank and experts; of a decode step with rows and context.

    python -m benchmarks.growth [--axes length,rows,rank,experts,decode_rows,decode_context] [--method soft_moa]
                                [--shape SMOLLM2_135M] [--repeats 3] [--json FILE]

A model of that shape with random weights, rows of random tokens of which half are labels. All entries of an axis are
measured in turn; medians, and how many times the first entry. "kept": what autograd keeps of a forward pass
(computed). "floor": the least that products and bytes take on this machine, measured in the same run
(benchmarks/floors.py). experts: molora, of which one expert is lora with the same rank.

With the number of processes grows what is sent, not what each computes: python -m benchmarks.layouts (computed) and
python -m benchmarks.exchange (measured).
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.decoding import decode_clock, decode_floor
from benchmarks.flags import ALL, Timed, require_positive
from benchmarks.floors import step_work
from benchmarks.machine import Machine, measure_machine
from benchmarks.measure import CPU, figure, in_turn, ratio, table, turns
from benchmarks.models import config_of, on_base, random_base, shape_only
from benchmarks.rows import halves, rows_of
from benchmarks.shapes import BY_NAME
from benchmarks.steps import step_of
from cli import cli_errors, flag, parse
from llama import ModelArgs
from llama.distributed import bf16_is_fast
from moa.config import AdapterConfig
from moa.files import write_json
from training.estimate import saved_activation_bytes

STEPS = 16  # decode steps of a measurement


class Entry(NamedTuple):
    """A step: `rows` rows of `length` tokens (when decoding: behind so many)."""

    config: AdapterConfig
    rows: int
    length: int


@dataclass(frozen=True)
class Flags(Timed):
    shape: str = flag("SMOLLM2_135M", help="shape of the model", choices=tuple(BY_NAME))
    method: str = flag("soft_moa", help="method, but for the axis of experts", choices=tuple(ALL))
    axes: str = flag("length,rows,rank,experts,decode_rows,decode_context", help="what grows, with commas")
    repeats: int = flag(3, help="times that each entry is measured")

    def __post_init__(self):
        require_positive(self, "repeats", "threads")
        for axis in self.axes.split(","):
            if axis not in AXES:
                raise ValueError(f"--axes: {axis!r} is none of {', '.join(AXES)}")


def _with_rank(method: str, n_layers: int, rank: int) -> AdapterConfig:
    return config_of(method, n_layers, lora_rank=rank, lora_alpha=float(rank))


def _with_experts(method: str, n_layers: int, n: int) -> AdapterConfig:
    if n == 1:
        return config_of("lora", n_layers, lora_rank=8, lora_alpha=8.0)
    return config_of("molora", n_layers, expert_num=n)


# Axis -> its values, and the entry of one: by the method, the number of layers and the value
AXES: dict[str, tuple[tuple[int, ...], Callable[[str, int, int], Entry]]] = {
    "length": ((64, 128, 256, 512), lambda m, n, x: Entry(config_of(m, n), 2, x)),
    "rows": ((1, 2, 4, 8), lambda m, n, x: Entry(config_of(m, n), x, 128)),
    "rank": ((4, 8, 16, 32, 64), lambda m, n, x: Entry(_with_rank(m, n, x), 4, 128)),
    "experts": ((1, 2, 4, 8, 16), lambda m, n, x: Entry(_with_experts(m, n, x), 4, 128)),
    "decode_rows": ((1, 2, 4, 8, 16, 32), lambda m, n, x: Entry(config_of(m, n), x, 128)),
    "decode_context": ((64, 128, 256, 512, 1024), lambda m, n, x: Entry(config_of(m, n), 4, x)),
}


def training(
    args: ModelArgs, base: dict[str, Tensor], entries: dict[int, Entry], machine: Machine, repeats: int
) -> dict:
    """Figures of a training step of each entry."""
    steps, figures = {}, {}
    for value, entry in entries.items():
        batch = rows_of([halves(entry.length)] * entry.rows, args.vocab_size)
        step = step_of(on_base(args, base, entry.config))
        step(batch)
        steps[value] = lambda _, step=step, batch=batch: step(batch)
        shape = shape_only(args, entry.config, base["output.weight"].dtype == torch.bfloat16)
        lengths = [entry.length] * entry.rows
        work = step_work(shape, lengths, entry.rows * halves(entry.length)[1])
        figures[value] = {
            "floor": work.seconds(machine),
            "kept_bytes": saved_activation_bytes(shape, lengths, CPU).total("none"),
        }
    seconds = in_turn(steps, range(repeats))
    return {value: found | {"seconds": seconds[value]} for value, found in figures.items()}


def decoding(
    args: ModelArgs, base: dict[str, Tensor], entries: dict[int, Entry], machine: Machine, repeats: int
) -> dict:
    """Figures of a decode step of each entry, all of one model."""
    model = on_base(args, base, next(iter(entries.values())).config)
    clocks = {value: decode_clock(model, entry.rows, entry.length, STEPS) for value, entry in entries.items()}
    figures: dict[int, dict[str, Any]] = {value: {"seconds": []} for value in entries}
    for value, _ in turns(clocks, range(repeats)):
        figures[value]["seconds"].append(clocks[value]())
    for value, entry in entries.items():
        figures[value]["floor"] = decode_floor(model, entry.rows, entry.length, STEPS, machine)
    return figures


def show(axis: str, entries: dict[int, Entry], figures: dict[int, dict[str, Any]]) -> str:
    """The table of an axis."""
    what = "decode step" if axis.startswith("decode") else "training step"
    first, rows = next(iter(figures)), []
    for value, found in figures.items():
        entry, seconds = entries[value], statistics.median(found["seconds"])
        grown = [figure(value / first, 1), figure(ratio(found["seconds"], figures[first]["seconds"]))]
        floor = [figure(1000 * found["floor"], 1), figure(seconds / found["floor"], 1)]
        memory = [figure(found["kept_bytes"] / 1e6, 0)] if "kept_bytes" in found else []
        shape = f"{entry.config.method}, {entry.rows} x {entry.length}"
        rows.append([f"{value}", shape, figure(1000 * seconds, 1), *grown, *floor, *memory])
    names = [axis, what, "ms", "axis x first", "time x first", "floor, ms", "x floor", "kept, MB"]
    return table(names[: len(rows[0])], rows)


def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, prog="python -m benchmarks.growth", description=__doc__)
    with cli_errors():
        torch.set_num_threads(flags.threads)
        args, bf16 = ModelArgs(**BY_NAME[flags.shape]), bf16_is_fast(CPU)
        base = random_base(args, torch.bfloat16 if bf16 else torch.float32, CPU)
        machine = measure_machine()
        said = f"{flags.shape}, {'bf16' if bf16 else 'fp32'}, {flags.threads} threads, medians of {flags.repeats}"
        print(f"{said}; {machine}")
        found: dict[str, Any] = {}
        for axis in flags.axes.split(","):
            values, entry = AXES[axis]
            entries = {value: entry(flags.method, args.n_layers, value) for value in values}
            work = decoding if axis.startswith("decode") else training
            figures = work(args, base, entries, machine, flags.repeats)
            print(f"\n{show(axis, entries, figures)}", flush=True)
            found[axis] = figures
        if flags.json:
            said = {"shape": flags.shape, "method": flags.method, "bf16": bf16, "threads": flags.threads}
            write_json(Path(flags.json), {"task": said, "machine": machine._asdict(), "axes": found})


if __name__ == "__main__":
    main(sys.argv[1:])
