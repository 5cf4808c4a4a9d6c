"""Training and generation on one GPU, with random weights in a published model's shape: no file is needed.

    python -m benchmarks.gpu [--shape 8B] [--methods soft_moa] [--minutes 8] [--json gpu.json]
    python -m benchmarks.gpu --shape tiny --device cpu          to try the command where there is no GPU

Parts, in this order (--parts names some of them, with commas):

step      real tokens/s of training steps of --rows rows with GSM8K's lengths, peak memory, and the share of the best
          measured rate of products that the step's FLOPs make up; PEFT's LoRA beside it, if it is installed
decode    milliseconds of a decode step at --decode_rows rows, without and with CUDA graphs, and the share of the
          measured bandwidth that reading weights, keys and values makes up; transformers beside it
memory    peak memory of a step of rows that are all of 300 tokens, by --activation_checkpointing
trace     kernels of a step and of a decode step: how many, and those that take most time

Each result is printed, and the JSON file written anew, as soon as it is there. After --minutes no further one is begun.
One that fails is named and left out, and the exit status is then 1.
"""

import gc
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, peers
from benchmarks.common import BASE, PEFT, SHAPES, TRANSFORMERS, figure, timed
from cli import cli_errors, flag, parse
from llama import ModelArgs
from llama.data import IGNORE_INDEX, Example
from llama.distributed import bf16_is_fast, get_device
from moa.files import write_json
from training.config import CHECKPOINTING_MODES
from training.data import label_count, micro_batches
from training.loop import forward_backward, make_optimizer, peak_memory

PARTS = ("step", "decode", "memory", "trace")
LONGEST = 300
EARLY = 32  # decode steps of the shorter of two runs; a longer one takes a multiple of it more
PROMPTS, ANSWERS = (65, 118), (49, 149)  # tokens of eight in ten of GSM8K's training rows


@dataclass(frozen=True)
class Flags:
    shape: str = flag("8B", help="shape of the model", choices=tuple(SHAPES))
    methods: str = flag("soft_moa", help="methods to measure, with commas, or all")
    parts: str = flag(",".join(PARTS), help="what to measure, with commas")
    minutes: float = flag(8.0, help="begin nothing after so many minutes")
    device: str = flag("auto", help="auto, cpu, cuda or cuda:N")
    rows: int = flag(8, help="rows of a training step")
    decode_rows: str = flag("1,32", help="rows of a decode step, with commas")
    context: int = flag(96, help="tokens of each prompt of those")
    repeats: int = flag(3, help="measured steps, and decode runs, of each")
    json: str | None = flag(None, help="write the figures to this file too")

    def __post_init__(self):
        common.require_positive(self, "rows", "context", "repeats")
        common.methods_named(self.methods)
        common.numbers_of("decode_rows", self.decode_rows)
        if unknown := set(self.parts.split(",")) - set(PARTS):
            raise ValueError(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")


def random_rows(n: int, vocab_size: int, seed: int, full: bool = False) -> list[Example]:
    """Draw rows as long as GSM8K's, or, with `full`, of LONGEST tokens, half of them an answer."""
    generator, rows = random.Random(seed), []
    for _ in range(n):
        prompt, answer = (LONGEST // 2,) * 2 if full else (generator.randint(*PROMPTS), generator.randint(*ANSWERS))
        tokens = [generator.randrange(1, vocab_size) for _ in range(prompt + answer)]
        rows.append(Example(tokens, [IGNORE_INDEX] * prompt + tokens[prompt:], prompt))
    return rows


class Bench:
    """One run: the weights, which all models share, and the measurements on them."""

    def __init__(self, flags: Flags, device: torch.device):
        self.flags, self.device, self.args = flags, device, ModelArgs(**SHAPES[flags.shape])
        self.machine = common.measure_machine(device)
        dtype = torch.bfloat16 if bf16_is_fast(device) else torch.float32
        self.base = common.random_base(self.args, dtype, device)

    def step(self, kind: str, mode: str = "none") -> Callable[[list[Example]], object]:
        """Return a training step of a method, or of PEFT's LoRA."""
        if kind == PEFT:
            model = peers.lora_on(peers.transformers_on(self.args, self.base), checkpointing=mode != "none")
            return peers.padded_step(model, self.device)
        model = common.model_on(self.args, self.base, common.config_of(kind, self.args.n_layers)).train()
        model.activation_checkpointing, optimizer = mode, make_optimizer(model, 0.02)

        def step(rows: list[Example]) -> float:
            optimizer.zero_grad(set_to_none=True)
            (batch,) = micro_batches(rows, len(rows), self.device)
            losses = forward_backward(model, batch, sum(map(label_count, rows)), len(batch[0]))
            optimizer.step()
            return losses.sum().item()

        return step

    def peak_bytes(self, work: Callable[[], object], kind: str) -> int:
        """Return the largest memory while `work` runs, less the weights that a peer's model has twice beside ours."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        work()
        return peak_memory(self.device) - peers.copied_bytes(self.base) * (kind in (PEFT, TRANSFORMERS))

    def train(self, kind: str) -> dict[str, Any]:
        """Measure training steps."""
        step, flags, seconds = self.step(kind), self.flags, []
        batches = [random_rows(flags.rows, self.args.vocab_size, seed) for seed in range(flags.repeats)]
        step(batches[0])
        for batch in batches:
            seconds.append(timed(partial(step, batch), self.device)[0])
        tokens = [sum(len(row.tokens) for row in batch) for batch in batches]
        model = common.model_on(self.args, self.base, common.config_of(self.ours(kind), self.args.n_layers))
        labels = sum(label_count(row) for batch in batches for row in batch)
        share = common.training_flops(model, sum(tokens), labels) / sum(seconds) / self.machine.flops
        memory = self.peak_bytes(lambda: step(batches[0]), kind)
        return {
            "seconds": seconds,
            "tokens": tokens,
            "tokens_per_second": sum(tokens) / sum(seconds),
            "share_of_flops": share,
            "peak_memory_bytes": memory,
        }

    def ours(self, kind: str) -> str:
        return {PEFT: "lora", TRANSFORMERS: BASE}.get(kind, kind)

    def memory(self, kind: str, mode: str) -> dict[str, Any]:
        """Measure a step of rows that are all of LONGEST tokens."""
        step = self.step(kind, mode)
        batch = random_rows(self.flags.rows, self.args.vocab_size, 0, full=True)
        return {"peak_memory_bytes": self.peak_bytes(lambda: step(batch), kind)}

    def answerer(self, kind: str, n_rows: int, graphs: bool, context: int) -> Callable[[int], object]:
        """Return what answers so many prompts by a number of tokens each."""
        prompts = [row.tokens[:context] for row in random_rows(n_rows, self.args.vocab_size, 0, full=True)]
        if kind in (PEFT, TRANSFORMERS):
            model = peers.transformers_on(self.args, self.base)
            model = peers.lora_on(model) if kind == PEFT else model
            return lambda n: peers.padded_answers(model, [0], prompts, n, n, n_rows, self.device)
        model = common.model_on(self.args, self.base, common.config_of(kind, self.args.n_layers))
        llm = common.llm_on(model, LONGEST, n_rows, graphs)
        return lambda n: llm.generate(prompts, n, n)

    def decode(self, kind: str, n_rows: int, graphs: bool) -> dict[str, Any]:
        """Measure a decode step: what a run of 2 * EARLY tokens takes longer than one of EARLY, by their difference."""
        context = self.flags.context
        answer, seconds = self.answerer(kind, n_rows, graphs, context), []
        answer(2 * EARLY)
        for _ in range(self.flags.repeats):
            longer, shorter = (timed(lambda n=n: answer(n), self.device)[0] for n in (2 * EARLY, EARLY))
            seconds.append((longer - shorter) / EARLY)
        model = common.model_on(self.args, self.base, common.config_of(self.ours(kind), self.args.n_layers))
        step_bytes = common.decode_bytes(model, n_rows, context + 3 * EARLY // 2)
        share = step_bytes / statistics.median(seconds) / self.machine.bandwidth
        memory = self.peak_bytes(lambda: answer(EARLY), kind)
        return {"seconds": seconds, "share_of_bandwidth": share, "peak_memory_bytes": memory}

    def trace(self, kind: str, training: bool) -> dict[str, Any]:
        """Profile a training step, or EARLY decode steps of one row after a prompt of one token."""
        if training:
            step, batch = self.step(kind), random_rows(self.flags.rows, self.args.vocab_size, 0)
            work = partial(step, batch)
        else:
            work = partial(self.answerer(kind, 1, False, 1), EARLY)
        work()
        gpu = self.device.type == "cuda"
        activity = torch.profiler.ProfilerActivity
        with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * gpu) as profiler:
            seconds = timed(work, self.device)[0]
        kernels = []
        for event in profiler.key_averages():
            on_gpu = event.device_type == torch.autograd.DeviceType.CUDA
            taken = event.self_device_time_total if gpu else event.self_cpu_time_total  # microseconds
            if on_gpu == gpu and taken > 0 and not getattr(event, "is_user_annotation", False):
                kernels.append({"name": event.key[:90], "seconds": taken / 1e6, "count": event.count})
        kernels.sort(key=lambda kernel: -kernel["seconds"])
        total, busy = sum(k["count"] for k in kernels), sum(k["seconds"] for k in kernels)
        return {"seconds": seconds, "kernels": total, "device_seconds": busy, "top": kernels[:15]}


def measurements(bench: Bench) -> Iterator[tuple[str, str, Callable[[], dict[str, Any]]]]:
    """Yield (part, name, work) of all that can be measured, the most wanted first."""
    flags, gpu = bench.flags, bench.device.type == "cuda"
    methods = common.methods_named(flags.methods)
    transformers = [TRANSFORMERS] if find_spec("transformers") else []
    peft = [PEFT] if transformers and find_spec("peft") else []
    for kind in [*methods, *peft]:
        yield "step", kind, partial(bench.train, kind)
    for n_rows in common.numbers_of("decode_rows", flags.decode_rows):
        for kind in [*methods, BASE, *transformers, *peft]:
            yield "decode", f"{kind}, {n_rows} rows", partial(bench.decode, kind, n_rows, False)
            if gpu and kind not in (TRANSFORMERS, PEFT):
                yield "decode", f"{kind}, {n_rows} rows, graphs", partial(bench.decode, kind, n_rows, True)
    for kind in [*methods, *peft]:
        for mode in CHECKPOINTING_MODES if kind != PEFT else ("none", "full"):
            yield "memory", f"{kind}, {mode}", partial(bench.memory, kind, mode)
    for kind in [*methods, BASE]:
        for training in (True, False) if kind != BASE else (False,):
            yield "trace", f"{kind}, {'step' if training else 'decode'}", partial(bench.trace, kind, training)


def line(part: str, name: str, result: dict[str, Any]) -> str:
    """Describe a result in a line; of a trace, in a line for each kernel too."""
    words = [f"{part}, {name}:"]
    if "seconds" in result:
        seconds = result["seconds"]
        words.append(f"{1000 * (statistics.median(seconds) if isinstance(seconds, list) else seconds):,.2f} ms,")
    if "tokens_per_second" in result:
        words.append(f"{result['tokens_per_second']:,.0f} tokens/s, {result['share_of_flops']:.0%} of the FLOP/s,")
    if "share_of_bandwidth" in result:
        words.append(f"{result['share_of_bandwidth']:.0%} of the bandwidth,")
    if "peak_memory_bytes" in result:
        words.append(f"peak {figure(result['peak_memory_bytes'] / 2**30)} GiB")
    if "top" in result:
        words.append(f"{result['kernels']} kernels that take {1000 * result['device_seconds']:,.2f} ms")
        words += [f"\n  {1000 * k['seconds']:9.3f} ms {k['count']:6d} x {k['name']}" for k in result["top"]]
    return " ".join(words)


def run(flags: Flags, device: torch.device) -> dict[str, Any]:
    """Measure all parts that are asked for, as long as there is time -> all results, with "failed" and "left_out"."""
    begin, bench = time.monotonic(), Bench(flags, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    task = {"shape": flags.shape, "device": name, "torch": torch.__version__, "machine": bench.machine._asdict()}
    results: dict[str, Any] = {"task": task, "failed": {}, "left_out": []}
    print(f"{flags.shape} on {name}, torch {torch.__version__}; {bench.machine}", flush=True)
    for part, name, work in measurements(bench):
        if part not in flags.parts.split(","):
            continue
        key = f"{part}, {name}"
        try:
            if time.monotonic() - begin > 60 * flags.minutes:
                results["left_out"].append(key)
            else:
                results[key] = work()
                print(line(part, name, results[key]), flush=True)
        except Exception as error:  # whatever it is, the other results are still wanted
            traceback.print_exc()
            results["failed"][key] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{key} failed: {results['failed'][key]}", file=sys.stderr, flush=True)
        gc.collect()  # a model's modules refer to one another in circles
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if flags.json:
            write_json(Path(flags.json), results)
    if results["left_out"]:
        print(f"left out after {flags.minutes:g} minutes: {'; '.join(results['left_out'])}", flush=True)
    return results


def main(argv: list[str] | None = None) -> None:
    flags = parse(Flags, argv, prog="python -m benchmarks.gpu", description=__doc__)
    with cli_errors():
        results = run(flags, get_device(flags.device))
    if results["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
