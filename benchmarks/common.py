"""What the measurements share: processes that are run in turn, shapes of models, this machine's rates, and tables."""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from tabulate import tabulate
from torch import Tensor

from cli import flag
from demo.model import ensure_model
from demo.problems import ensure_data
from llama import Llama, ModelArgs, Transformer
from llama.accelerate import FastDecoding, accelerate_model
from llama.checkpoint import load_params_and_tokenizer
from llama.data import encode_prompt
from llama.distributed import bf16_is_fast, init_distributed
from moa.config import AdapterConfig
from moa.files import read_json, write_json
from moa.methods import METHODS
from moa.reading import read_rows
from moa.state import freeze_base, reset_adapters
from training.estimate import meta_model

T = TypeVar("T")
CPU = torch.device("cpu")
REPO = Path(__file__).resolve().parent.parent
BASE, TRANSFORMERS, PEFT = "base", "transformers", "PEFT lora"  # beside our methods
ALL_METHODS = [method for method in METHODS if method != "custom"]
ANY_LENGTH = 10**6  # tokens: room for any prompt

_LLAMA_3_1 = {
    **{"n_kv_heads": 8, "vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True}
}
LLAMA_3_1: dict[str, dict[str, Any]] = {
    "8B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, **_LLAMA_3_1},
    "70B": {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, **_LLAMA_3_1},
    "405B": {
        **{"dim": 16384, "n_layers": 126, "n_heads": 128, "multiple_of": 4096, "ffn_dim_multiplier": 1.2},
        **_LLAMA_3_1,
    },
}
SMOLLM2_135M: dict[str, Any] = {
    **{"dim": 576, "n_layers": 30, "n_heads": 9, "n_kv_heads": 3, "vocab_size": 49412, "multiple_of": 256},
    **{"ffn_dim_multiplier": 1.0, "norm_eps": 1e-5, "rope_theta": 100000.0},
}
TINY: dict[str, Any] = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 512, "multiple_of": 32}
SHAPES = {"8B": LLAMA_3_1["8B"], "SMOLLM2_135M": SMOLLM2_135M, "tiny": TINY}  # those that `gpu` measures


@dataclass(frozen=True)
class SideBySide:
    """Flags of measurements of several kinds of work on one base."""

    ckpt_dir: str | None = flag(None, help="base model, a folder in Meta's layout; default: the demo model")
    data_path: str | None = flag(None, help="rows, JSON or JSON lines; default: the demo's")
    threads: int = flag(torch.get_num_threads(), help="threads of each process")
    bf16: bool | None = flag(None, help="base in bf16; default: where the hardware multiplies bf16")
    json: str | None = flag(None, help="write the figures to this file too")

    def base_folder(self) -> str:
        """Return the base model's folder."""
        return str(Path(self.ckpt_dir or ensure_model()).resolve())

    def rows_file(self, split: int = 0) -> str:
        """Return the file of rows. split: 0 or 1, the demo's training or test rows where none is given."""
        return str(Path(self.data_path or ensure_data()[split]).resolve())

    def use_bf16(self) -> bool:
        """Say whether the base is in bf16."""
        return bf16_is_fast(CPU) if self.bf16 is None else self.bf16


def methods_named(text: str) -> list[str]:
    """Split --methods: names with commas, "all", or "" for none. ValueError for one that is unknown or repeated."""
    if text in ("", "all"):
        return list(ALL_METHODS) if text else []
    methods = text.split(",")
    for method in methods:
        if method not in ALL_METHODS:
            raise ValueError(f"--methods: {method!r} is none of {', '.join(ALL_METHODS)} (or all)")
        if methods.count(method) > 1:
            raise ValueError(f"--methods: {method} is there twice")
    return methods


def numbers_of(flag: str, text: str) -> list[int]:
    """Split a flag's numbers at commas. ValueError unless all are whole and above 0."""
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(f"--{flag}: expected whole numbers above 0, with commas, got {text!r}")
    return list(map(int, words))


def require_positive(flags: object, *names: str) -> None:
    """Raise ValueError unless these flags, where they are given, are at least 1."""
    for name in names:
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}")


def prompts_of(path: str | Path, ckpt_dir: str | Path, n: int) -> list[list[int]]:
    """Return the token ids of the first n rows' prompts. ValueError where there are fewer rows."""
    _, tokenizer = load_params_and_tokenizer(ckpt_dir)
    rows = read_rows(path, ("instruction", "input"))[:n]
    if len(rows) < n:
        raise ValueError(f"{path}: --prompts {n}, but there are {len(rows)} rows")
    return [encode_prompt(tokenizer, row, ANY_LENGTH) for row in rows]


# Processes in turn


def run_process(words: Sequence[object], threads: int, folder: str | Path = REPO) -> str:
    """Run `python WORDS...` in a folder and return what it prints. ValueError with its last line where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    if done.returncode:
        reason = (done.stderr.split("\n")[:-1] or ["it printed nothing"])[-1].removeprefix("error: ")
        name = " ".join(command[1:3])
        raise ValueError(f"{folder}: python {name} ... ended with status {done.returncode}: {reason}")
    return done.stdout


def interleave(kinds: Sequence[T], rounds: int) -> Iterator[T]:
    """Yield each kind once a round, every second round in the opposite order (ABBA).

    What else the machine does falls on all kinds, and none always follows the same other.
    """
    for i in range(rounds):
        yield from kinds if i % 2 == 0 else reversed(kinds)


def measure_in_turn(works: Mapping[str, Callable[[], dict[str, Any]]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Do each work once a round (`interleave`) and print its time -> results of each, a result a round.

    A result has "seconds", a list of times in one process, and "peak_memory_bytes".
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in works}
    for name in interleave(list(works), rounds):
        result = works[name]()
        results[name].append(result)
        seconds, memory = statistics.median(result["seconds"]), result["peak_memory_bytes"] / 1e9
        print(f"{name}: {seconds:.3f} s, {memory:.2f} GB", file=sys.stderr, flush=True)
    return results


def run_only(module: str, argv: Sequence[str], kind: str, threads: int) -> Callable[[], dict[str, Any]]:
    """Return a work for `measure_in_turn`: a benchmark with --only KIND, whose last line is JSON, in a process."""
    return lambda: json.loads(run_process(["-m", module, *argv, "--only", kind], threads).splitlines()[-1])


def median_seconds(results: Sequence[Mapping[str, Any]]) -> float:
    """Return the median over processes of each one's median time."""
    return statistics.median(statistics.median(result["seconds"]) for result in results)


def peak_bytes(results: Sequence[Mapping[str, Any]]) -> float:
    """Return the median over processes of their peak memory."""
    return statistics.median(result["peak_memory_bytes"] for result in results)


def add_figures(path: str | Path, part: str, details: dict[str, Any], kinds: Mapping[str, Mapping[str, Any]]) -> None:
    """Write figures of kinds of work to a JSON file, beside what other measurements have put there.

    `python -m inspection figures cost` and `report` read "methods", "base" and "peers"; `details` stand under `part`.
    """
    path = Path(path)
    content = read_json(path) if path.exists() else {}
    content |= {name: content.get(name, {}) for name in ("methods", "base", "peers")} | {part: details}
    for kind, figures in kinds.items():
        if kind == BASE:
            content["base"] |= figures
        else:
            group = content["peers" if kind in (TRANSFORMERS, PEFT) else "methods"]
            group[kind] = group.get(kind, {}) | figures
    write_json(path, content)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    return tabulate(rows, heads, tablefmt="pipe", disable_numparse=True)


def figure(value: float | None, digits: int = 2) -> str:
    """Format a cell with a number, or a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


# The machine


def timed(work: Callable[[], T], device: torch.device = CPU) -> tuple[float, T]:
    """Return the seconds that `work` takes until the device has done it, and its result."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    begin = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - begin, result


class Machine(NamedTuple):
    """Measured rates: FLOP/s of large products of the faster type, and bytes/s to and from memory."""

    flops: float
    bandwidth: float

    def __str__(self) -> str:
        return f"products {self.flops / 1e12:,.3g} TFLOP/s, memory {self.bandwidth / 1e9:,.3g} GB/s"


def measure_machine(device: torch.device = CPU, repeats: int = 3) -> Machine:
    """Measure the best of a few large products, and of copies and sums far larger than any cache."""
    size, length = (8192, 2**30) if device.type == "cuda" else (2048, 2**26)
    dtype = torch.bfloat16 if bf16_is_fast(device) else torch.float32
    a, b = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    x, y = (torch.ones(length, device=device) for _ in range(2))

    def best(work: Callable[[], object]) -> float:
        return min(timed(work, device)[0] for _ in range(repeats + 1))  # the first is slower

    rates = (2 * x.nbytes / best(lambda: y.copy_(x)), x.nbytes / best(x.sum))
    return Machine(2 * size**3 / best(lambda: a @ b), max(rates))


# Models


def config_of(method: str | None, n_layers: int) -> AdapterConfig | None:
    """Return a method's preset; None (no adapter) for None or BASE."""
    return None if method in (None, BASE) else AdapterConfig.from_dict({"method": method}, n_layers)


def random_base(args: ModelArgs, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Make random weights of the bare model on the device."""
    init_distributed(device)
    generator, base = torch.Generator(device).manual_seed(0), {}
    for key, parameter in meta_model(args, None, False).named_parameters():
        weight = torch.empty(parameter.shape, dtype=dtype, device=device)
        base[key] = weight.normal_(0, 0.02, generator=generator) if weight.dim() > 1 else weight.fill_(1)
    return base


def model_on(args: ModelArgs, base: Mapping[str, Tensor], config: AdapterConfig | None, flash: bool = False):
    """Build a model with fresh adapters on these weights, which several models may share."""
    device = base["output.weight"].device
    init_distributed(device)
    model = Transformer(args, config, flash)
    model.load_state_dict(dict(base), strict=False, assign=True)
    reset_adapters(model, 0)
    freeze_base(model)
    accelerate_model(model)
    return model.to(device)


class NoText(NamedTuple):
    """What generation needs of a tokenizer where there is no text."""

    n_words: int
    stop_ids: tuple[int, ...] = (0,)


def llm_on(model: Transformer, max_seq_len: int, max_batch_size: int, cuda_graphs: bool = False) -> Llama:
    """Return what generates from token ids to token ids."""
    fast = FastDecoding(model, cuda_graphs)
    return Llama(model, NoText(model.args.vocab_size), max_seq_len, max_batch_size, fast)


def training_flops(model: Transformer, n_tokens: int, n_logits: int) -> int:
    """Estimate a step's FLOPs: forward, gradients of all inputs and of the adapters' weights, without attention."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    layers = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers."))
    output = model.output.weight.numel()
    return 4 * (layers * n_tokens + output * n_logits) + 2 * trained * n_tokens


def decode_bytes(model: Transformer, n_rows: int, context: int) -> int:
    """Return the bytes that a decode step must read: weights, and keys and values of rows of `context` tokens."""
    args, size = model.args, model.output.weight.element_size()
    weights = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("tok_embeddings"))
    return size * (weights + 2 * args.n_layers * n_rows * context * args.n_kv_heads * args.head_dim)
