"""What a model shows of itself, at any model-parallel size; also the program that each of four processes runs.

As a program: `python tests/helpers/observe.py RANK FOLDER`, RANK of 4, writes FOLDER/rank{RANK}.pt: everything at
model-parallel size 4, then at 2, where the four processes are two replicas of a model cut in two.
"""

import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import dora
from golden import METHODS as GOLDEN_METHODS
from golden import expected, load
from llama import Llama, ModelArgs, Transformer
from llama.checkpoint import load_base_weights, open_shard, shard_specs
from llama.data import IGNORE_INDEX, Example
from llama.distributed import destroy_distributed, dp_rank, dp_size, init_distributed
from moa.adapter_file import adapter_params, save_adapter
from moa.parallel import Shard, gather, mp_rank, mp_size
from moa.state import (
    adapter_parameters,
    adapter_state_dict,
    assert_replicas_equal,
    gather_full,
    reset_adapters,
)
from tiny import ARGS, BASE, METHODS, PARAMS, build, config, float64, gradients, prompts, random_state, tokens
from training.loop import TrainState, make_optimizer, train
from training.schedule import Schedule

WORLD, SIZES = 4, (4, 2)
CPU = torch.device("cpu")
STEPPED = [*METHODS, "mola", "all_kinds"]
OBSERVED = [*METHODS, "mola", "all_kinds", "my_dora"]
PROMPTS = prompts(5, 10, 2)
# Shapes that neither two nor four ranks can share
IMPOSSIBLE = {
    "heads": {"dim": 66, "n_heads": 3, "n_kv_heads": 3},
    "kv_heads": {"dim": 96, "n_heads": 12, "n_kv_heads": 3},
    "ffn": {"multiple_of": 1, "ffn_dim_multiplier": 1.006},  # 170 * 1.006 = 171
    "vocab": {"vocab_size": 511},
}
# Large enough for the system's pages to tell what was read
LARGE = ModelArgs(dim=256, n_layers=1, n_heads=4, n_kv_heads=2, vocab_size=8192)
CLIP = 0.1  # far below the norm of a step's gradient
EVERYTHING = "custom"  # of METHODS
# Tensors of which several processes hold the same: all; by model-parallel rank; pairs of ranks; all
COPIED = (
    "layers.1.attention.adapters.lora_Q.lora_A",
    "layers.1.attention.adapters.lora_Q.lora_B",
    "layers.0.attention.adapters.lora_V.lora_B",
)


def observe(name: str, model_parallel_size: int, ckpt_dir: Path = BASE) -> dict[str, Any]:
    """Everything that must not depend on how many ranks share the model: whole tensors and plain values."""
    with dora.registered() if name == "my_dora" else nullcontext():
        llm = build(name, model_parallel_size=model_parallel_size, ckpt_dir=ckpt_dir)
        model, batch = llm.model, tokens(2, 9)
        seen = {"state": adapter_state_dict(model), "loaded": random_state(model)}
        with torch.no_grad():
            seen["logits"] = model(batch)
        seen["float32"] = _backward(model, batch)
        seen["greedy"] = llm.generate(PROMPTS, max_gen_len=4)
        if model_parallel_size < 4:  # to save time
            seen["sampled"] = llm.generate(PROMPTS, max_gen_len=4, temperature=0.9, top_p=0.9, seed=2)
        with float64(model):
            for choice in ("none", "selective", "full") if model_parallel_size < 4 else ("none",):
                model.activation_checkpointing = choice
                seen[choice] = _backward(model, batch)
        shards = {key: entry.spec.shard for key, entry in adapter_parameters(model, untrained=True).items()}
        seen["shards"] = {key: tuple(shard) for key, shard in shards.items() if shard is not None}
        reset_adapters(model, seed=3)
        return seen | {"fresh": adapter_state_dict(model)}


def _backward(model: Transformer, batch: torch.Tensor) -> dict[str, Any]:
    """Loss, whole gradients and this rank's own."""
    labels = batch.clone()
    labels[0, :5] = IGNORE_INDEX
    loss = model.loss(batch, labels)
    loss.backward()
    local = gradients(model)
    return {"loss": loss.detach(), "gradients": gather_full(local, model), "local": local}


def observe_step(name: str, model_parallel_size: int, exact: bool, grad_clip: float | None = None) -> dict[str, Any]:
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
        arguments = (batch_size, 7, TrainState(), lambda entry: losses.append(entry["loss"]))
        train(model, optimizer, rows, schedule, *arguments, grad_clip=grad_clip)
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
    largest = {}
    for name in GOLDEN_METHODS[dp_rank() :: dp_size()]:
        want, model = expected(name), load(name, model_parallel_size).model
        with torch.no_grad():
            largest[name] = (model(want["tokens"]) - want["logits"]).abs().max().item()
    return largest


def whole_base(model: Transformer) -> dict[str, torch.Tensor]:
    """All base tensors, whole, from the ranks' parts."""
    whole = {}
    for key, (shape, dim) in shard_specs(model).items():
        part = model.get_parameter(key).detach()
        whole[key] = part if dim is None else gather(part, Shard(dim, shape[dim] // part.shape[dim]))
    return whole


def shares_read(folder: Path) -> list[float]:
    """Of each shard of a checkpoint that is loaded as another type, the share that the system read (Linux)."""
    files, shards = sorted(folder.glob("*.pth")), []  # files stay mapped as long as their tensors are here
    with mock.patch("llama.checkpoint.open_shard", lambda file: shards.append(open_shard(file)) or shards[-1]):
        load_base_weights(Transformer(LARGE), folder, torch.bfloat16, CPU)
    maps = re.findall(r"(\S+\.pth)\n(?:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    resident = [sum(1024 * int(size) for name, size in maps if name == str(file)) for file in files]
    return [part / file.stat().st_size for part, file in zip(resident, files, strict=True)]


def message(work: Callable[[], Any]) -> str | None:
    """Of the ValueError that `work` raises."""
    try:
        work()
    except ValueError as error:
        return str(error)
    return None


def refusals(folder: Path) -> dict[str, str | None]:
    """The messages about sizes that these ranks cannot share."""
    messages = {
        name: message(lambda c=change: Transformer(ModelArgs(**(PARAMS | c)), config("lora")))
        for name, change in IMPOSSIBLE.items()
    }
    messages["no weights"] = message(lambda: Llama.build(folder / "impossible", model_parallel_size=mp_size()))
    messages["processes"] = message(lambda: init_distributed(CPU, 3))
    return messages


def drifts() -> dict[str, str | None]:
    """The messages when one bit of a tensor changes on one process, by tensor and process."""
    messages: dict[str, str | None] = {}
    model = build("soft_moa", model_parallel_size=mp_size()).model
    for key, rank in [(COPIED[0], 0), *((key, 3) for key in COPIED)]:
        bits = model.get_parameter(key).detach().view(torch.int32)
        bits[(-1,) * bits.dim()] ^= int(dist.get_rank() == rank)
        messages[f"{key} {rank}"] = message(lambda: assert_replicas_equal(model))
        bits[(-1,) * bits.dim()] ^= int(dist.get_rank() == rank)
    assert_replicas_equal(model)
    return messages


def main(rank: int, folder: Path) -> None:
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", rendezvous, timeout=timedelta(seconds=60), rank=rank, world_size=WORLD)
    by_size: dict[int, dict[str, Any]] = {}
    for size in SIZES:
        init_distributed(CPU, size)
        seen = by_size[size] = {"rank": mp_rank()}
        # Two replicas have no need to observe the same, here and among the golden methods
        seen["methods"] = {name: observe(name, size) for name in OBSERVED[dp_rank() :: dp_size()]}
        seen["steps"] = {name: observe_step(name, size, exact=True) for name in STEPPED} if size == 2 else {}
        seen["step in float32"] = observe_step("soft_moa", size, exact=False)
        seen["clipped step"] = observe_step(EVERYTHING, size, exact=True, grad_clip=CLIP)
        seen |= {"noise": observe_noise(size), "golden": golden_differences(size)}
        bases = {path.name: Llama.build(path, model_parallel_size=size) for path in sorted(folder.glob("base_*"))}
        seen["bases"] = {name: whole_base(llm.model) for name, llm in bases.items()}
        seen["adapters"] = {
            path.name: adapter_state_dict(Llama.build(BASE, path, model_parallel_size=size).model)
            for path in sorted(folder.glob("adapter_*"))
        }
        model = build(EVERYTHING, model_parallel_size=size).model
        state, params = adapter_state_dict(model), adapter_params(model.config, asdict(ARGS))
        dist.barrier()
        if rank == 0:
            save_adapter(folder / f"adapter_{size}", state, params)
        dist.barrier()
        seen |= {"read": shares_read(folder / "large"), "refusals": refusals(folder), "drifts": drifts()}
    torch.save(by_size, folder / f"rank{rank}.pt")
    destroy_distributed()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
