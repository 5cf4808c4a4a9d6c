"""What a model shows of itself, at any model-parallel size; also the program that one process of two runs.

As a program: `python tests/observe.py RANK FOLDER`, RANK of 2, writes FOLDER/rank{RANK}.pt.
"""

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from llama import Llama, Transformer
from llama.args import ModelArgs
from llama.checkpoint import placements
from llama.parallel import start_processes, stop_processes
from moa.parallel import copy_to_ranks, gather, sum_over_ranks
from moa.state import adapter_parameters, adapter_state, whole
from tiny import ARGS, METHODS, build, config, gradients, random_state, tokens

PROMPTS = [[256, *tokens(n, seed=n).tolist()] for n in (4, 9, 1)]
# Sizes that two ranks cannot share
IMPOSSIBLE = {
    "heads": {"dim": 66, "n_heads": 3, "n_kv_heads": 3},
    "kv_heads": {"dim": 96, "n_heads": 6, "n_kv_heads": 3},
    "ffn": {"multiple_of": 1, "ffn_dim_multiplier": 1.006},  # 170 * 1.006 = 171
    "vocab": {"vocab_size": 511},
}


def observe(name: str, model_parallel_size: int) -> dict[str, Any]:
    """Everything that must not depend on how many ranks share the model: whole tensors and plain values."""
    fresh = adapter_state(build(name, seed=None, model_parallel_size=model_parallel_size).model)
    llm = build(name, model_parallel_size=model_parallel_size)
    model, batch = llm.model, tokens(2, 9)
    labels = batch.clone()
    labels[0, :5] = -100
    found = {"fresh": fresh, "state": adapter_state(model), "loaded": random_state(model)}
    found["logits"] = model(batch).detach()
    loss = model.loss(batch, labels)
    loss.backward()
    found["loss"] = loss.detach()
    local = gradients(model)
    found["gradients"] = whole(local, model)
    model.activation_checkpointing = True
    model.loss(batch, labels).backward()
    found["checkpointed"] = whole(gradients(model), model)
    cuts = {key: entry.declared.cut for key, entry in adapter_parameters(model).items()}
    found["cut"] = sorted(key for key, cut in cuts.items() if cut is not None)
    found["replicated"] = {key: grad for key, grad in local.items() if cuts[key] is None}
    found["greedy"] = llm.generate(PROMPTS, max_gen_len=8)
    found["sampled"] = llm.generate(PROMPTS, max_gen_len=8, temperature=0.9, top_p=0.9, seed=2)
    return found


def observe_noise(model_parallel_size: int) -> dict[str, Any]:
    """A training step whose router is random: all ranks of a model must draw the same."""
    model, batch = build("noisy", model_parallel_size=model_parallel_size).model, tokens(2, 9)
    model.train()
    torch.manual_seed(5)
    loss = model.loss(batch, batch)
    loss.backward()
    return {"loss": loss.detach(), "gradients": whole(gradients(model), model)}


def whole_base(model: Transformer) -> dict[str, torch.Tensor]:
    """All base tensors, whole, from the ranks' parts."""
    parameters = dict(model.named_parameters())
    return {
        key: parameters[key].detach() if place.cut is None else gather(parameters[key].detach(), place.cut)
        for key, place in placements(model).items()
    }


def exchanges(rank: int) -> dict[str, torch.Tensor]:
    """The two exchanges beside another branch that shares their gradient or their input."""
    factor = torch.tensor([1.0, 2.0]) * (rank + 1)
    u, v, w = (torch.ones(2, requires_grad=True) for _ in range(3))
    ((copy_to_ranks(u) + v) * factor).sum().backward()
    x = w * factor
    (sum_over_ranks(x) + x).sum().backward()
    return {"u": u.grad, "v": v.grad, "w": w.grad, "x": x.detach(), "sum": sum_over_ranks(x).detach()}


def main(rank: int, folder: Path) -> None:
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", rendezvous, timeout=timedelta(seconds=60), rank=rank, world_size=2)
    found: dict[str, Any] = {name: observe(name, 2) for name in METHODS}
    found["bases"] = {
        shards.name: whole_base(Llama.build(shards, device="cpu", model_parallel_size=2).model)
        for shards in sorted(folder.glob("base_*"))
    }
    found["noise"] = observe_noise(2)
    found["exchanges"] = exchanges(rank)
    errors = found["errors"] = {}
    for what, change in IMPOSSIBLE.items():
        args: ModelArgs = replace(ARGS, **change)
        try:
            Transformer(args, config("lora"))
        except ValueError as error:
            errors[what] = str(error)
    try:
        start_processes(torch.device("cpu"), 3)
    except ValueError as error:
        errors["processes"] = str(error)
    torch.save(found, folder / f"rank{rank}.pt")
    stop_processes()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
