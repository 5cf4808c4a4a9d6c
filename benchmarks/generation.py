"""Time, decode rate and memory of generation: our base and methods, and transformers with and without PEFT's LoRA.

    python -m benchmarks.generation [--methods soft_moa,lora | all] [--peft] [--prompts 16] [--new_tokens 64]
    python -m benchmarks.generation --natural_stops --prompts 200 --data_path gsm8k/test.json --peft \\
        --adapter_path runs/gsm8k/lora/s0,runs/gsm8k/soft_moa/s0 [--batch_size 32] [--json FILE]

Greedy, on the same weights and prompts, in turn, transformers and PEFT in processes of their own; medians, and ratios
within the run. Without --natural_stops each prompt is answered by --new_tokens tokens, all prompts at once, and a
decode step's time is that of the tokens after the first quarter (after 32, if that is more). "first": what the first
run takes longer than a second one like it, in which ours makes copies of the weights; the times are of later runs. With
--natural_stops answers end where the model ends them, --batch_size rows at once: ours with rows that leave
and come one by one, transformers in batches of prompts of like length, padded on the left. Answers of trained adapters
differ in length, so look at the time per token; PEFT gets the first of --adapter_path that is plain LoRA (else one as
it starts, which answers as the base does). Memory: each kind in a process of its own, the largest resident set of the
task's first batch. "floor": the least that products and bytes take on this machine, measured in the same run
(benchmarks/floors.py), for a kind's own answers; of the memory, the weights and the longest rows' keys and values.
"same tokens": as the kind's counterpart of ours, first and all.
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
from benchmarks.floors import generation_work
from benchmarks.generators import PEERS, Generate, Kind, Task, agreement, kinds_of, made, maker_of
from benchmarks.machine import Machine, measure_machine
from benchmarks.measure import CPU, figure, own_process, ratio, table, timed, turns
from benchmarks.models import shape_only
from benchmarks.steps import BASE
from cli import cli_errors, flag, parse
from demo.model import ensure_model
from demo.problems import ensure_data
from llama.checkpoint import read_base
from llama.data import encode_prompt, read_rows
from llama.distributed import bf16_is_fast
from moa.files import write_json
from training.estimate import cache_bytes, held_bytes
from training.loop import peak_memory

WHOLE = 10**6  # tokens: room for any prompt


@dataclass(frozen=True)
class Flags(Timed, OnBase):
    data_path: str | None = flag(None, help="test rows; default: the demo's")
    methods: str | None = flag(
        None, help="methods with fresh adapters, with commas, or all; default: soft_moa,lora without --adapter_path"
    )
    adapter_path: str | None = flag(None, help="trained adapters, folders or files, with commas")
    peft: bool = flag(False, help="also transformers + PEFT's LoRA (if installed)")
    prompts: int = flag(16, help="prompts, the first of the test rows")
    new_tokens: int | None = flag(None, help="tokens of each answer, without --natural_stops; default: 64")
    natural_stops: bool = flag(False, help="answers end where the model ends them")
    max_gen_len: int | None = flag(None, help="new tokens at most, with --natural_stops; default: 200")
    batch_size: int | None = flag(None, help="rows at once, with --natural_stops; default: 32")
    repeats: int = flag(3, help="times that every kind does the task")
    bf16: bool | None = flag(None, help="base in bf16; default: where the hardware multiplies bf16")
    memory_of: str | None = flag(None, help="only this one: the first batch, then the peak memory in bytes")

    def __post_init__(self):
        require_positive(self, "prompts", "new_tokens", "max_gen_len", "batch_size", "repeats", "threads")
        self.fresh()
        idle = ("new_tokens",) if self.natural_stops else ("max_gen_len", "batch_size")
        for name in idle:
            if getattr(self, name) is not None:
                when = "with" if self.natural_stops else "without"
                raise ValueError(f"--{name} has no effect {when} --natural_stops")

    def fresh(self) -> list[str]:
        default = "" if self.adapter_path else "soft_moa,lora"
        return methods_named(default if self.methods is None else self.methods)

    def trained(self) -> list[str]:
        return self.adapter_path.split(",") if self.adapter_path else []


def prompts_of(path: str, ckpt_dir: str, n: int) -> list[list[int]]:
    """Token ids of the first n rows' prompts. ValueError where there are fewer rows."""
    _, tokenizer = read_base(ckpt_dir)
    rows = read_rows(path, ("instruction", "input"))[:n]
    if len(rows) < n:
        raise ValueError(f"{path}: {n} prompts are wanted, there are {len(rows)} rows")
    return [encode_prompt(tokenizer, row, WHOLE) for row in rows]


def task_of(flags: Flags, ckpt_dir: str) -> Task:
    prompts = prompts_of(flags.data_path or str(ensure_data()[1]), ckpt_dir, flags.prompts)
    if flags.natural_stops:
        return Task(prompts, flags.max_gen_len or 200, 0, flags.batch_size or 32)
    new_tokens = flags.new_tokens or 64
    return Task(prompts, new_tokens, new_tokens, len(prompts))


def measure(generators: dict[str, Generate], task: Task, repeats: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Answers and figures by kind: seconds of the whole task and, where answers are of one length, of a decode step."""
    early = task.shorter(max(EARLY, task.max_gen_len // 4))
    fixed = task.min_new_tokens == task.max_gen_len > early.max_gen_len
    answers: dict[str, list[list[int]]] = {}
    figures: dict[str, dict[str, list[float]]] = {}
    short = task.first_batch().shorter(EARLY)
    for kind, generate in generators.items():
        first, second = (timed(lambda generate=generate: generate(short))[0] for _ in range(2))
        figures[kind] = {"seconds": [], "decode_step": [], "first": [first - second]}
    for kind, _ in turns(generators, range(repeats)):
        generate = generators[kind]
        seconds, answers[kind] = timed(lambda generate=generate: generate(task))
        figures[kind]["seconds"].append(seconds)
        if fixed:
            to_early = timed(lambda generate=generate: generate(early))[0]
            step = (seconds - to_early) / (task.max_gen_len - early.max_gen_len)
            figures[kind]["decode_step"].append(step)
    return answers, figures


def floors(
    kind: Kind, args: Any, bf16: bool, task: Task, answers: list[list[int]], machine: Machine
) -> dict[str, float]:
    """The least seconds of the kind's own answers, of which an end token is one more that was chosen, and of one of
    their decode steps; and the bytes of the weights and of the longest rows' keys and values."""
    model = shape_only(args, kind.config, bf16)
    chosen = [min(len(answer) + 1, task.max_gen_len) for answer in answers]
    prompts = list(map(len, task.prompts))
    prefill, decode = (part.seconds(machine) for part in generation_work(model, prompts, chosen, task.batch_size))
    held, cached = held_bytes(model), cache_bytes(model, min(task.batch_size, len(prompts)), max(prompts) + max(chosen))
    return {
        "floor": prefill + decode,
        "decode_step_floor": decode / max(1, max(chosen) - 1),
        "memory_floor_bytes": held["base"] + held["adapters"] + cached,
    }


def counterpart(kind: Kind, kinds: Sequence[Kind]) -> str:
    """Which of ours is to give the same answers: the one with the same trained adapter, or the base."""
    return next((k.name for k in kinds if k.adapter_path == kind.adapter_path and k.name not in PEERS), BASE)


def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, prog="python -m benchmarks.generation", description=__doc__)
    with cli_errors():
        torch.set_num_threads(flags.threads)
        ckpt_dir = flags.ckpt_dir or str(ensure_model())
        bf16 = bf16_is_fast(CPU) if flags.bf16 is None else flags.bf16
        task = task_of(flags, ckpt_dir)
        kinds = kinds_of(ckpt_dir, flags.fresh(), flags.trained(), flags.peft)
        if flags.memory_of:
            kind = next(kind for kind in kinds if kind.name == flags.memory_of)
            maker_of(kind, ckpt_dir, bf16, task)()(task.first_batch())
            print(peak_memory(CPU))
            return
        memory = {k.name: int(own_process("benchmarks.generation", [*argv, "--memory_of", k.name])) for k in kinds}
        machine = measure_machine()
        with made(kinds, ckpt_dir, bf16, task) as generators:
            answers, figures = measure(generators, task, flags.repeats)
        args, _ = read_base(ckpt_dir)
        for kind in kinds:
            mine = answers[kind.name]
            figures[kind.name] |= {
                **floors(kind, args, bf16, task, mine, machine),
                "peak_memory_bytes": memory[kind.name],
                "tokens": sum(map(len, mine)),
                "same_tokens": agreement(mine, answers[counterpart(kind, kinds)]),
            }
        report(flags, task, bf16, machine, figures)


def report(flags: Flags, task: Task, bf16: bool, machine: Machine, figures: dict[str, Any]) -> None:
    """The table, and the JSON file."""
    until = f"natural stops, at most {task.max_gen_len}" if flags.natural_stops else f"{task.max_gen_len}"
    print(
        f"{len(task.prompts)} prompts of {statistics.mean(map(len, task.prompts)):.0f} tokens in the mean, new tokens: "
        f"{until}; {task.batch_size} rows at once, greedy, {'bf16' if bf16 else 'fp32'}, {flags.threads} threads; "
        f"medians of {flags.repeats}; {machine}\n"
    )
    rows = []
    for kind, found in figures.items():
        seconds, n_tokens = statistics.median(found["seconds"]), max(1, found["tokens"])
        steps = found["decode_step"]
        others = [figures.get(other) for other in (BASE, *PEERS)]
        times = [other and ratio(found["seconds"], other["seconds"]) for other in others]
        rows.append(
            [
                *(kind, figure(seconds)),
                *map(figure, times),
                *(figure(found["tokens"] / len(task.prompts), 1), figure(1000 * seconds / n_tokens)),
                figure(others[-1] and times[-1] * others[-1]["tokens"] / n_tokens),
                *(figure(found["floor"]), figure(seconds / found["floor"], 1)),
                figure(1000 * statistics.median(steps) if steps else None, 1),
                figure(1000 * found["decode_step_floor"] if steps else None, 1),
                figure(*found["first"]),
                *(figure(found[name] / 1e9) for name in ("peak_memory_bytes", "memory_floor_bytes")),
                " / ".join(f"{100 * share:.0f} %" for share in found["same_tokens"].values()),
            ]
        )
    heads = ["answers of", "seconds", "x base", "x transformers", "x PEFT", "tokens each", "ms per token", "x PEFT"]
    heads += ["floor, s", "x floor", "decode step, ms", "floor, ms", "first, s"]
    heads += ["peak memory, GB", "floor, GB", "same tokens"]
    print(table(heads, rows))
    if flags.json:
        said = {"prompts": [len(p) for p in task.prompts], "max_gen_len": task.max_gen_len, "bf16": bf16}
        said |= {"min_new_tokens": task.min_new_tokens, "batch_size": task.batch_size, "threads": flags.threads}
        write_json(Path(flags.json), {"task": said, "machine": machine._asdict(), "kinds": figures})


if __name__ == "__main__":
    main(sys.argv[1:])
