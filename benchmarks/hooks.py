"""What it costs to count what the routers do (`python -m inspection gates`) while a model generates.

    python -m benchmarks.hooks [--methods soft_moa,sparse_moa,adamole] [--data_path gsm8k/test.json] [--repeats 6]

The same prompts are answered with and without `inspection.running_stats.RouterStatistics` recording, in turn.
Adapters as they start. "x without": the median of the ratios of what was measured next to each other.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.flags import OnBase, Timed, methods_named, require_positive
from benchmarks.generation import prompts_of
from benchmarks.generators import Kind, Task, ours
from benchmarks.measure import CPU, figure, in_turn, ratio, table
from benchmarks.models import config_of
from cli import cli_errors, flag, parse
from demo.model import ensure_model
from demo.problems import ensure_data
from inspection.running_stats import RouterStatistics
from llama import Llama
from llama.checkpoint import load_params_and_tokenizer
from llama.distributed import bf16_is_fast
from moa.files import write_json


@dataclass(frozen=True)
class Flags(Timed, OnBase):
    data_path: str | None = flag(None, help="test rows; default: the demo's")
    methods: str = flag("soft_moa,sparse_moa,adamole", help="methods with a router, with commas")
    prompts: int = flag(16, help="prompts, answered at once")
    new_tokens: int = flag(64, help="tokens of each answer")
    repeats: int = flag(6, help="times that all prompts are answered in each way")

    def __post_init__(self):
        require_positive(self, "prompts", "new_tokens", "repeats", "threads")
        methods_named(self.methods)


def measure(llm: Llama, task: Task, repeats: int) -> dict[str, list[float]]:
    """Seconds of all answers, with and without the recorder. ValueError for a method without a router."""

    def without(_: object) -> None:
        llm.generate(task.prompts, task.max_gen_len, task.min_new_tokens)

    def counted(_: object) -> None:
        found = RouterStatistics(llm.model)
        with found.recorder():
            without(None)
        found.reduce()

    counted(None)  # the first pass is slower
    return in_turn({"with": counted, "without": without}, range(repeats))


def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, prog="python -m benchmarks.hooks", description=__doc__)
    with cli_errors():
        torch.set_num_threads(flags.threads)
        ckpt_dir = flags.ckpt_dir or str(ensure_model())
        prompts = prompts_of(flags.data_path or str(ensure_data()[1]), ckpt_dir, flags.prompts)
        task = Task(prompts, flags.new_tokens, flags.new_tokens, len(prompts))
        found, n_layers = {}, load_params_and_tokenizer(ckpt_dir)[0].n_layers
        for method in methods_named(flags.methods):
            llm = ours(Kind(method, config_of(method, n_layers)), ckpt_dir, bf16_is_fast(CPU), task)
            found[method] = measure(llm, task, flags.repeats)
        print(f"{len(prompts)} prompts, new tokens: {flags.new_tokens}; {flags.threads} threads\n")
        rows = [
            [
                method,
                *(figure(statistics.median(of[way])) for way in ("without", "with")),
                figure(ratio(of["with"], of["without"])),
            ]
            for method, of in found.items()
        ]
        print(table(["method", "seconds without", "with", "x without"], rows))
        if flags.json:
            write_json(Path(flags.json), {"threads": flags.threads, "seconds": found})


if __name__ == "__main__":
    main(sys.argv[1:])
