"""Training steps or generation of this checkout beside another one's, in alternating runs.

    python -m benchmarks.compare --base DIR --what step [--methods soft_moa,lora] [--rounds 5] [--json FILE]
    python -m benchmarks.compare --base DIR --what generation

Each run is a process of its own in its checkout's folder, in the order ABBA, so that what else the machine does falls
on both. Both get the same base, rows and seed, and only what their users have is used. Only ratios mean anything: of
the medians on a quiet machine, of the fastest times and of the processes' CPU time, start included, on a busy one.
--this DIR with the same DIR as --base shows the noise.

step          `finetune.py`: "seconds" in log.jsonl without the first two steps, which warm up, and the last
              "peak_memory_bytes".
generation    `Llama.build` and `Llama.generate`: a first call, which may prepack weights, then --max_steps calls like
              it, and the process's largest resident set. Adapters are made by the other checkout, one step of
              `finetune.py`. "same tokens": whether both checkouts answer alike.
"""

import json
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import REPO, figure, median_seconds, peak_bytes, run_process
from cli import cli_errors, flag, parse
from moa.files import write_json

WARM_UP = 2  # steps
OTHER, THIS = "base", "this"
# What a process runs in either checkout; its argument is a task in JSON.
GENERATE = """
import hashlib, json, resource, sys, time
try:
    from llama.machine import prepare_cpu
except ImportError:
    from llama.cpu import prepare_cpu  # until revision 79f64d3
prepare_cpu()
from llama import Llama
task = json.load(open(sys.argv[1]))
prompts, n = task["prompts"], task["new_tokens"]
length = max(map(len, prompts)) + n
llm = Llama.build(
    task["ckpt_dir"], task["adapter_path"], max_seq_len=length, max_batch_size=len(prompts), bf16=task["bf16"]
)
seconds = []
for _ in range(1 + task["calls"]):
    begin = time.perf_counter()
    answers = llm.generate(prompts, n, n)
    seconds.append(time.perf_counter() - begin)
unit = 1 if sys.platform == "darwin" else 1024
print(json.dumps({
    "first": seconds[0], "seconds": seconds[1:], "answers": hashlib.sha256(str(answers).encode()).hexdigest(),
    "peak_memory_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
}))
"""


@dataclass(frozen=True)
class Flags(common.SideBySide):
    base: str = flag(help="another checkout of this project")
    this: str = flag(
        str(REPO), help="the checkout beside it; default: the one this command stands in. DIR twice: noise"
    )
    what: str = flag(help="what is measured", choices=("step", "generation"))
    methods: str = flag("soft_moa,lora", help="methods, with commas, or all")
    rounds: int = flag(5, help="runs of each checkout and method")
    max_steps: int | None = flag(None, help="steps, or calls after the first, of a run; default: 8, or 2")
    batch_size: int = flag(4, help="step: rows of a step")
    prompts: int = flag(16, help="generation: prompts, answered at once")
    new_tokens: int = flag(64, help="generation: tokens of each answer")

    def __post_init__(self):
        common.require_positive(self, "rounds", "max_steps", "batch_size", "prompts", "new_tokens", "threads")
        common.methods_named(self.methods)
        for name, folder in (("base", self.base), ("this", self.this or REPO)):
            if not Path(folder, "finetune.py").is_file():
                raise ValueError(f"--{name} {folder}: no finetune.py there, expected a checkout of this project")
        if self.what == "step" and self.max_steps is not None and self.max_steps <= WARM_UP:
            raise ValueError(f"--max_steps must be above {WARM_UP}, the steps that warm up, not {self.max_steps}")


@dataclass(frozen=True)
class Task:
    """What both checkouts do. Paths are absolute: each process works in its own checkout."""

    flags: Flags
    ckpt_dir: str
    data_path: str
    bf16: bool
    scratch: Path

    def finetune(self, tree: Path, method: str, steps: int, folder: Path) -> None:
        """Train in a folder, by a checkout's own `finetune.py`."""
        words = ["finetune.py", "--method", method, "--ckpt_dir", self.ckpt_dir, "--data_path", self.data_path]
        words += ["--max_steps", steps, "--batch_size", self.flags.batch_size, "--bf16", self.bf16]
        words += ["--device", "cpu", "--output_dir", folder, "--overwrite"]
        run_process(words, self.flags.threads, tree)

    def step(self, method: str, tree: Path) -> dict[str, Any]:
        """Measure training steps of one run."""
        folder = self.scratch / "run"
        self.finetune(tree, method, self.flags.max_steps or 8, folder)
        entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return {
            "seconds": [entry["seconds"] for entry in entries[WARM_UP:]],
            "peak_memory_bytes": entries[-1]["peak_memory_bytes"],
            "tokens": [entry["tokens"] for entry in entries],
            "losses": [entry["loss"] for entry in entries],
        }

    def adapter(self, tree: Path, method: str) -> str:
        """Return the path of an adapter that a checkout has trained for one step."""
        folder = self.scratch / method
        self.finetune(tree, method, 1, folder)
        run_process(["extract_adapter.py", folder / "checkpoint-1.pth"], self.flags.threads, tree)
        return str(folder / "adapter.pth")

    def generation(self, adapter_path: str, prompts: list[list[int]], tree: Path) -> dict[str, Any]:
        """Measure calls of generation in one process."""
        file = self.scratch / "task.json"
        task = {"ckpt_dir": self.ckpt_dir, "adapter_path": adapter_path, "prompts": prompts, "bf16": self.bf16}
        write_json(file, task | {"new_tokens": self.flags.new_tokens, "calls": self.flags.max_steps or 2})
        return json.loads(run_process(["-c", GENERATE, file], self.flags.threads, tree).splitlines()[-1])


def with_cpu_seconds(work: Callable[[Path], dict[str, Any]], tree: Path) -> dict[str, Any]:
    """Do a work and add the CPU time that its process has taken, from start to end."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = work(tree)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return result | {"cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def works_of(task: Task, method: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return a run of each checkout, for `measure_in_turn`."""
    trees = {OTHER: Path(task.flags.base).resolve(), THIS: Path(task.flags.this or REPO).resolve()}
    work: Callable[[Path], dict[str, Any]] = partial(task.step, method)
    if task.flags.what == "generation":
        prompts = common.prompts_of(task.data_path, task.ckpt_dir, task.flags.prompts)
        work = partial(task.generation, task.adapter(trees[OTHER], method), prompts)
    return {name: partial(with_cpu_seconds, work, tree) for name, tree in trees.items()}


def same_task(what: str, runs: dict[str, list[dict[str, Any]]]) -> str:
    """Say how far both did the same. ValueError where they trained on different rows."""
    if what == "generation":
        return "yes" if len({run["answers"] for result in runs.values() for run in result}) == 1 else "no"
    other, this = runs[OTHER][0], runs[THIS][0]
    if other["tokens"] != this["tokens"]:
        raise ValueError(f"the checkouts trained on different rows: {other['tokens']} and {this['tokens']} tokens")
    return figure(max(abs(a - b) for a, b in zip(other["losses"], this["losses"], strict=True)), 4)


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Return the medians and fastest times of both, and the ratios of this checkout's to the other's.

    round_ratio_min, round_ratio_max: the range of the ratios of runs next to each other.
    """
    other, this = runs[OTHER], runs[THIS]
    paired = [median_seconds([b]) / median_seconds([a]) for a, b in zip(other, this, strict=True)]
    figures = {"round_ratio_min": min(paired), "round_ratio_max": max(paired)}
    measures = {
        "seconds": median_seconds,
        "fastest": lambda results: min(min(result["seconds"]) for result in results),
        "cpu_seconds": lambda results: statistics.median(result["cpu_seconds"] for result in results),
        "peak_memory_bytes": peak_bytes,
    }
    for name, measure in measures.items():
        values = measure(other), measure(this)
        figures |= {f"base_{name}": values[0], f"this_{name}": values[1], f"{name}_ratio": values[1] / values[0]}
    return figures


def row_of(method: str, figures: dict[str, Any]) -> list[str]:
    """Return a method's row of the table."""
    runs, f = figures["runs"], figures
    times = [" ".join(figure(statistics.median(run["seconds"])) for run in runs[name]) for name in (OTHER, THIS)]
    ratios = [figure(f["seconds_ratio"]), f"{figure(f['round_ratio_min'])} to {figure(f['round_ratio_max'])}"]
    memory = [figure(f[f"{name}_peak_memory_bytes"] / 1e9) for name in (OTHER, THIS)]
    return [
        method,
        *times,
        *ratios,
        *(figure(f[f"{name}_ratio"]) for name in ("fastest", "cpu_seconds")),
        *memory,
        figure(f["peak_memory_bytes_ratio"]),
        f["same"],
    ]


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(Flags, argv, prog="python -m benchmarks.compare", description=__doc__)
    with cli_errors(), tempfile.TemporaryDirectory() as scratch:
        bf16 = flags.use_bf16()
        task = Task(flags, flags.base_folder(), flags.rows_file(), bf16, Path(scratch))
        settings = {"what": flags.what, "base": flags.base, "bf16": bf16, "threads": flags.threads}
        results: dict[str, Any] = {}
        for method in common.methods_named(flags.methods):
            print(method, file=sys.stderr, flush=True)
            runs = common.measure_in_turn(works_of(task, method), flags.rounds)
            results[method] = summary(runs) | {"same": same_task(flags.what, runs), "runs": runs}
            if flags.json:
                write_json(Path(flags.json), {"task": settings, "methods": results})
        print(f"{flags.what}, {'bf16' if bf16 else 'fp32'}, {flags.threads} threads, {flags.rounds} rounds\n")
        heads = ["method", "runs of base, s", "runs of this, s", "time, x", "by rounds", "fastest, x", "CPU, x"]
        heads += ["base, GB", "this, GB", "memory, x"]
        heads.append("same tokens" if flags.what == "generation" else "largest difference of a loss")
        print(common.table(heads, [row_of(method, figures) for method, figures in results.items()]))


if __name__ == "__main__":
    main(sys.argv[1:])
