"""How long a model takes to load, and what it takes to hold: ours, and transformers' `from_pretrained`, side by side.

    python -m benchmarks.load [--ckpt_dir DIR] [--repeats 3] [--json FILE]

Each time a process of its own, in turn, with the files in the system's cache and the libraries loaded before. Timed:
`Llama.build` from Meta's files, and `LlamaForCausalLM.from_pretrained` from safetensors with the same weights in the
same type (written to a temporary folder first); then the logits of one prompt, which read every weight. Memory is what
the process has more than before: all that is resident, and of it what is its own; the rest are pages of files, which
the system may take back and which several processes share. "floor": the file's bytes, read once from memory at this
machine's rate.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.flags import OnBase, Timed, require_positive
from benchmarks.machine import measure_machine
from benchmarks.measure import CPU, figure, own_process, ratio, table, timed, turns
from benchmarks.peers import transformers_model
from cli import cli_errors, flag, parse
from demo.model import ensure_model
from llama import Llama
from llama.checkpoint import read_base, shard_files
from llama.distributed import bf16_is_fast
from moa.files import write_json

OURS, TRANSFORMERS = "ours", "transformers"
N_TOKENS = 16  # of the prompt


@dataclass(frozen=True)
class Flags(Timed, OnBase):
    repeats: int = flag(3, help="times that each is loaded")
    only: str | None = flag(
        None, help="only this one, in this process; prints its figures", choices=(OURS, TRANSFORMERS)
    )
    hf_dir: str | None = flag(None, help="with --only transformers: the folder to load")

    def __post_init__(self):
        require_positive(self, "repeats", "threads")
        if (self.only == TRANSFORMERS) != (self.hf_dir is not None):
            raise ValueError(f"--hf_dir belongs to --only {TRANSFORMERS}")


def resident() -> dict[str, int]:
    """Bytes that this process holds: all, and its own (not pages of files). OSError where the system does not tell."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {
        name: int(value.split()[0])
        for name, _, value in (line.partition(":") for line in lines)
        if "RSS" in name.upper()
    }
    return {"resident": 1024 * kib["VmRSS"], "own": 1024 * kib["RssAnon"]}


def ours(ckpt_dir: str, bf16: bool) -> Callable[[torch.Tensor], object]:
    """Loaded; returns what works out logits."""
    return Llama.build(ckpt_dir, bf16=bf16).model


def theirs(folder: str, bf16: bool) -> Callable[[torch.Tensor], object]:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if bf16 else torch.float32).eval()


@torch.inference_mode()
def load_once(load: Callable[[], Callable[[torch.Tensor], object]]) -> dict[str, float]:
    """Seconds and bytes of loading, and of the first logits."""
    before = resident()
    seconds, model = timed(load)
    loaded = resident()
    first, _ = timed(lambda: model(torch.ones(1, N_TOKENS, dtype=torch.int64)))
    used = resident()
    found = {"seconds": seconds, "first_logits": first}
    for name, total in before.items():
        found |= {f"{name}_loaded": loaded[name] - total, f"{name}_used": used[name] - total}
    return found


def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, prog="python -m benchmarks.load", description=__doc__)
    with cli_errors():
        torch.set_num_threads(flags.threads)
        ckpt_dir, bf16 = flags.ckpt_dir or str(ensure_model()), bf16_is_fast(CPU)
        if flags.only == OURS:
            import llama.generation  # noqa: F401  (a package that loads its modules when they are first used)

            print(json.dumps(load_once(lambda: ours(ckpt_dir, bf16))))
        elif flags.only == TRANSFORMERS:
            import transformers.models.llama.modeling_llama  # noqa: F401

            print(json.dumps(load_once(lambda: theirs(flags.hf_dir, bf16))))
        else:
            compare(flags, ckpt_dir, bf16)


def compare(flags: Flags, ckpt_dir: str, bf16: bool) -> None:
    """Both in turn, and the table."""
    read_base(ckpt_dir)
    found: dict[str, list[dict[str, float]]] = {OURS: [], TRANSFORMERS: []}
    with tempfile.TemporaryDirectory() as folder:
        model = transformers_model(ckpt_dir, torch.bfloat16 if bf16 else torch.float32)
        model.save_pretrained(folder)
        words = {OURS: [], TRANSFORMERS: ["--hf_dir", folder]}
        common = ["--ckpt_dir", ckpt_dir, "--threads", flags.threads]
        for kind, repeat in turns(found, range(flags.repeats + 1)):
            figures = json.loads(own_process("benchmarks.load", [*common, "--only", kind, *words[kind]]))
            if repeat:  # the first brings the files into the system's cache
                found[kind].append(figures)
    machine = measure_machine()
    size = sum(file.stat().st_size for file in shard_files(Path(ckpt_dir)))
    print(
        f"{ckpt_dir}: {size / 1e6:,.0f} MB of weights, {'bf16' if bf16 else 'fp32'} in memory, {flags.threads} "
        f"threads; medians of {flags.repeats}; {machine}. MB: after loading / after the first logits\n"
    )

    def cells(runs: list[dict[str, float]]) -> list[str]:
        def mb(name: str) -> str:
            return " / ".join(
                figure(statistics.median(r[f"{name}_{w}"] for r in runs) / 1e6, 0) for w in ("loaded", "used")
            )

        times = [[r[name] for r in runs] for name in ("seconds", "first_logits")]
        against = ratio(times[0], [r["seconds"] for r in found[TRANSFORMERS]])
        floor = figure(size / machine.bandwidth, 3)
        return [*(figure(statistics.median(t), 3) for t in times), floor, figure(against), mb("resident"), mb("own")]

    heads = ["loaded", "seconds", "first logits, s", "floor of both, s", "x transformers", "resident, MB"]
    heads += ["of it its own, MB"]
    print(table(heads, ([kind, *cells(runs)] for kind, runs in found.items())))
    if flags.json:
        said = {"checkpoint_bytes": size, "bf16": bf16, "threads": flags.threads}
        write_json(Path(flags.json), {"runs": found, "machine": machine._asdict()} | said)


if __name__ == "__main__":
    main(sys.argv[1:])
