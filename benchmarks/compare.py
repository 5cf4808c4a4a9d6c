"""Training steps or generation of this checkout beside another one's, in alternating runs.

    python -m benchmarks.compare --base DIR --what step [--methods soft_moa,lora] [--rounds 5] [--json FILE]
    python -m benchmarks.compare --base DIR --what generation [--prompts 1 --compile]

Each run is a process of its own in its checkout's folder, in the order ABBA, so that what else the machine does falls
on both. Both get the same base, rows and seed, and only what their users have is used. Only ratios mean anything: of
the medians on a quiet machine, of the fastest times and of the processes' CPU time, start included, on a busy one.
--base . shows the noise.

step          `finetune.py`: "seconds" in log.jsonl without the first two steps, which warm up, and the last
              "peak_memory_bytes".
generation    `generate.py`'s model: a first call, which may prepack weights, then --max_steps calls like it, and the
              process's largest resident set. Adapters are made by the other checkout, one step of `finetune.py`.
              "same tokens": whether both checkouts answer alike.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import common
from benchmarks.common import REPO, Figures, median, number, run_process
from benchmarks.generation import prompts_of
from cli import cli_errors, flag, parse
from moa.files import write_json

WARM_UP = 2  # steps
OTHER, THIS = "base", "this"
SAME = {"step": "largest difference of a loss", "generation": "same tokens"}  # what `same_task` tells
# What a process runs in either checkout; its argument is a task in JSON.
GENERATE = """
import hashlib, importlib, json, resource, sys, time
for module, function in (("machine", "prepare_libraries"), ("machine", "prepare_cpu"), ("cpu", "prepare_cpu")):
    try:
        getattr(importlib.import_module(f"llama.{module}"), function)()
        break
    except (ImportError, AttributeError):  # the names of earlier revisions
        pass
from llama import Llama
task = json.load(open(sys.argv[1]))
prompts, n = task["prompts"], task["new_tokens"]
more = {"max_batch_size": len(prompts), "bf16": task["bf16"]} | json.loads(sys.argv[2])
llm = Llama.build(*task["paths"], max_seq_len=task["max_seq_len"], **more)
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
    what: str = flag(help="what is measured", choices=tuple(SAME))
    methods: str = flag("soft_moa,lora", help="methods, with commas, or all")
    rounds: int = flag(5, least=1, help="runs of each checkout and method")
    max_steps: int | None = flag(None, least=1, help="steps, or calls after the first, of a run; default: 8, or 2")
    batch_size: int = flag(4, least=1, help="step: rows of a step")
    prompts: int = flag(16, least=1, help="generation: prompts, answered at once")
    new_tokens: int = flag(64, least=1, help="generation: tokens of each answer")
    compile: bool = flag(False, help="generation: as of generate.py, in this checkout alone")

    def __post_init__(self):
        common.methods_named(self.methods)
        if not Path(self.base, "finetune.py").is_file():
            raise ValueError(f"--base {self.base}: no finetune.py there, expected a checkout of this project")
        if self.what == "step" and self.max_steps is not None and self.max_steps <= WARM_UP:
            raise ValueError(f"--max_steps must be above {WARM_UP}, the steps that warm up, not {self.max_steps}")


def finetune(flags: Flags, tree: Path, method: str, steps: int, folder: Path) -> None:
    """Train in a folder, by a checkout's own `finetune.py`."""
    words = ["--method", method, "--ckpt_dir", flags.base_folder(), "--data_path", flags.rows_file()]
    words += ["--max_steps", steps, "--batch_size", flags.batch_size, "--bf16", flags.use_bf16()]
    run_process(["finetune.py", *words, "--device", "cpu", "--output_dir", folder, "--overwrite"], flags.threads, tree)


def run_steps(flags: Flags, method: str, scratch: Path, tree: Path) -> Figures:
    """Measure the training steps of one run of a checkout."""
    finetune(flags, tree, method, flags.max_steps or 8, scratch / "run")
    entries = [json.loads(line) for line in (scratch / "run/log.jsonl").read_text().splitlines()]
    return {
        "seconds": [entry["seconds"] for entry in entries[WARM_UP:]],
        "peak_memory_bytes": entries[-1]["peak_memory_bytes"],
        "tokens": [entry["tokens"] for entry in entries],
        "losses": [entry["loss"] for entry in entries],
    }


def generation_task(flags: Flags, method: str, scratch: Path, tree: Path) -> Path:
    """Write what GENERATE is to do -> its file. The adapter is one that this checkout trains for a step."""
    finetune(flags, tree, method, 1, scratch / method)
    run_process(["extract_adapter.py", scratch / method / "checkpoint-1.pth"], flags.threads, tree)
    prompts = prompts_of(flags.rows_file(), flags.base_folder(), flags.prompts)
    task = {"paths": [flags.base_folder(), str(scratch / method / "adapter.pth")], "bf16": flags.use_bf16()}
    task |= {"prompts": prompts, "max_seq_len": max(map(len, prompts)) + flags.new_tokens}
    write_json(scratch / "task.json", task | {"new_tokens": flags.new_tokens, "calls": flags.max_steps or 2})
    return scratch / "task.json"


def run_generation(flags: Flags, task: Path, tree: Path) -> Figures:
    """Measure calls of generation in one process of a checkout."""
    more = {"compile": True} if flags.compile and tree == REPO else {}
    return json.loads(run_process(["-c", GENERATE, task, json.dumps(more)], flags.threads, tree).splitlines()[-1])


def same_task(what: str, runs: dict[str, list[Figures]]) -> str:
    """Say how far both did the same. ValueError where they trained on different rows."""
    if what == "generation":
        return "yes" if len({run["answers"] for result in runs.values() for run in result}) == 1 else "no"
    other, this = runs[OTHER][0], runs[THIS][0]
    if other["tokens"] != this["tokens"]:
        raise ValueError(f"the checkouts trained on different rows: {other['tokens']} and {this['tokens']} tokens")
    return f"{max(abs(a - b) for a, b in zip(other['losses'], this['losses'], strict=True)):.4f}"


def summary(runs: dict[str, list[Figures]]) -> Figures:
    """Return the medians and fastest times of both, and the ratios of this checkout's to the other's."""
    figures: Figures = {}
    for name in ("seconds", "fastest", "cpu_seconds", "peak_memory_bytes"):
        for tree, results in runs.items():
            fastest = min(min(result["seconds"]) for result in results)
            figures[f"{tree}_{name}"] = fastest if name == "fastest" else median(results, name)
        figures[f"{name}_ratio"] = figures[f"{THIS}_{name}"] / figures[f"{OTHER}_{name}"]
    return figures


def report(flags: Flags, results: dict[str, Figures]) -> None:
    """Print the table, a row a method."""

    columns = [
        ("method", lambda figures: figures["method"]),
        ("base, s", number("base_seconds")),
        ("this, s", number("this_seconds")),
        ("time, x", number("seconds_ratio")),
        ("fastest, x", number("fastest_ratio")),
        ("CPU, x", number("cpu_seconds_ratio")),
        ("base, GB", number("base_peak_memory_bytes", 2, 1e9)),
        ("this, GB", number("this_peak_memory_bytes", 2, 1e9)),
        ("memory, x", number("peak_memory_bytes_ratio")),
        (SAME[flags.what], lambda figures: figures["same"]),
    ]
    print(f"{flags.what}, {flags.conditions()}\n")
    print(common.table(columns, [{"method": method} | figures for method, figures in results.items()]))


def main(argv: Sequence[str] | None = None) -> None:
    flags = parse(Flags, argv, prog="python -m benchmarks.compare", description=__doc__)
    trees = {OTHER: Path(flags.base).resolve(), THIS: REPO}
    results: dict[str, Figures] = {}
    with cli_errors(), tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for method in common.methods_named(flags.methods):
            print(method, file=sys.stderr, flush=True)
            work = partial(run_steps, flags, method, scratch)
            if flags.what == "generation":
                work = partial(run_generation, flags, generation_task(flags, method, scratch, trees[OTHER]))
            works = {name: partial(work, tree) for name, tree in trees.items()}
            runs = common.measure_in_turn(works, flags.rounds)
            results[method] = summary(runs) | {"same": same_task(flags.what, runs), "runs": runs}
            if flags.json:
                task = {"what": flags.what, "base": flags.base, "bf16": flags.use_bf16(), "threads": flags.threads}
                write_json(Path(flags.json), {"task": task, "methods": results})
        report(flags, results)


if __name__ == "__main__":
    main()
