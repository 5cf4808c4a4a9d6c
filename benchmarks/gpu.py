"""Whether all is right on a GPU, and how fast: random weights in a published model's shape, so no file is needed.

    python -m benchmarks.gpu [--shape 8B] [--methods soft_moa] [--minutes 7] [--json gpu.json]
    python -m benchmarks.gpu --shape tiny --device cpu          to try the command where there is no GPU

Parts, in this order (--parts names some of them, with commas):

machine     measured rates of products and of memory, which the shares below are of
golden      small models in float32: logits, loss and greedy tokens beside the authors', gradients beside a CPU's
bf16        their loss and gradients with the base in bf16, on rows of different lengths, beside a CPU's in float32
recorded    their answers, greedy and sampled, by eager and by recorded decode steps (CUDA graphs), beside a CPU's
step        real tokens/s of training steps of --rows rows with GSM8K's lengths, peak memory, and the share of the rate
            of products that the step's FLOPs make up
decode      milliseconds of a decode step at --decode_rows rows, without and with CUDA graphs, and the share of the
            bandwidth that reading weights, keys and values makes up; the bare base too
memory      peak memory of a step of rows of 300 tokens, by --activation_checkpointing, beside the estimate of it
trace       kernels of a training step and of a decode step: how many, and those that take most time
peers       step and decode of transformers and PEFT's LoRA, where they are installed

Each result is printed, and the JSON file written anew, as soon as it is there. After --minutes no further one is begun.
One that fails is named and left out, and the exit status is then 1.
"""

import gc
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import common, gpu_checks, models, peers
from benchmarks.common import BASE, PEERS, PEFT, SHAPES, TRANSFORMERS, Figures, timed
from cli import cli_errors, flag, parse
from llama import ModelArgs, Transformer
from llama.accelerate import fuse_small_operations
from llama.data import IGNORE_INDEX, Example
from llama.distributed import bf16_is_fast, get_device
from moa.files import write_json
from training.config import CHECKPOINTING_MODES
from training.estimate import longest_batch, memory_by_mode, meta_model
from training.loop import peak_memory

CHECKS = {"golden": gpu_checks.golden, "bf16": gpu_checks.bf16, "recorded": gpu_checks.recorded}
PARTS = ("machine", *CHECKS, "step", "decode", "memory", "trace", "peers")
LONGEST = 300
EARLY = 32  # decode steps of the shorter of two runs; a longer one takes as many more
TRACED = 8  # decode steps of a trace; a trace of training has half of them
PROMPTS, ANSWERS = (65, 118), (49, 149)  # tokens of eight in ten of GSM8K's training rows


@dataclass(frozen=True)
class Flags:
    shape: str = flag("8B", help="shape of the model", choices=tuple(SHAPES))
    methods: str = flag("soft_moa", help="methods to measure, with commas, or all")
    parts: str = flag(",".join(PARTS), help="what to measure, with commas")
    minutes: float = flag(7.0, help="begin nothing after so many minutes")
    compile: bool = flag(False, help="fuse small operations of training steps with torch.compile")
    device: str = flag("auto", help="auto, cpu, cuda or cuda:N")
    rows: int = flag(8, least=1, help="rows of a training step")
    decode_rows: str = flag("1,16,64", help="rows of a decode step, with commas")
    context: int = flag(96, least=1, help="tokens of each prompt of those")
    repeats: int = flag(3, least=1, help="measured steps, and decode runs, of each")
    json: str | None = flag(None, help="write the figures to this file too")

    def __post_init__(self):
        common.methods_named(self.methods)
        if unknown := set(self.parts.split(",")) - set(PARTS):
            raise ValueError(f"--parts: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
        if not all(word.isdecimal() and int(word) for word in self.decode_rows.split(",")):
            raise ValueError(f"--decode_rows: expected whole numbers above 0, with commas, got {self.decode_rows!r}")


def random_rows(n: int, vocab_size: int, full: bool = False) -> list[Example]:
    """Draw rows as long as GSM8K's, or, with `full`, the longest of a run, half of them an answer."""
    generator, rows = random.Random(0), []
    for length in longest_batch(n, LONGEST):
        prompt, answer = generator.randint(*PROMPTS), generator.randint(*ANSWERS)
        if full:
            prompt, answer = length // 2, length - length // 2
        tokens = [generator.randrange(1, vocab_size) for _ in range(prompt + answer)]
        rows.append(Example(tokens, [IGNORE_INDEX] * prompt + tokens[prompt:], prompt))
    return rows


class Bench:
    """One run: the weights, which all models share, and the measurements on them."""

    def __init__(self, flags: Flags, device: torch.device):
        self.flags, self.device, self.args = flags, device, ModelArgs(**SHAPES[flags.shape])
        self.bf16 = bf16_is_fast(device)

    @cached_property
    def machine(self) -> models.Machine:
        return models.measure_machine(self.device)

    @cached_property
    def base(self) -> dict[str, Tensor]:
        return models.random_base(self.args, torch.bfloat16 if self.bf16 else torch.float32, self.device)

    def model(self, kind: str) -> nn.Module:
        """Build a method's model, the bare base, transformers' model, or that with PEFT's LoRA."""
        if kind not in PEERS:
            return models.model_on(self.args, self.base, models.config_of(kind, self.args.n_layers))
        model = peers.transformers_on(self.args, self.base)
        return peers.new_lora(model) if kind == PEFT else model

    def shape(self, kind: str) -> Transformer:
        """Build, without weights, the model of ours that does the same work."""
        kind = {PEFT: "lora", TRANSFORMERS: BASE}.get(kind, kind)
        return meta_model(self.args, models.config_of(kind, self.args.n_layers), self.bf16)

    def peak_bytes(self, kind: str) -> int:
        """Return the largest memory, less the weights that a peer's model has twice beside ours."""
        return peak_memory(self.device) - peers.copied_bytes(self.base) * (kind in PEERS)

    def trainer(self, kind: str, n_steps: int, mode: str = "none", full: bool = False) -> models.Trainer:
        """Return what trains a kind of model on random rows, enough for so many steps."""
        model, rows = self.model(kind), self.flags.rows
        examples = random_rows(rows * n_steps, self.args.vocab_size, full)
        if kind == PEFT:
            return peers.trainer(model, examples, rows, self.device)
        model.activation_checkpointing = mode
        return models.trainer(model, examples, rows)

    def step(self, kind: str) -> Figures:
        """Measure training steps, after a first one."""
        n = self.flags.repeats
        train = self.trainer(kind, 1 + n)
        train(1)
        seconds, entries = timed(lambda: train(n), self.device)
        memory = self.peak_bytes(kind)
        tokens, labels = (sum(entry[name] for entry in entries) for name in ("tokens", "label_tokens"))
        flops = models.training_flops(self.shape(kind), tokens, labels)
        return {
            "seconds": seconds / n,
            "tokens_per_second": tokens / seconds,
            "share_of_flops": flops / seconds / self.machine.flops,
            "peak_memory_bytes": memory,
        }

    def memory(self, kind: str, mode: str) -> Figures:
        """Measure the memory of a step of the longest rows, beside the estimate that a run decides by."""
        self.trainer(kind, 1, mode, full=True)(1)
        lengths = longest_batch(self.flags.rows, LONGEST)
        estimate = memory_by_mode(self.shape(kind), lengths, self.device)[mode]["total"]
        return {"peak_memory_bytes": self.peak_bytes(kind), "estimated_bytes": estimate}

    def answerer(self, kind: str, n_rows: int, graphs: bool, context: int) -> Callable[[int], object]:
        """Return what answers so many prompts by a number of tokens each."""
        model = self.model(kind)
        prompts = [row.tokens[:context] for row in random_rows(n_rows, self.args.vocab_size, full=True)]
        if kind in PEERS:
            return lambda n: peers.padded_answers(model, [0], prompts, n, n, n_rows, self.device)
        llm = models.llm_on(model, LONGEST, n_rows, graphs)
        return lambda n: llm.generate(prompts, n, n)

    def decode(self, kind: str, n_rows: int, graphs: bool) -> Figures:
        """Measure a decode step: what a run of 2 * EARLY tokens takes longer than one of EARLY, by their difference."""
        context = self.flags.context
        answer, seconds = self.answerer(kind, n_rows, graphs, context), []
        answer(2 * EARLY)
        for _ in range(self.flags.repeats):
            longer, shorter = (timed(lambda n=n: answer(n), self.device)[0] for n in (2 * EARLY, EARLY))
            seconds.append((longer - shorter) / EARLY)
        memory, step = self.peak_bytes(kind), statistics.median(seconds)
        step_bytes = models.decode_bytes(self.shape(kind), n_rows, context + 3 * EARLY // 2)
        share = step_bytes / step / self.machine.bandwidth
        return {"seconds": step, "share_of_bandwidth": share, "peak_memory_bytes": memory}

    def trace(self, kind: str, training: bool) -> Figures:
        """Profile training steps, or decode steps of one row after a prompt of one token."""
        n = TRACED // 2 if training else TRACED
        work = self.trainer(kind, 1 + n) if training else self.answerer(kind, 1, False, 1)
        work(1 if training else n)
        activity = torch.profiler.ProfilerActivity
        activities = [activity.CPU] + [activity.CUDA] * (self.device.type == "cuda")
        with torch.profiler.profile(activities=activities) as profiler:
            seconds = timed(lambda: work(n), self.device)[0]
        events, kernels = profiler.key_averages(), []
        on_gpu = [event.device_type == torch.autograd.DeviceType.CUDA for event in events]
        for event, is_kernel in zip(events, on_gpu, strict=True):
            taken = event.self_device_time_total if is_kernel else event.self_cpu_time_total  # microseconds
            # Without a GPU, or where its kernels cannot be traced, operations are counted
            if is_kernel == any(on_gpu) and taken > 0 and not getattr(event, "is_user_annotation", False):
                kernels.append({"name": event.key[:90], "seconds": taken / 1e6 / n, "count": event.count / n})
        kernels.sort(key=lambda kernel: -kernel["seconds"])
        total, busy = (sum(kernel[name] for kernel in kernels) for name in ("count", "seconds"))
        return {"seconds": seconds / n, "kernels": total, "device_seconds": busy, "top": kernels[:15]}


def measurements(bench: Bench) -> Iterator[tuple[str, str, Callable[[], Figures]]]:
    """Yield (part, name, work) of all that can be measured, the most wanted first."""
    flags, graphs = bench.flags, (False, True) if bench.device.type == "cuda" else (False,)
    methods = common.methods_named(flags.methods)
    decode_rows = list(map(int, flags.decode_rows.split(",")))
    yield "machine", "machine", lambda: bench.machine._asdict()
    for part, check in CHECKS.items():
        for model in gpu_checks.MODELS:
            if not (part == "bf16" and model == gpu_checks.BASE_ALONE):  # which has no gradients
                yield part, f"{part}, {model}", partial(check, model, bench.device)
    for kind in methods:
        yield "step", f"step, {kind}", partial(bench.step, kind)
    for n_rows in decode_rows:
        for kind in [*methods, BASE]:
            for graph in graphs:
                name = f"decode, {kind}, {n_rows} rows" + ", graphs" * graph
                yield "decode", name, partial(bench.decode, kind, n_rows, graph)
    for kind in methods:
        for mode in CHECKPOINTING_MODES:
            yield "memory", f"memory, {kind}, {mode}", partial(bench.memory, kind, mode)
    for kind in [*methods, BASE]:
        for training in (True, False) if kind != BASE else (False,):
            yield "trace", f"trace, {kind}, {'step' if training else 'decode'}", partial(bench.trace, kind, training)
    installed = [kind for kind, package in zip(PEERS, ("transformers", "peft"), strict=True) if find_spec(package)]
    if PEFT in installed:
        yield "peers", f"step, {PEFT}", partial(bench.step, PEFT)
    for n_rows in decode_rows:
        for kind in installed:
            yield "peers", f"decode, {kind}, {n_rows} rows", partial(bench.decode, kind, n_rows, False)


def line(figures: Figures) -> str:
    """Return a result as a line, and the kernels that take most time below it."""
    top = [f"\n  {1000 * k['seconds']:9.3f} ms {k['count']:6.0f} x {k['name']}" for k in figures.get("top", [])]
    numbers = [
        f"{name} {value:,.4g}" if isinstance(value, float | int) else f"{name} {value}"
        for name, value in figures.items()
        if name != "top"
    ]
    return ", ".join(numbers) + "".join(top)


def run(flags: Flags, device: torch.device) -> Figures:
    """Measure the parts that were chosen, as long as there is time -> all results, with "failed" and "left_out"."""
    begin, bench = time.monotonic(), Bench(flags, device)
    if flags.compile:
        fuse_small_operations(device)
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else "cpu"
    results: Figures = {"task": {"shape": flags.shape, "device": name, "torch": torch.__version__}}
    results |= {"failed": {}, "left_out": []}
    print(f"{flags.shape} on {name}, torch {torch.__version__}", flush=True)
    for part, key, work in measurements(bench):
        if part not in flags.parts.split(","):
            continue
        try:
            if time.monotonic() - begin > 60 * flags.minutes:
                results["left_out"].append(key)
                continue
            gc.collect()  # a model's modules refer to one another in circles
            if gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            results[key] = work()
            print(f"{key}: {line(results[key])}", flush=True)
        except Exception as error:  # whatever it is, the other results are still wanted
            traceback.print_exc()
            results["failed"][key] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{key} failed: {results['failed'][key]}", file=sys.stderr, flush=True)
        finally:
            if flags.json:
                write_json(Path(flags.json), results)
    if results["left_out"]:
        print(f"left out after {flags.minutes:g} minutes: {'; '.join(results['left_out'])}", flush=True)
    return results


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(Flags, argv, prog="python -m benchmarks.gpu", description=__doc__)
    with cli_errors():
        results = run(flags, get_device(flags.device))
    if results["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
