"""How long the sum of the adapters' gradients takes beside a training step: processes on this machine, CPU, gloo.

    python -m benchmarks.exchange [--processes 2] [--tokens 600] [--repeats 5] [--methods soft_moa,molora] [--json FILE]

A model of SmolLM2-135M's shape with random weights, a replica per process. A step is measured in three ways, in turn:

    alone     forward and backward; nothing travels
    after     the same, then all gradients as one message
    buckets   what finetune.py does: messages of 25 MB, each sent once the backward pass has finished its gradients
"""

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from benchmarks.flags import Figures, methods_named, require_positive
from benchmarks.measure import turns
from benchmarks.shapes import SMOLLM2_135M
from cli import cli_errors, flag, parse
from llama import ModelArgs, Transformer
from llama.distributed import destroy_distributed, init_distributed
from llama.packing import PackedBatch
from moa.config import AdapterConfig
from moa.state import adapter_parameters, freeze_base, reset_adapters
from training.exchange import GradientSum

METHODS = ("soft_moa", "lora", "molora")


@dataclass(frozen=True)
class Flags(Figures):
    """Flags of this command."""

    processes: int = flag(2, help="replicas, a process each, with one thread")
    tokens: int = flag(600, help="tokens of a process's micro-batch, in rows of 150")
    layers: int = flag(SMOLLM2_135M["n_layers"], help="layers of the model, for a quick look")
    repeats: int = flag(5, help="steps of each kind")
    methods: str = flag(",".join(METHODS), help="methods to measure, with commas")

    def __post_init__(self):
        require_positive(self, "processes", "tokens", "layers", "repeats")
        methods_named(self.methods)


def build(method: str, n_layers: int) -> Transformer:
    """The model, filled at random, adapters as they start."""
    args = ModelArgs(**SMOLLM2_135M | {"n_layers": n_layers})
    model = Transformer(args, AdapterConfig.from_dict({"method": method}, args.n_layers))
    generator = torch.Generator().manual_seed(0)
    base = {
        key: torch.randn(tensor.shape, generator=generator) * 0.02
        for key, tensor in model.named_parameters()
        if tensor.is_meta
    }
    model.load_state_dict(base, strict=False, assign=True)
    reset_adapters(model, 0)
    freeze_base(model)
    return model.train()


def compute(model: Transformer, n_tokens: int) -> None:
    """Forward and backward over rows of 150 tokens, all of them labels."""
    lengths = [min(150, n_tokens - begin) for begin in range(0, n_tokens, 150)]
    tokens = torch.randint(0, 1000, (n_tokens,), generator=torch.Generator().manual_seed(dist.get_rank()))
    losses = model.losses(tokens, tokens.clone(), PackedBatch(lengths, "cpu"))
    ((losses.labels / n_tokens) + losses.auxiliary).backward()


def measure(rank: int, flags: Flags, folder: str) -> None:
    """What each process does; the first writes the figures to `folder`."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", flags.processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=flags.processes)
    init_distributed(torch.device("cpu"))
    results = []
    for method in methods_named(flags.methods):
        model = build(method, flags.layers)
        parameters = [entry.parameter for entry in adapter_parameters(model).values()]
        n = sum(parameter.numel() for parameter in parameters)

        exchanges = {"alone": None, "after": GradientSum(parameters, 2**62), "buckets": GradientSum(parameters)}
        seconds: dict[str, list[float]] = {kind: [] for kind in exchanges}
        sums = {}
        for kind, repeat in turns(exchanges, range(flags.repeats + 1)):
            model.zero_grad(set_to_none=True)
            taken = _timed(partial(step, model, flags.tokens, kind, exchanges[kind]))
            sums[kind] = [parameter.grad.clone() for parameter in parameters]
            if repeat:  # the first warms up
                seconds[kind].append(taken)
        seconds["sum"] = [_timed(exchanges["after"].finish) for _ in range(flags.repeats)]
        for a, b in zip(sums["after"], sums["buckets"], strict=True):
            torch.testing.assert_close(a, b, msg="the two ways must give the same sums")
        results.append({"method": method, "bytes": 4 * n, "seconds": seconds})
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    destroy_distributed()


def step(model: Transformer, tokens: int, kind: str, exchange: GradientSum | None) -> None:
    """A step of one micro-batch, without the optimizer."""
    if kind == "buckets":
        exchange.begin()
    compute(model, tokens)
    if exchange is not None:
        exchange.finish()


def _timed(work: Callable[[], None]) -> float:
    """Seconds that `work` takes, from when all processes are ready for it until all are done."""
    dist.barrier()
    begin = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - begin


def table(results: list[dict], flags: Flags) -> str:
    """Markdown: seconds of each kind of step, and of the sum by itself; the smallest, since what else the machine does
    only adds to them."""
    lines = [
        f"{flags.processes} processes, gloo, CPU, {flags.tokens} tokens each; seconds, least of {flags.repeats}.",
        "",
        "| method | message | step alone | sum after | buckets | the sum by itself | part of a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        least = {kind: min(values) for kind, values in result["seconds"].items()}
        lines.append(
            f"| {result['method']} | {result['bytes'] / 2**20:.1f} MiB "
            f"| {least['alone']:.3f} | {least['after']:.3f} | {least['buckets']:.3f} | {least['sum']:.4f} "
            f"| {100 * least['sum'] / least['alone']:.2f} % |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    flags = parse(Flags, argv, prog="python -m benchmarks.exchange", description=__doc__)
    with cli_errors(), tempfile.TemporaryDirectory() as folder:
        processes.spawn(measure, (flags, folder), flags.processes)
        results = json.loads(Path(folder, "results.json").read_text())
        if flags.json:
            Path(flags.json).write_text(json.dumps(results, indent=1) + "\n")
        print(table(results, flags))


if __name__ == "__main__":
    main()
