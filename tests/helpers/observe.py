"""What a model shows of itself, at any model-parallel size; also the program that each of four processes runs.

As a program: `python tests/observe.py RANK FOLDER`, RANK of 4, writes FOLDER/rank{RANK}.pt: everything at
model-parallel size 4, then at 2, where the four processes are two replicas of a model cut in two.
"""

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from golden import METHODS as GOLDEN_METHODS
from golden import expected, load
from llama import Llama, ModelArgs, Transformer
from llama.accelerate import FastDecoding
from llama.checkpoint import load_base_weights, open_shard, shard_specs
from llama.data import IGNORE_INDEX, Example
from llama.distributed import destroy_distributed, dp_rank, dp_size, init_distributed
from moa.adapter_file import adapter_params, save_adapter
from moa.parallel import (
    Shard,
    copy_to_model_parallel_region,
    gather,
    mp_rank,
    mp_size,
    reduce_from_model_parallel_region,
)
from moa.replicas import assert_replicas_equal
from moa.state import adapter_parameters, adapter_state_dict, gather_full, reset_adapters
from tiny import ARGS, BASE, METHODS, build, config, gradients, random_state, tokens
from training.loop import TrainState, make_optimizer, train
from training.schedule import Schedule

WORLD, SIZES = 4, (4, 2)
CPU = torch.device("cpu")
PROMPTS = [[256, *tokens(n, seed=n).tolist()] for n in (4, 9, 1)]
# Shapes that neither two nor four ranks can share
IMPOSSIBLE = {
    "heads": {"dim": 66, "n_heads": 3, "n_kv_heads": 3},
    "kv_heads": {"dim": 96, "n_heads": 12, "n_kv_heads": 3},
    "ffn": {"multiple_of": 1, "ffn_dim_multiplier": 1.006},  # 170 * 1.006 = 171
    "vocab": {"vocab_size": 511},
}
# Large enough for the system's pages to tell what was read
LARGE = ModelArgs(dim=256, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=8192)
EVERYTHING = "custom"  # of METHODS
DRIFTING = (
    "layers.1.attention.adapters.lora_Q.lora_A",
    "layers.1.attention.adapters.lora_Q.lora_B",
    "layers.0.attention.adapters.lora_V.lora_B",
    "layers.2.ffn_norm.weight",
)


@contextmanager
def float64(model: Transformer) -> Iterator[Transformer]:
    """All in float64, also what the code takes to float32 on the way: then sums in another order differ by far less
    than any mistake would make them."""
    model.double()
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield model


def observe(name: str, model_parallel_size: int) -> dict[str, Any]:
    """Everything that must not depend on how many ranks share the model: whole tensors and plain values."""
    llm = build(name, model_parallel_size=model_parallel_size)
    model, batch = llm.model, tokens(2, 9)
    found = {"state": adapter_state_dict(model), "loaded": random_state(model)}
    with torch.no_grad():
        found["logits"] = model(batch)
    found["float32"] = _backward(model, batch)
    found["greedy"] = llm.generate(PROMPTS, max_gen_len=6)
    llm.fast_decoding = FastDecoding(model, prepack_from=1)
    found["greedy with copies"] = llm.generate(PROMPTS, max_gen_len=6)
    if model_parallel_size < 4:  # to save time
        found["sampled"] = llm.generate(PROMPTS, max_gen_len=6, temperature=0.9, top_p=0.9, seed=2)
    with float64(model):
        found["float64"] = _backward(model, batch)
        for choice in ("selective", "full") if model_parallel_size < 4 else ():
            model.activation_checkpointing = choice
            found[choice] = _backward(model, batch)
    cuts = {key: entry.spec.shard for key, entry in adapter_parameters(model).items()}
    found["cut"] = {key: tuple(cut) for key, cut in cuts.items() if cut is not None}
    reset_adapters(model, seed=3)
    found["fresh"] = adapter_state_dict(model)
    return found


def _backward(model: Transformer, batch: torch.Tensor) -> dict[str, Any]:
    """Loss, whole gradients and this rank's own."""
    labels = batch.clone()
    labels[0, :5] = IGNORE_INDEX
    loss = model.loss(batch, labels)
    loss.backward()
    local = gradients(model)
    return {"loss": loss.detach(), "gradients": gather_full(local, model), "local": local}


def observe_step(name: str, model_parallel_size: int, exact: bool) -> dict[str, Any]:
    """One optimizer step of the project's own loop over three rows of unequal lengths, divided among the replicas."""
    model = build(name, model_parallel_size=model_parallel_size).model
    rows, losses = [], []
    for i, row in enumerate(tokens(3, 15).tolist()):
        row = row[: 15 - 2 * i]
        rows.append(Example(row, [IGNORE_INDEX] * (2 + i % 2) + row[2 + i % 2 :], 2 + i % 2))
    schedule = Schedule(n_rows=3, rows_per_step=3, steps=1, warmup_steps=0, lr=0.01, min_lr=0.0, constant=True)
    # exact: one micro-batch, since a load-balancing loss is one of a micro-batch
    batch_size = -(-len(rows) // dp_size()) if exact else 1
    with float64(model) if exact else nullcontext():
        optimizer = make_optimizer(model, weight_decay=0.02)
        train(model, optimizer, rows, schedule, batch_size, 7, TrainState(), lambda entry: losses.append(entry["loss"]))
        assert_replicas_equal(model)
    return {"loss": losses, "gradients": gather_full(gradients(model), model), "state": adapter_state_dict(model)}


def observe_noise(model_parallel_size: int) -> dict[str, Any]:
    """A training step whose router is random: all ranks of a model must draw the same."""
    model, batch = build("noisy", model_parallel_size=model_parallel_size).model, tokens(2, 9)
    model.train()
    torch.manual_seed(5)
    loss = model.loss(batch, batch)
    loss.backward()
    return {"loss": loss.detach(), "gradients": gather_full(gradients(model), model)}


def golden_differences(model_parallel_size: int) -> dict[str, float]:
    """Largest difference of logits from the golden ones, by method."""
    found = {}
    for name in GOLDEN_METHODS[dp_rank() :: dp_size()]:
        want, model = expected(name), load(name, model_parallel_size).model
        with torch.no_grad():
            found[name] = (model(want["tokens"]) - want["logits"]).abs().max().item()
    return found


def whole_base(model: Transformer) -> dict[str, torch.Tensor]:
    """All base tensors, whole, from the ranks' parts."""
    found = {}
    for key, (shape, dim) in shard_specs(model).items():
        part = model.get_parameter(key).detach()
        found[key] = part if dim is None else gather(part, Shard(dim, shape[dim] // part.shape[dim]))
    return found


class Reads(TorchDispatchMode):
    """Counts the bytes of tensors that lie in the shards being loaded and on which torch works other than by making
    views."""

    def __init__(self):
        super().__init__()
        self.shards: list[dict[str, torch.Tensor]] = []  # their files stay mapped as long as these are here
        self.bytes = 0

    def __enter__(self):
        self._patch = mock.patch("llama.checkpoint.open_shard", self._open)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.stop()
        super().__exit__(*error)

    def _open(self, file: Path) -> dict[str, torch.Tensor]:
        self.shards.append(open_shard(file))
        return self.shards[-1]

    def in_file(self, tensor: torch.Tensor) -> bool:
        place = tensor.untyped_storage().data_ptr()
        return any(place == held.untyped_storage().data_ptr() for shard in self.shards for held in shard.values())

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not operation.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in tensors if not tensor.is_meta and self.in_file(tensor))
        return operation(*args, **kwargs or {})


def reading(folder: Path) -> dict[str, Any]:
    """What loading a checkpoint as another type reads: by torch's operations, in bytes; of each shard, the share that
    the system mapped into memory; in other ways than by mapping, as a share of all (the last two on Linux)."""

    def otherwise() -> int:
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    model, reads = Transformer(LARGE), Reads()
    with reads:
        torch.zeros(1).add(1)  # torch loads some of itself at the first time
    before = otherwise()
    with reads:
        load_base_weights(model, folder, torch.bfloat16, CPU)
    read = otherwise() - before
    files = sorted(folder.glob("*.pth"))
    sizes = [file.stat().st_size for file in files]
    maps = re.findall(r"(\S+\.pth)\n(?:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    resident = [sum(1024 * int(size) for name, size in maps if name == str(file)) for file in files]
    return {
        "needed": sum(4 * parameter.numel() for parameter in model.parameters()),
        "by torch": reads.bytes,
        "mapped": [part / size for part, size in zip(resident, sizes, strict=True)],
        "otherwise": read / sum(sizes),
    }


def exchanges(rank: int) -> dict[str, torch.Tensor]:
    """The two exchanges beside another branch that shares their gradient or their input."""
    factor = torch.tensor([1.0, 2.0]) * (rank + 1)
    u, v, w = (torch.ones(2, requires_grad=True) for _ in range(3))
    ((copy_to_model_parallel_region(u) + v) * factor).sum().backward()
    x = w * factor
    (reduce_from_model_parallel_region(x) + x).sum().backward()
    return {
        "u": u.grad,
        "v": v.grad,
        "w": w.grad,
        "x": x.detach(),
        "sum": reduce_from_model_parallel_region(x).detach(),
    }


def message(work: Callable[[], Any]) -> str | None:
    """Of the ValueError that `work` raises."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return None


def refusals(folder: Path) -> dict[str, str | None]:
    """What is said of sizes that these ranks cannot share."""
    found = {
        what: message(lambda c=c: Transformer(replace(ARGS, **c), config("lora"))) for what, c in IMPOSSIBLE.items()
    }
    found["no weights"] = message(lambda: Llama.build(folder / "impossible", model_parallel_size=mp_size()))
    found["processes"] = message(lambda: init_distributed(CPU, 3))
    return found


def drifts() -> dict[str, str | None]:
    """What is said when one bit of a tensor changes on one process, by tensor and process."""
    found: dict[str, str | None] = {}
    model = build("soft_moa", model_parallel_size=mp_size()).model
    for key in DRIFTING:
        for rank in range(WORLD):
            bits = model.get_parameter(key).detach().view(torch.int32)
            bits[(-1,) * bits.dim()] ^= int(dist.get_rank() == rank)
            found[f"{key} {rank}"] = message(lambda: assert_replicas_equal(model))
            bits[(-1,) * bits.dim()] ^= int(dist.get_rank() == rank)
    assert_replicas_equal(model)
    other = build("soft_moa" if dist.get_rank() != 2 else "lora", model_parallel_size=mp_size()).model
    found["other adapters"] = message(lambda: assert_replicas_equal(other))
    return found


def main(rank: int, folder: Path) -> None:
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", rendezvous, timeout=timedelta(seconds=60), rank=rank, world_size=WORLD)
    everything: dict[int, dict[str, Any]] = {}
    for size in SIZES:
        init_distributed(CPU, size)
        found = everything[size] = {"rank": mp_rank(), "bases": {}, "copied": {}}
        # Two replicas have no need to observe the same, here and among the golden methods
        found["methods"] = {name: observe(name, size) for name in list(METHODS)[dp_rank() :: dp_size()]}
        found["noise"] = observe_noise(size)
        found["golden"] = golden_differences(size)
        for shards in sorted(folder.glob("base_*")):
            with Reads() as reads:
                model = Llama.build(shards, model_parallel_size=size).model
            found["bases"][shards.name] = whole_base(model)
            copied = {key.split(".")[-2] for key in shard_specs(model) if not reads.in_file(model.get_parameter(key))}
            found["copied"][shards.name] = sorted(copied)
        found["steps"] = {name: observe_step(name, size, exact=True) for name in METHODS} if size == 2 else {}
        found["step in float32"] = observe_step("soft_moa", size, exact=False)
        found["adapters"] = {
            path.name: adapter_state_dict(Llama.build(BASE, path, model_parallel_size=size).model)
            for path in sorted(folder.glob("adapter_*"))
        }
        llm = build(EVERYTHING, model_parallel_size=size)
        state, params = adapter_state_dict(llm.model), adapter_params(llm.model.config, asdict(ARGS))
        if rank == 0:
            save_adapter(folder / f"adapter_{size}", state, params)
        dist.barrier()
        found["read"] = {name: reading(folder / name) for name in ("large_1", "large_4")}
        found |= {"exchanges": exchanges(mp_rank()), "refusals": refusals(folder), "drifts": drifts()}
    torch.save(everything, folder / f"rank{rank}.pt")
    destroy_distributed()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
