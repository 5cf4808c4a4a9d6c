"""Time and memory of a training step: our methods, our frozen base alone, and transformers + PEFT, side by side.

    python -m benchmarks.step [--methods soft_moa,sparse_moa,lora] [--peft] [--rows 4] [--repeats 6] [--json FILE]

Forward, backward and AdamW on the same rows, in turn; medians, and ratios within the run. Memory: each kind in its own
process, the largest resident set after two steps. "base" is our model without adapters: gradients go to the
embeddings' output, as they must under any adapter in the first layer. PEFT pads to the longest row.
"""

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.flags import methods_named
from benchmarks.peers import peft_lora
from cli import errors, knob, parse
from demo.model import ensure_model
from demo.problems import ensure_data
from llama import Llama
from llama.checkpoint import read_base
from llama.data import IGNORE, Example
from llama.parallel import bf16_is_fast
from moa.config import AdapterConfig
from training.data import label_count, load_examples, micro_batches
from training.loop import make_optimizer

BASE, PEFT = "base", "PEFT lora"
Step = Callable[[list[Example]], float]  # returns the loss


@dataclass(frozen=True)
class Flags:
    ckpt_dir: str | None = knob(None, help="base model, a folder in Meta's layout; default: the demo model")
    data_path: str | None = knob(None, help="training rows; default: the demo's")
    methods: str = knob("soft_moa,sparse_moa,lora", help="methods to measure, with commas")
    peft: bool = knob(False, help="also transformers + PEFT's LoRA, rank 16 (if installed)")
    rows: int = knob(4, help="rows of a step")
    repeats: int = knob(6, help="steps measured, each on other rows")
    max_seq_len: int = knob(300, help="longest row")
    threads: int = knob(torch.get_num_threads(), help="threads")
    json: str | None = knob(None, help="write the figures to this file too")
    memory_of: str | None = knob(None, help="only this one: two steps, then the peak memory in bytes")

    def __post_init__(self):
        for name in ("rows", "repeats", "max_seq_len", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        methods_named(self.methods)


def our_step(ckpt_dir: str, method: str | None, bf16: bool) -> Step:
    """A step of finetune.py; of the bare base for None."""
    args, _ = read_base(ckpt_dir)
    config = None if method is None else AdapterConfig.from_flat({"method": method}, args.n_layers)
    model = Llama.build(ckpt_dir, config=config, bf16=bf16).model.train()
    optimizer = make_optimizer(model, 0.02) if method else None
    if method is None:
        model.tok_embeddings.register_forward_hook(lambda _, __, output: output.requires_grad_(True))

    def step(examples: list[Example]) -> float:
        n_labels = sum(map(label_count, examples))
        if optimizer:
            optimizer.zero_grad(set_to_none=True)
        for tokens, labels, rows in micro_batches(examples, len(examples), torch.device("cpu")):
            losses = model.losses(tokens, labels, rows)
            (losses.labels / n_labels + losses.auxiliary).backward()
        if optimizer:
            optimizer.step()
        return losses.labels.item() / n_labels

    return step


def peft_step(ckpt_dir: str, bf16: bool) -> Step:
    """The same by transformers and PEFT, rows padded to the longest."""
    model = peft_lora(ckpt_dir, torch.bfloat16 if bf16 else torch.float32).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.95))

    def step(examples: list[Example]) -> float:
        longest = max(len(e.tokens) for e in examples)
        tokens = torch.tensor([e.tokens + [0] * (longest - len(e.tokens)) for e in examples])
        labels = torch.tensor([e.labels + [IGNORE] * (longest - len(e.labels)) for e in examples])
        mask = torch.tensor([[1] * len(e.tokens) + [0] * (longest - len(e.tokens)) for e in examples])
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def make(kind: str, ckpt_dir: str, bf16: bool) -> Step:
    if kind == PEFT:
        return peft_step(ckpt_dir, bf16)
    return our_step(ckpt_dir, None if kind == BASE else kind, bf16)


def measure(kinds: list[str], ckpt_dir: str, bf16: bool, batches: list[list[Example]]) -> dict[str, list[float]]:
    """Seconds of each kind's step on each batch, in turn; the first batch is done once before, unmeasured."""
    steps = {kind: make(kind, ckpt_dir, bf16) for kind in kinds}
    losses = {kind: step(batches[0]) for kind, step in steps.items()}
    off = [kind for kind, loss in losses.items() if abs(loss - losses[kinds[0]]) > 0.05 * abs(losses[kinds[0]])]
    assert not off, f"not the same task: first losses {losses}"  # adapters begin as good as nothing
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for batch in batches:
        for kind, step in steps.items():
            begin = time.perf_counter()
            step(batch)
            seconds[kind].append(time.perf_counter() - begin)
    return seconds


def peak_memory(kind: str, argv: list[str]) -> int:
    """Of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.step", *argv, "--memory_of", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return int(done.stdout.splitlines()[-1])


def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, prog="python -m benchmarks.step", description=__doc__)
    with errors():
        torch.set_num_threads(flags.threads)
        ckpt_dir = flags.ckpt_dir or str(ensure_model())
        _, tokenizer = read_base(ckpt_dir)
        examples = load_examples(flags.data_path or ensure_data()[0], tokenizer, flags.max_seq_len, quiet=True)
        wanted = flags.rows * flags.repeats
        if len(examples) < wanted:
            raise ValueError(f"{wanted} rows are needed, {len(examples)} fit")
        batches = [examples[i : i + flags.rows] for i in range(0, wanted, flags.rows)]
        bf16 = bf16_is_fast(torch.device("cpu"))
        if flags.memory_of:
            step = make(flags.memory_of, ckpt_dir, bf16)
            for batch in sorted(batches, key=lambda batch: sum(len(e.tokens) for e in batch))[-2:]:
                step(batch)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
            return
        kinds = [BASE, *methods_named(flags.methods), *([PEFT] if flags.peft else [])]
        memory = {kind: peak_memory(kind, argv) for kind in kinds}
        seconds = measure(kinds, ckpt_dir, bf16, batches)
        report(flags, batches, bf16, seconds, memory)


def report(
    flags: Flags, batches: list[list[Example]], bf16: bool, seconds: dict[str, list[float]], memory: dict[str, int]
) -> None:
    """The table, and the JSON file."""
    lengths = [sum(len(e.tokens) for e in batch) for batch in batches]
    padded = [len(batch) * max(len(e.tokens) for e in batch) for batch in batches]
    labels = [sum(map(label_count, batch)) for batch in batches]
    print(
        f"{flags.rows} rows a step, {statistics.median(lengths):.0f} tokens (padded {statistics.median(padded):.0f}, "
        f"labels {statistics.median(labels):.0f}), {'bf16' if bf16 else 'fp32'}, {flags.threads} threads; medians of "
        f"{len(batches)}\n"
    )
    print("| step of | seconds | x base | x PEFT | peak memory, GB | x PEFT |\n|---|---|---|---|---|---|")
    for kind, times in seconds.items():
        against = [_ratio(times, seconds.get(other)) for other in (BASE, PEFT)]
        share = f"{memory[kind] / memory[PEFT]:.2f}" if PEFT in memory else "-"
        median = statistics.median(times)
        print(f"| {kind} | {median:.2f} | {against[0]} | {against[1]} | {memory[kind] / 1e9:.2f} | {share} |")
    if flags.json:
        content = {"seconds": seconds, "memory": memory, "tokens": lengths, "padded": padded, "labels": labels}
        Path(flags.json).write_text(json.dumps(content, indent=1) + "\n")


def _ratio(times: list[float], others: list[float] | None) -> str:
    """Median of the ratios of steps on the same rows."""
    if others is None:
        return "-"
    return f"{statistics.median(a / b for a, b in zip(times, others, strict=True)):.2f}"


if __name__ == "__main__":
    main(sys.argv[1:])
