"""What training and generation do on one GPU, with random weights in a published model's shape: no file is needed.

    python -m benchmarks.gpu [--shape 8B] [--methods soft_moa] [--peers] [--json gpu.json] [--flash_attention2]
    python -m benchmarks.gpu --shape tiny --device cpu          to try the command where there is no GPU

training    real tokens/s of a step (forward, backward, AdamW) of --rows rows of at most 300 tokens, with lengths drawn
            as GSM8K's and the commonsense set's; peak memory, also of rows that are all of 300 tokens; by what
            finetune.py's --activation_checkpointing may be
decoding    milliseconds of a decode step at --decode_rows rows; on a GPU also as generate.py's --cuda_graphs does it
traces      the kernels that take most of a training step's and of a decode step's time

Each beside the bare base ("base": gradients go to the embeddings' output) and the floor: the products at the best rate
measured here, and the bytes at the best bandwidth (benchmarks/floors.py).

--peers adds what a user would install instead, on the same weights, rows and prompts: a step of transformers with
PEFT's LoRA of rank 16 (adapters in float32, rows padded to the longest, of which the real tokens alone count; "all":
with transformers' gradient checkpointing), and decode steps of transformers' `generate` with and without that LoRA, all
with the attention that transformers takes by itself. Of their weights wq and wk alone are copies, with rows in another
order, which count in no peak memory.

Every kind is a part by itself, one after the other, as peak memory is a part's own: what else the machine does falls on
one kind alone. The JSON file is written anew after every part; a part that fails is told and left out, and the exit
status is then 1.
"""

import gc
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.decoding import EARLY, clock_of, decode_clock, decode_floor, random_prompts
from benchmarks.flags import Figures, methods_named, numbers_of, require_positive
from benchmarks.floors import step_work
from benchmarks.generators import PEERS, Task, theirs
from benchmarks.machine import Machine, measure_machine
from benchmarks.measure import figure, table, timed
from benchmarks.models import config_of, on_base, random_base, shape_only
from benchmarks.peers import copied_bytes, lora_on, transformers_on, version_of
from benchmarks.profiles import profile, summary
from benchmarks.rows import LENGTHS, drawn_rows, halves, rows_of
from benchmarks.shapes import BY_NAME
from benchmarks.steps import BASE, PEFT, TRANSFORMERS, Step, method_of, padded_step, step_of
from cli import cli_errors, flag, parse
from llama import ModelArgs, Transformer
from llama.data import Example
from llama.distributed import bf16_is_fast, get_device
from llama.generation import require_flash
from moa.files import write_json
from training.config import RECOMPUTED
from training.data import label_count
from training.loop import peak_memory

LONGEST = 300
DECODING, WITH_GRAPHS = "decoding", "decoding with graphs"


@dataclass(frozen=True)
class Flags(Figures):
    shape: str = flag("8B", help="shape of the model", choices=tuple(BY_NAME))
    methods: str = flag("soft_moa", help="methods to measure beside the bare base, with commas, or all")
    peers: bool = flag(False, help="also transformers, and with it PEFT's LoRA of rank 16 (if installed)")
    device: str = flag("auto", help="auto, cpu, cuda or cuda:N")
    rows: int = flag(8, help="rows of a training step")
    decode_rows: str = flag("1,16,64", help="rows of a decode step, with commas")
    context: int = flag(128, help="tokens of each prompt of those")
    repeats: int = flag(5, help="training steps and decode runs measured of each")
    decode_steps: int = flag(64, help="decode steps of a run")
    flash_attention2: bool = flag(False, help="attention of training by flash-attn 2 (if installed)")

    def __post_init__(self):
        require_positive(self, "rows", "context", "repeats", "decode_steps")
        methods_named(self.methods)
        numbers_of("decode_rows", self.decode_rows)


class Bench:
    """One run: the weights, which all models share, and what has been found so far."""

    def __init__(self, flags: Flags, device: torch.device):
        self.flags, self.device = flags, device
        self.args = ModelArgs(**BY_NAME[flags.shape])
        self.bf16 = bf16_is_fast(device)
        self.found: dict[str, Any] = {"task": self._task(), "failed": {}}
        self.machine: Machine = measure_machine(device)
        self.found["machine"] = self.machine._asdict()
        self.base: dict[str, Tensor] = random_base(self.args, torch.bfloat16 if self.bf16 else torch.float32, device)

    def _task(self) -> dict[str, Any]:
        gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if gpu else "cpu"
        flags = self.flags
        said = {"shape": flags.shape, "device": name, "torch": torch.__version__, "bf16": self.bf16}
        said |= {"rows": flags.rows, "longest": LONGEST, "context": flags.context, "flash": flags.flash_attention2}
        return said | ({name: version_of(name) for name in ("transformers", "peft")} if flags.peers else {})

    def model(self, kind: str) -> Transformer:
        config = config_of(method_of(kind), self.args.n_layers)
        return on_base(self.args, self.base, config, self.flags.flash_attention2)

    def peer(self, kind: str, recompute: bool = False) -> nn.Module:
        """recompute: with gradient checkpointing, which PEFT's alone may have."""
        model = transformers_on(self.args, self.base)
        return model if kind == TRANSFORMERS else lora_on(model, recompute=recompute)

    def shape(self, kind: str) -> Transformer:
        """The model of ours whose arithmetic a kind's is, without weights."""
        return shape_only(self.args, config_of(method_of(kind), self.args.n_layers), self.bf16)

    def part(self, name: str, work: Callable[[], Any]) -> None:
        """Do a part, keep what it finds, and write all that is there; a fault is kept in its place."""
        try:
            self.found[name] = work()
        except Exception as error:  # whatever it is, the other parts are still wanted
            traceback.print_exc()
            self.found["failed"][name] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{name} failed: {self.found['failed'][name]}", file=sys.stderr, flush=True)
        gc.collect()  # a model's modules refer to one another in circles
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.flags.json:
            write_json(Path(self.flags.json), self.found)

    def step(self, kind: str, recompute: str) -> Step:
        if kind in PEERS:
            return padded_step(self.peer(kind, recompute != "off"), self.device)
        model = self.model(kind)
        model.activation_checkpointing = recompute
        return step_of(model, self.device)

    def training(self, kind: str, recompute: str) -> dict[str, Any]:
        """Figures of training steps, by kind of rows."""
        step, flags, shape = self.step(kind, recompute), self.flags, self.shape(kind)
        figures = {}
        for data in (*LENGTHS, "full"):
            n, times, floors = (1 if data == "full" else flags.repeats), [], []
            batches = [self._rows(data, seed) for seed in range(n)]
            if data != "full":
                step(batches[0])
            self._reset_peak()
            for batch in batches:
                times.append(timed(lambda batch=batch: step(batch), self.device)[0])
                lengths = [len(row.tokens) for row in batch]
                floors.append(step_work(shape, lengths, sum(map(label_count, batch))).seconds(self.machine))
            tokens = [sum(len(row.tokens) for row in batch) for batch in batches]
            found = {"peak_memory_bytes": self._peak(kind), "tokens": tokens}
            if data != "full":  # done once, for its memory alone
                found |= {"seconds": times, "floor": floors, "tokens_per_second": sum(tokens) / sum(times)}
            figures[data] = found
        return figures

    def _rows(self, data: str, seed: int) -> list[Example]:
        if data == "full":
            return rows_of([halves(LONGEST)] * self.flags.rows, self.args.vocab_size)
        return drawn_rows(self.flags.rows, data, LONGEST, self.args.vocab_size, seed)

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _peak(self, kind: str) -> int:
        """Bytes, since `_reset_peak` on a GPU, without the weights that a peer's model has twice beside ours."""
        twice = copied_bytes(self.base) if kind in PEERS and self.device.type == "cuda" else 0
        return peak_memory(self.device) - twice

    @property
    def ways(self) -> list[str]:
        return [DECODING, *([WITH_GRAPHS] if self.device.type == "cuda" else [])]

    def decoding(self, way: str, kind: str, n_rows: int) -> dict[str, Any]:
        clock, flags = self._clock(way, kind, n_rows, self.flags.context), self.flags
        self._reset_peak()
        seconds = [clock() for _ in range(flags.repeats)]
        floor = decode_floor(self.shape(kind), n_rows, flags.context, flags.decode_steps, self.machine)
        return {"seconds": seconds, "floor": floor, "peak_memory_bytes": self._peak(kind)}

    def _clock(self, way: str, kind: str, n_rows: int, context: int) -> Callable[[], float]:
        steps = self.flags.decode_steps
        if kind not in PEERS:
            return decode_clock(self.model(kind), n_rows, context, steps, self.device, way == WITH_GRAPHS)
        generate = theirs(self.peer(kind), [0], self.device)
        prompts = random_prompts(n_rows, context, self.args.vocab_size)
        return clock_of(lambda n: generate(Task(prompts, n, n, n_rows)), steps, self.device)

    def traced_step(self, kind: str) -> dict[str, Any]:
        step, batch = self.step(kind, "off"), self._rows("gsm8k", 0)
        return profile(lambda: step(batch), self.device)

    def traced_decoding(self, way: str, kind: str, n_rows: int) -> dict[str, Any]:
        """Of generation with hardly any prefill, from prompts of one token: of all steps of a clock's two runs."""
        clock = self._clock(way, kind, n_rows, 1)
        return profile(clock, self.device) | {"decode_steps": self.flags.decode_steps + 2 * (EARLY - 1)}


def run(bench: Bench) -> None:
    """All parts, the most wanted first."""
    flags = bench.flags
    kinds = [*methods_named(flags.methods), BASE]
    sizes = numbers_of("decode_rows", flags.decode_rows)
    peers = PEERS if flags.peers else ()
    trained = [*product(kinds, RECOMPUTED), *product([PEFT] if flags.peers else [], ("off", "all"))]
    for kind, choice in trained:
        bench.part(f"training, {kind}, {choice}", partial(bench.training, kind, choice))
    print(f"\n{training_table(bench.found)}\n", flush=True)
    for n, (way, kind) in product(sizes, [*product(bench.ways, kinds), *product([DECODING], peers)]):
        bench.part(f"{way}, {kind}, {n}", partial(bench.decoding, way, kind, n))
    print(f"{decoding_table(bench.found, [*kinds, *peers], sizes)}\n", flush=True)
    for kind in kinds:
        bench.part(f"trace of a step, {kind}", partial(bench.traced_step, kind))
        for way in bench.ways:
            bench.part(f"trace of {way}, {kind}", partial(bench.traced_decoding, way, kind, sizes[0]))
    for name, found in bench.found.items():
        if name.startswith("trace"):
            print(f"{name}: {summary(found)}\n")


def training_table(found: dict[str, Any]) -> str:
    """Of all training parts that are there."""
    rows = []
    for name, figures in found.items():
        if not name.startswith("training, "):
            continue
        full = figures["full"]["peak_memory_bytes"]
        for data, part in figures.items():
            if "seconds" in part:
                seconds, floor = statistics.median(part["seconds"]), statistics.median(part["floor"])
                speed = [figure(statistics.mean(part["tokens"]), 0), figure(part["tokens_per_second"], 0)]
                share = [figure(1000 * seconds, 1), figure(1000 * floor, 1), figure(seconds / floor)]
                memory = [figure(part["peak_memory_bytes"] / 2**30), figure(full / 2**30)]
                rows.append([name.removeprefix("training, "), data, *speed, *share, *memory])
    full = f"full rows of {LONGEST}"
    heads = ["training", "rows as", "tokens", "tokens/s", "ms", "floor, ms", "x floor", "peak, GiB", f"{full}, GiB"]
    return table(heads, rows)


def decoding_table(found: dict[str, Any], kinds: list[str], sizes: list[int]) -> str:
    """Of all decode parts that are there."""
    rows = []
    for n, way, kind in product(sizes, (DECODING, WITH_GRAPHS), kinds):
        part, bare = (found.get(f"{way}, {name}, {n}") for name in (kind, BASE))
        if part:
            seconds = statistics.median(part["seconds"])
            against = figure(seconds / statistics.median(bare["seconds"]) if bare else None)
            floor = [figure(1000 * part["floor"]), f"{100 * part['floor'] / seconds:.0f} %"]
            memory, name = figure(part["peak_memory_bytes"] / 2**30), f"{kind}{way.removeprefix(DECODING)}"
            rows.append([name, f"{n}", figure(1000 * seconds), against, *floor, figure(n / seconds, 0), memory])
    heads = ["decoding", "rows", "ms a step", "x base", "floor, ms", "of the floor's speed", "tokens/s", "peak, GiB"]
    return table(heads, rows)


def main(argv: list[str]) -> None:
    flags = parse(Flags, argv, prog="python -m benchmarks.gpu", description=__doc__)
    with cli_errors():
        device = get_device(flags.device)
        if flags.flash_attention2:
            require_flash(flags.device, bf16_is_fast(device))
        bench = Bench(flags, device)
        print(f"{bench.found['task']}; {bench.machine}", flush=True)
        run(bench)
    if bench.found["failed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
