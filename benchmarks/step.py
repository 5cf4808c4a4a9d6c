"""Time and memory of training steps: our methods side by side, and transformers with PEFT's LoRA.

    python -m benchmarks.step [--methods soft_moa,sparse_moa,lora | all] [--peft] [--rows 4] [--rounds 3] [--json FILE]

Each kind trains --repeats steps in a process of its own, and --rounds such processes take turns, in the order ABBA. All
train on the same rows, which PEFT pads to the longest of a step; the first step warms up and does not count. Times are
medians over processes of each one's median; memory is a process's largest resident set. Our steps are those of
finetune.py (`training.loop.train`).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import CPU, PEFT, figure
from benchmarks.peers import padded_step, peft_lora
from cli import cli_errors, flag, parse
from llama import Llama
from llama.accelerate import Lanes
from llama.checkpoint import load_params_and_tokenizer
from llama.data import Example
from moa.state import count_parameters
from training import loop
from training.data import load_examples
from training.schedule import Schedule


@dataclass(frozen=True)
class Flags(common.SideBySide):
    methods: str = flag("soft_moa,sparse_moa,lora", help="methods to measure, with commas, or all")
    peft: bool = flag(False, help="also transformers + PEFT's LoRA, rank 16 (if installed)")
    rows: int = flag(4, help="rows of a step")
    repeats: int = flag(4, help="steps that count in each process")
    rounds: int = flag(3, help="processes of each kind")
    max_seq_len: int = flag(300, help="longest row")
    only: str | None = flag(None, help="train this kind alone, in this process, and print its figures as JSON")

    def __post_init__(self):
        common.require_positive(self, "rows", "repeats", "rounds", "max_seq_len", "threads")
        common.methods_named(self.methods)


def train_steps(kind: str, ckpt_dir: str, bf16: bool, examples: list[Example], schedule: Schedule) -> dict[str, Any]:
    """Train as scheduled -> each step's seconds, loss and tokens, the peak memory and the number of parameters."""
    if kind == PEFT:
        model, entries = peft_lora(ckpt_dir, bf16), []
        step = padded_step(model)
        for i in range(schedule.steps):
            rows = [examples[row] for row in schedule.rows(i, seed=0)]
            seconds, loss = common.timed(lambda rows=rows: step(rows))
            entries.append({"seconds": seconds, "loss": loss, "tokens": sum(len(e.tokens) for e in rows)})
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    else:
        n_layers, entries = load_params_and_tokenizer(ckpt_dir)[0].n_layers, []
        model = Llama.build(ckpt_dir, config=common.config_of(kind, n_layers), bf16=bf16).model
        trainable = count_parameters(model)["total"]
        with Lanes(model, loop.forward_backward, loop.expert_fraction, loop.uses_load_balancing(model)) as fast:
            optimizer, rest = (
                loop.make_optimizer(model, 0.02),
                (schedule.rows_per_step, 0, loop.TrainState(), entries.append),
            )
            loop.train(model, optimizer, examples, schedule, *rest, forward_backward=fast)
    figures = {"loss": [entry["loss"] for entry in entries], "trainable": trainable}
    for name in ("seconds", "tokens"):
        figures[name] = [entry[name] for entry in entries[1:]]  # the first warms up
    return figures | {"peak_memory_bytes": loop.peak_memory(CPU)}


def check_same_task(results: dict[str, list[dict[str, Any]]]) -> None:
    """Raise ValueError unless first losses agree: adapters begin as good as nothing."""
    losses = {kind: runs[0]["loss"][0] for kind, runs in results.items()}
    first = next(iter(losses.values()))
    if any(abs(loss - first) > 0.05 * abs(first) for loss in losses.values()):
        raise ValueError(f"the kinds do not train on the same task: first losses {losses}")


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    flags = parse(Flags, argv, prog="python -m benchmarks.step", description=__doc__)
    with cli_errors():
        torch.set_num_threads(flags.threads)
        ckpt_dir, bf16 = flags.base_folder(), flags.use_bf16()
        _, tokenizer = load_params_and_tokenizer(ckpt_dir)
        examples = load_examples(flags.rows_file(), tokenizer, flags.max_seq_len, quiet=True)
        if len(examples) < flags.rows * (1 + flags.repeats):
            raise ValueError(f"{flags.rows * (1 + flags.repeats)} rows are needed, {len(examples)} fit")
        schedule = Schedule(len(examples), flags.rows, 1 + flags.repeats, 0, 1e-3, 0.0, True)
        if flags.only:
            print(json.dumps(train_steps(flags.only, ckpt_dir, bf16, examples, schedule)))
            return
        kinds = [*common.methods_named(flags.methods), *([PEFT] if flags.peft else [])]
        works = {kind: common.run_only("benchmarks.step", argv, kind, flags.threads) for kind in kinds}
        results = common.measure_in_turn(works, flags.rounds)
        check_same_task(results)
        report(flags, results, bf16, examples)


def report(flags: Flags, results: dict[str, list[dict[str, Any]]], bf16: bool, examples: list[Example]) -> None:
    """Print the table and write the JSON file."""
    epoch = sum(len(example.tokens) for example in examples)
    step_tokens = sum(next(iter(results.values()))[0]["tokens"]) / flags.repeats
    figures = {
        kind: {
            "trainable": runs[0]["trainable"],
            "seconds_per_step": (seconds := common.median_seconds(runs)),
            "seconds_per_epoch": seconds * epoch / step_tokens,
            "peak_memory_bytes": common.peak_bytes(runs),
        }
        for kind, runs in results.items()
    }
    peft, rows = figures.get(PEFT), []
    for kind, f in figures.items():
        seconds, memory = f["seconds_per_step"], f["peak_memory_bytes"]
        times = [figure(seconds), figure(peft and seconds / peft["seconds_per_step"]), figure(step_tokens / seconds, 0)]
        minutes, against = figure(f["seconds_per_epoch"] / 60, 1), figure(peft and memory / peft["peak_memory_bytes"])
        rows.append([kind, f"{f['trainable']:,}", *times, minutes, figure(memory / 1e9), against])
    print(
        f"{flags.rows} rows a step, {step_tokens:.0f} tokens in the mean, {'bf16' if bf16 else 'fp32'}, "
        f"{flags.threads} threads, {flags.rounds} processes of {flags.repeats} steps\n"
    )
    heads = ["method", "trained parameters", "s per step", "x PEFT", "tokens/s", "minutes per epoch"]
    print(common.table([*heads, "peak memory, GB", "x PEFT"], rows))
    if flags.json:
        details = {"rows": flags.rows, "bf16": bf16, "threads": flags.threads, "runs": results}
        details |= {"training_rows": len(examples), "training_tokens": epoch}
        common.add_figures(flags.json, "training", details, figures)


if __name__ == "__main__":
    main()
