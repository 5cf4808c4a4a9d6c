"""What each method costs, on equal terms: trained parameters, time of an epoch, memory, time of an answer.

    python -m benchmarks.cost [--methods all] [--data_path gsm8k/train.json] [--test_path gsm8k/test.json] [--peft]
                              [--json FILE]

One base, one machine, one run: training steps and answers are measured in turn, all on the same rows, PEFT's in
processes of their own. An epoch: all tokens of the training rows at the measured median time per token. Peak memory of
training: each method in a process of its own, the largest resident set of two steps. An answer: --new_tokens tokens
(adapters as they start; how long the answers of trained ones are is another matter), --batch_size at once. "x base":
the median of the ratios of what was measured next to each other. "base" is the model without adapters; a step of it has
no optimizer.
"""

import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.decoding import EARLY
from benchmarks.flags import OnBase, Timed, methods_named, require_positive
from benchmarks.generation import prompts_of
from benchmarks.generators import Kind, Task, made
from benchmarks.measure import figure, in_turn, own_process, ratio, table
from benchmarks.models import config_of, shape_only
from benchmarks.step import measure, task_of
from benchmarks.steps import BASE, PEFT, method_of
from cli import cli_errors, flag, parse
from demo.model import ensure_model
from demo.problems import ensure_data
from llama.checkpoint import read_base
from moa.files import write_json
from moa.state import count_parameters
from training.data import load_examples


@dataclass(frozen=True)
class Flags(Timed, OnBase):
    data_path: str | None = flag(None, help="training rows; default: the demo's")
    test_path: str | None = flag(None, help="test rows; default: the demo's")
    methods: str = flag("all", help="methods to measure, with commas, or all")
    peft: bool = flag(False, help="also transformers + PEFT's LoRA, rank 16 (if installed)")
    rows: int = flag(4, help="rows of a training step")
    max_seq_len: int = flag(300, help="longest training row")
    batch_size: int = flag(16, help="prompts that are answered at once")
    new_tokens: int = flag(64, help="tokens of each answer")
    repeats: int = flag(4, help="training steps and answered batches measured of each")

    def __post_init__(self):
        require_positive(self, "rows", "max_seq_len", "batch_size", "new_tokens", "repeats", "threads")
        methods_named(self.methods)


def training(flags: Flags, ckpt_dir: str, kinds: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The task in words, and figures by kind."""
    path = flags.data_path or str(ensure_data()[0])
    examples = load_examples(path, read_base(ckpt_dir)[1], flags.max_seq_len, quiet=True)
    epoch = sum(len(example.tokens) for example in examples)
    task = task_of(ckpt_dir, examples, flags.rows, flags.repeats)
    words = ["--ckpt_dir", ckpt_dir, "--data_path", path, "--rows", flags.rows, "--repeats", flags.repeats]
    words += ["--max_seq_len", flags.max_seq_len, "--threads", flags.threads, "--methods", "", "--memory_of"]
    memory = {kind: int(own_process("benchmarks.step", [*words, kind])) for kind in kinds}
    figures = {}
    taken_by = measure(kinds, task)
    for kind, seconds in taken_by.items():
        per_token = statistics.median(taken / n for taken, n in zip(seconds, task.tokens, strict=True))
        config = config_of(method_of(kind), task.args.n_layers)
        figures[kind] = {
            "trainable": count_parameters(shape_only(task.args, config, task.bf16))["total"],
            "seconds_per_step": statistics.median(seconds),
            "step_over_base": ratio(seconds, taken_by[BASE]),
            "seconds_per_epoch": per_token * epoch,
            "tokens_per_second": 1 / per_token,
            "peak_memory_bytes": memory[kind],
        }
    said = {"rows_per_step": flags.rows, "training_rows": len(examples), "training_tokens": epoch, "bf16": task.bf16}
    return said | {"max_seq_len": flags.max_seq_len, "threads": flags.threads, "repeats": flags.repeats}, figures


def answering(
    flags: Flags, ckpt_dir: str, kinds: Sequence[str], bf16: bool
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """The task in words, and figures by kind."""
    prompts = prompts_of(flags.test_path or str(ensure_data()[1]), ckpt_dir, flags.batch_size)
    task = Task(prompts, flags.new_tokens, flags.new_tokens, flags.batch_size)
    n_layers = read_base(ckpt_dir)[0].n_layers
    wanted = [Kind(kind, config_of(method_of(kind), n_layers)) for kind in kinds]
    with made(wanted, ckpt_dir, bf16, task) as generators:
        for generate in generators.values():
            generate(task.shorter(EARLY))
        works = {kind: lambda _, generate=generate: generate(task) for kind, generate in generators.items()}
        seconds = in_turn(works, range(flags.repeats))
    said = {"prompts": len(prompts), "prompt_tokens": sum(map(len, prompts)), "new_tokens": flags.new_tokens}
    return said, {
        kind: {
            "seconds_per_answer": statistics.median(times) / len(prompts),
            "answer_over_base": ratio(times, seconds[BASE]),
        }
        for kind, times in seconds.items()
    }


def markdown(found: dict[str, Any]) -> str:
    """The table, with what it is about above it."""
    task, base = found["task"], found["base"]
    rows = []
    for name, f in ({BASE: base} | found["methods"] | found["peers"]).items():
        step, answer = f["seconds_per_step"], f["seconds_per_answer"]
        epoch = f"{f['seconds_per_epoch'] / 60:,.1f}"
        times = [figure(step), figure(f["step_over_base"]), epoch, figure(f["peak_memory_bytes"] / 1e9)]
        rows.append([name, f"{f['trainable']:,}", *times, figure(answer), figure(f["answer_over_base"])])
    heads = ["method", "trained parameters", "s per step", "x base", "minutes per epoch", "peak memory, GB"]
    return (
        f"Training: {task['rows_per_step']} rows a step, an epoch of {task['training_rows']:,} rows and "
        f"{task['training_tokens']:,} tokens. Answers: {task['new_tokens']} tokens, {task['prompts']} at once. "
        f"{'bf16' if task['bf16'] else 'fp32'}, {task['threads']} threads, medians of {task['repeats']}.\n\n"
        + table([*heads, "s per answer", "x base"], rows)
    )


def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, prog="python -m benchmarks.cost", description=__doc__)
    with cli_errors():
        torch.set_num_threads(flags.threads)
        ckpt_dir = flags.ckpt_dir or str(ensure_model())
        methods, peers = methods_named(flags.methods), [PEFT] if flags.peft else []
        kinds = [BASE, *methods, *peers]
        task, figures = training(flags, ckpt_dir, kinds)
        said, answers = answering(flags, ckpt_dir, kinds, task["bf16"])
        for kind, answered in answers.items():
            figures[kind] |= answered
        found = {
            "methods": {kind: figures[kind] for kind in methods},
            "base": figures[BASE],
            "peers": {kind: figures[kind] for kind in peers},
            "task": task | said | {"base": Path(ckpt_dir).name},
        }
        if flags.json:
            write_json(Path(flags.json), found)
        print(markdown(found))


if __name__ == "__main__":
    main(sys.argv[1:])
