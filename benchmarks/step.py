"""Time and memory of a training step: our methods, our frozen base alone, and transformers + PEFT, side by side.

    python -m benchmarks.step [--methods soft_moa,sparse_moa,lora | all] [--peft] [--rows 4] [--repeats 6] [--json FILE]

Forward, backward and AdamW on the same rows, in turn; medians, and ratios within the run. PEFT's steps run in a process
of their own. Memory: each kind in its own process, the largest resident set after two steps. "base" is our model
without adapters: gradients go to the embeddings' output, at least as far as any adapter wants them. PEFT pads to the
longest row. "floor": the least that the step's arithmetic can take on this machine (benchmarks/floors.py), which is
measured in the same run; of the memory, the weights, and the adapters' gradients and moments.
"""

import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.flags import OnBase, Timed, methods_named, require_positive
from benchmarks.floors import step_work
from benchmarks.machine import Machine, measure_machine
from benchmarks.measure import CPU, apart, figure, in_turn, own_process, ratio, table
from benchmarks.models import config_of, shape_only
from benchmarks.steps import BASE, PEFT, make, method_of
from cli import cli_errors, flag, parse
from demo.model import ensure_model
from demo.problems import ensure_data
from llama import ModelArgs, Transformer
from llama.checkpoint import read_base
from llama.data import Example
from llama.distributed import bf16_is_fast
from moa.files import write_json
from training.data import label_count, load_examples
from training.estimate import held_bytes
from training.loop import peak_memory


@dataclass(frozen=True)
class Flags(Timed, OnBase):
    data_path: str | None = flag(None, help="training rows; default: the demo's")
    methods: str = flag("soft_moa,sparse_moa,lora", help="methods to measure, with commas, or all")
    peft: bool = flag(False, help="also transformers + PEFT's LoRA, rank 16 (if installed)")
    rows: int = flag(4, help="rows of a step")
    repeats: int = flag(6, help="steps measured, each on other rows")
    max_seq_len: int = flag(300, help="longest row")
    memory_of: str | None = flag(None, help="only this one: two steps, then the peak memory in bytes")

    def __post_init__(self):
        require_positive(self, "rows", "repeats", "max_seq_len", "threads")
        methods_named(self.methods)


class Task(NamedTuple):
    """What all kinds do. batches: one of each measured step."""

    ckpt_dir: str
    args: ModelArgs
    bf16: bool
    batches: list[list[Example]]

    @property
    def tokens(self) -> list[int]:
        return [sum(len(e.tokens) for e in batch) for batch in self.batches]

    @property
    def labels(self) -> list[int]:
        return [sum(map(label_count, batch)) for batch in self.batches]

    @property
    def padded(self) -> list[int]:
        """Tokens, those included that only fill up rows."""
        return [len(batch) * max(len(e.tokens) for e in batch) for batch in self.batches]


def task_of(ckpt_dir: str, examples: Sequence[Example], rows: int, steps: int) -> Task:
    """ValueError where there are not enough rows."""
    if len(examples) < rows * steps:
        raise ValueError(f"{rows * steps} rows are needed, {len(examples)} fit")
    batches = [list(examples[i : i + rows]) for i in range(0, rows * steps, rows)]
    return Task(ckpt_dir, read_base(ckpt_dir)[0], bf16_is_fast(CPU), batches)


def measure(kinds: Sequence[str], task: Task) -> dict[str, list[float]]:
    """Seconds of each kind's step on each batch, in turn; the first batch is done once before, unmeasured."""
    with ExitStack() as processes:
        steps = {}
        for kind in kinds:
            maker = partial(make, kind, task.ckpt_dir, task.bf16)
            steps[kind] = processes.enter_context(apart(maker, torch.get_num_threads())) if kind == PEFT else maker()
        losses = {kind: step(task.batches[0]) for kind, step in steps.items()}
        off = [kind for kind, loss in losses.items() if abs(loss - losses[kinds[0]]) > 0.05 * abs(losses[kinds[0]])]
        assert not off, f"not the same task: first losses {losses}"  # adapters begin as good as nothing
        return in_turn(steps, task.batches)


def shapes(kinds: Sequence[str], task: Task) -> dict[str, Transformer]:
    """Without weights."""
    return {kind: shape_only(task.args, config_of(method_of(kind), task.args.n_layers), task.bf16) for kind in kinds}


def floors(kinds: Sequence[str], task: Task, machine: Machine) -> dict[str, list[float]]:
    """The least seconds of each kind's step on each batch."""
    models = shapes(kinds, task)
    lengths = [[len(e.tokens) for e in batch] for batch in task.batches]
    return {
        kind: [step_work(model, *batch).seconds(machine) for batch in zip(lengths, task.labels, strict=True)]
        for kind, model in models.items()
    }


def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, prog="python -m benchmarks.step", description=__doc__)
    with cli_errors():
        torch.set_num_threads(flags.threads)
        ckpt_dir = flags.ckpt_dir or str(ensure_model())
        _, tokenizer = read_base(ckpt_dir)
        examples = load_examples(flags.data_path or ensure_data()[0], tokenizer, flags.max_seq_len, quiet=True)
        task = task_of(ckpt_dir, examples, flags.rows, flags.repeats)
        if flags.memory_of:
            step = make(flags.memory_of, ckpt_dir, task.bf16)
            for batch in sorted(task.batches, key=lambda batch: sum(len(e.tokens) for e in batch))[-2:]:
                step(batch)
            print(peak_memory(CPU))
            return
        kinds = [BASE, *methods_named(flags.methods), *([PEFT] if flags.peft else [])]
        memory = {kind: int(own_process("benchmarks.step", [*argv, "--memory_of", kind])) for kind in kinds}
        machine = measure_machine()
        seconds = measure(kinds, task)
        least = floors(kinds, task, machine)
        report(flags, task, machine, seconds, memory, least)


def report(
    flags: Flags,
    task: Task,
    machine: Machine,
    seconds: dict[str, list[float]],
    memory: dict[str, int],
    least: dict[str, list[float]],
) -> None:
    """The table, and the JSON file."""
    tokens, padded, labels = task.tokens, task.padded, task.labels
    print(
        f"{flags.rows} rows a step, {statistics.median(tokens):.0f} tokens (padded {statistics.median(padded):.0f}, "
        f"labels {statistics.median(labels):.0f}), {'bf16' if task.bf16 else 'fp32'}, {flags.threads} threads; "
        f"medians of {len(task.batches)}; {machine}\n"
    )
    rows, models = [], shapes(seconds, task)
    for kind, times in seconds.items():
        against = [figure(ratio(times, seconds[other]) if other in seconds else None) for other in (BASE, PEFT)]
        floor = [figure(statistics.median(least[kind])), figure(ratio(times, least[kind]))]
        held = [figure(memory[kind] / 1e9), figure(memory[kind] / memory[PEFT] if PEFT in memory else None)]
        held.append(figure(sum(held_bytes(models[kind]).values()) / 1e9))
        rows.append([kind, figure(statistics.median(times)), *against, *floor, *held])
    heads = ["step of", "seconds", "x base", "x PEFT", "floor, s", "x floor", "peak memory, GB", "x PEFT", "floor, GB"]
    print(table(heads, rows))
    if flags.json:
        content = {"seconds": seconds, "memory": memory, "floor": least, "machine": machine._asdict()}
        write_json(Path(flags.json), content | {"tokens": tokens, "padded": padded, "labels": labels})


if __name__ == "__main__":
    main(sys.argv[1:])
