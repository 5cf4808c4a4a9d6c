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
from pathlib import Path

import torch

from benchmarks import common, models, peers
from benchmarks.common import CPU, PEFT, Figures, median, multiple, number
from cli import cli_errors, flag, parse
from llama import Llama
from llama.checkpoint import load_params_and_tokenizer
from llama.data import Example
from moa.files import write_json
from training.data import load_examples
from training.loop import peak_memory


@dataclass(frozen=True)
class Flags(common.SideBySide):
    methods: str = flag("soft_moa,sparse_moa,lora", help="methods to measure, with commas, or all")
    peft: bool = flag(False, help="also transformers + PEFT's LoRA, rank 16 (if installed)")
    rows: int = flag(4, least=1, help="rows of a step")
    repeats: int = flag(4, least=1, help="steps that count in each process")
    max_seq_len: int = flag(300, least=1, help="longest row")
    only: str | None = flag(None, help="train this kind alone, in this process, and print its figures as JSON")

    def __post_init__(self):
        common.methods_named(self.methods)
        if self.peft:
            peers.require_installed("peft")


def measure(kind: str, flags: Flags, examples: list[Example]) -> Figures:
    """Train -> seconds and tokens of each step that counts, all losses, peak memory and the number of parameters."""
    ckpt_dir = flags.base_folder()
    if kind == PEFT:
        model = peers.new_lora(peers.transformers_model(ckpt_dir, flags.use_bf16()))
        train = peers.trainer(model, examples, flags.rows)
    else:
        config = models.config_of(kind, load_params_and_tokenizer(ckpt_dir)[0].n_layers)
        model = Llama.build(ckpt_dir, config=config, bf16=flags.use_bf16()).model
        train = models.trainer(model, examples, flags.rows)
    entries = train(1 + flags.repeats)
    return {
        "seconds": [entry["seconds"] for entry in entries[1:]],
        "tokens": [entry["tokens"] for entry in entries[1:]],
        "loss": [entry["loss"] for entry in entries],
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "peak_memory_bytes": peak_memory(CPU),
    }


def check_same_task(results: dict[str, list[Figures]]) -> None:
    """Raise ValueError unless first losses agree: adapters begin as good as nothing."""
    losses = {kind: runs[0]["loss"][0] for kind, runs in results.items()}
    first = next(iter(losses.values()))
    if any(abs(loss - first) > 0.05 * abs(first) for loss in losses.values()):
        raise ValueError(f"the kinds do not train on the same task: first losses {losses}")


def report(flags: Flags, results: dict[str, list[Figures]], examples: list[Example]) -> None:
    """Print the table and write the JSON file."""
    epoch = sum(len(example.tokens) for example in examples)
    step_tokens = sum(next(iter(results.values()))[0]["tokens"]) / flags.repeats
    figures = {
        kind: {
            "trainable": runs[0]["trainable"],
            "seconds_per_step": (seconds := median(runs, "seconds")),
            "seconds_per_epoch": seconds * epoch / step_tokens,
            "peak_memory_bytes": median(runs, "peak_memory_bytes"),
        }
        for kind, runs in results.items()
    }
    peft = figures.get(PEFT)
    columns = [
        ("method", lambda figures: figures["kind"]),
        ("trained parameters", number("trainable", 0)),
        ("s per step", number("seconds_per_step")),
        ("x PEFT", multiple("seconds_per_step", peft)),
        ("tokens/s", lambda figures: f"{step_tokens / figures['seconds_per_step']:,.0f}"),
        ("minutes per epoch", number("seconds_per_epoch", 1, 60)),
        ("peak memory, GB", number("peak_memory_bytes", 2, 1e9)),
        ("x PEFT", multiple("peak_memory_bytes", peft)),
    ]
    print(
        f"{flags.rows} rows a step, {step_tokens:.0f} tokens in the mean, {flags.repeats} steps a process, "
        f"{flags.conditions()}\n"
    )
    print(common.table(columns, [{"kind": kind} | f for kind, f in figures.items()]))
    if flags.json:
        task = {"rows": flags.rows, "bf16": flags.use_bf16(), "threads": flags.threads, "training_tokens": epoch}
        write_json(Path(flags.json), {"task": task, "kinds": figures, "runs": results})


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    flags = parse(Flags, argv, prog="python -m benchmarks.step", description=__doc__)
    with cli_errors():
        torch.set_num_threads(flags.threads)
        _, tokenizer = load_params_and_tokenizer(flags.base_folder())
        examples = load_examples(flags.rows_file(), tokenizer, flags.max_seq_len, quiet=True)
        if len(examples) < flags.rows * (1 + flags.repeats):
            raise ValueError(f"{flags.rows * (1 + flags.repeats)} rows are needed, {len(examples)} fit")
        if flags.only:
            print(json.dumps(measure(flags.only, flags, examples)))
            return
        kinds = [*common.methods_named(flags.methods), *([PEFT] if flags.peft else [])]
        works = {kind: common.run_only("benchmarks.step", argv, kind, flags.threads) for kind in kinds}
        results = common.measure_in_turn(works, flags.rounds)
        check_same_task(results)
        report(flags, results, examples)


if __name__ == "__main__":
    main()
