"""What two processes really exchange and hold: the program that one of them runs.

`python tests/count.py RANK FOLDER`, RANK of 2, writes FOLDER/rank{RANK}.json.
"""

import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks

from llama import ModelArgs, Transformer
from llama.distributed import destroy_distributed, init_distributed
from llama.engine import decode, prefill
from llama.packing import PackedBatch
from moa.state import adapter_parameters, freeze_base, reset_adapters
from tiny import ARGS, METHODS, config
from training.config import RECOMPUTED
from training.exchange import GradientSum

LENGTHS = [7, 9, 4]
PROMPT = 6  # tokens of each of two rows that are generated
# Name -> method, shape, bf16; the last one's key/value head is held by both ranks
CASES: dict[str, tuple[str, ModelArgs, bool]] = {name: (name, ARGS, False) for name in METHODS}
CASES["bf16"] = ("soft_moa", ARGS, True)
CASES["shared heads"] = ("custom", replace(ARGS, n_kv_heads=1), False)


def zeros(method: str, args: ModelArgs, bf16: bool) -> Transformer:
    """A model whose base is zero: what is kept and exchanged does not depend on values."""
    model = Transformer(args, config(method))
    base = {name: t for name, t in model.named_parameters() if t.is_meta}
    dtype = torch.bfloat16 if bf16 else torch.float32
    model.load_state_dict({name: torch.zeros(t.shape, dtype=dtype) for name, t in base.items()}, False, assign=True)
    reset_adapters(model, 0)
    freeze_base(model)
    return model.train()


def kept_bytes(model: Transformer, lengths: list[int]) -> tuple[int, torch.Tensor]:
    """Bytes that autograd keeps beside the model's own tensors, by their addresses; and the loss."""
    found: dict[int, torch.UntypedStorage] = {}
    tokens = torch.ones(sum(lengths), dtype=torch.int64)
    with saved_tensors_hooks(partial(note, found), lambda t: t):
        losses = model.losses(tokens, tokens.clone(), PackedBatch(lengths, "cpu"))
    own = {t.untyped_storage().data_ptr() for t in model.parameters()}
    return sum(s.nbytes() for address, s in found.items() if address not in own), losses.labels + losses.auxiliary


def kept_in_parts(model: Transformer, lengths: list[int]) -> int:
    """Bytes that autograd keeps, beside what is kept anyway, of the largest part that the backward pass is to work out
    again. The parts are run once, each under a note of its own."""
    recompute, parts = model.activation_checkpointing, []
    name = {"off": None, "ffn": "_second_half", "all": "forward"}[recompute]

    def noted(part: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: torch.Tensor, *others: Any) -> Any:
            parts.append({})
            with saved_tensors_hooks(partial(note, parts[-1]), lambda t: t):
                note(outside, x)
                outputs = part(x, *others)
            return outputs

        return run

    outside: dict[int, torch.UntypedStorage] = {}
    tokens = torch.ones(sum(lengths), dtype=torch.int64)
    with ExitStack() as stack:
        for block in model.layers if name else ():
            stack.enter_context(mock.patch.object(block, name, noted(getattr(block, name))))
        model.activation_checkpointing = "off"
        stack.enter_context(saved_tensors_hooks(partial(note, outside), lambda t: t))
        losses = model.losses(tokens, tokens.clone(), PackedBatch(lengths, "cpu"))
    model.activation_checkpointing = recompute
    own = {t.untyped_storage().data_ptr() for t in model.parameters()}
    assert losses.labels.requires_grad
    sizes = [sum(s.nbytes() for address, s in part.items() if address not in own | {*outside}) for part in parts]
    return max(sizes, default=0)


def note(found: dict[int, torch.UntypedStorage], tensor: torch.Tensor) -> torch.Tensor:
    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
    return tensor


class Counted:
    """All exchanges from now on, as [kind, ranks, bytes]."""

    def __init__(self) -> None:
        self.all: list[list[Any]] = []
        for kind, which in (("all_reduce", 0), ("all_gather", 1)):
            self._count(kind, which)

    def _count(self, kind: str, which: int) -> None:
        real = getattr(dist, kind)

        def counting(*args: Any, **kwargs: Any) -> Any:
            size = args[which].numel() * args[which].element_size()
            self.all.append([kind, dist.get_world_size(kwargs.get("group")), size])
            return real(*args, **kwargs)

        setattr(dist, kind, counting)

    def take(self) -> list[list[Any]]:
        taken, self.all = self.all, []
        return taken


def observe(name: str, counted: Counted) -> dict[str, Any]:
    model = zeros(*CASES[name])
    found: dict[str, Any] = {}
    for kind in RECOMPUTED:
        model.activation_checkpointing = kind
        counted.take()
        kept, loss = kept_bytes(model, LENGTHS)
        forward = counted.take()
        loss.backward()
        found[kind] = {"kept": kept, "forward": forward, "backward": counted.take()}
    adapters = [entry.parameter for entry in adapter_parameters(model).values()]
    found["adapters"] = sum(p.numel() * 4 for p in adapters)
    found["base"] = sum(p.numel() * p.element_size() for p in model.parameters()) - found["adapters"]
    model.eval()
    with torch.inference_mode():
        cache = model.new_cache(2, PROMPT + 1)
        found["cache"] = sum(t.nbytes for t in (*cache.k, *cache.v))
        prefill(model, cache, [[1] * PROMPT, [2] * PROMPT], torch.device("cpu"))
        found["prefill"] = counted.take()
        decode(model, cache, torch.tensor([1, 1]))
        found["decode"] = counted.take()
    return found


def observe_gradients(name: str, counted: Counted) -> list[list[Any]]:
    """What two replicas exchange at a step's end."""
    exchange = GradientSum([entry.parameter for entry in adapter_parameters(zeros(*CASES[name])).values()])
    counted.take()
    exchange.finish()
    exchange.close()
    return counted.take()


def main(rank: int, folder: Path) -> None:
    rendezvous = f"file://{folder / 'rendezvous'}"
    dist.init_process_group("gloo", rendezvous, timeout=timedelta(seconds=60), rank=rank, world_size=2)
    init_distributed(torch.device("cpu"), 2)
    counted = Counted()
    found = {name: observe(name, counted) for name in CASES}
    init_distributed(torch.device("cpu"), 1)
    for name in CASES:
        found[name]["gradients"] = observe_gradients(name, counted)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    destroy_distributed()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
