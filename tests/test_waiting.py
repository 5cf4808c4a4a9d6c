"""Where the CPU would wait for a GPU: nowhere in the passes of a training step, nor in a decode step up to the tokens
that it chooses. Seen without a GPU, on the meta device, whose tensors cannot tell their values either."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llama.accelerate import FastDecoding, accelerate_model
from llama.data import IGNORE_INDEX, Example
from llama.distributed import init_distributed
from llama.engine import Request, SamplingParams, prefill, remove, sample_running
from llama.packing import async_to_device
from tiny import ALL, ARGS, METHODS, config
from training.data import micro_batches
from training.estimate import meta_model

DEVICE = torch.device("meta")
ROWS = [Example(list(range(n)), [IGNORE_INDEX] * p + list(range(p, n)), p) for n, p in ((5, 2), (3, 2), (7, 3))]


class Copies(TorchDispatchMode):
    """Notes the operations that bring a tensor to the device: whether each waits."""

    def __init__(self):
        super().__init__()
        self.waiting: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        values = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | (kwargs or {})
        sources = [values.get("src", values.get("self"))]
        if func.overloadpacket.__name__ in ("index", "index_put_", "_index_put_impl_"):
            sources += values["indices"]
        for source in sources:
            if isinstance(out, Tensor) and isinstance(source, Tensor) and source.device != out.device:
                self.waiting.append(not values.get("non_blocking", False))
        return out


class Numbers(TorchFunctionMode):
    """Notes calls that bring Python's numbers to the device, which no operation shows."""

    waiting = False

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor):
            self.waiting |= out.device == DEVICE and not isinstance(args[0], Tensor)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.waiting |= args[0].device == DEVICE and any(isinstance(part, list) for part in index)
        return out


@pytest.fixture(autouse=True)
def single_process() -> None:
    init_distributed(torch.device("cpu"))


def test_what_waits_is_seen() -> None:
    with Copies() as copies:
        tensor = torch.ones(3).to(DEVICE, non_blocking=True)
        torch.ones(3).to(DEVICE)
        tensor.copy_(torch.ones(3))
        tensor[torch.tensor([0, 1])] = 0.0
    assert copies.waiting == [False, True, True, True]
    for bring in (lambda: torch.tensor([1, 2], device=DEVICE), lambda: tensor[[0, 1]]):
        with Numbers() as numbers:
            bring()
        assert numbers.waiting
    for read in (tensor.tolist, tensor.nonzero, tensor.sum().item, lambda: bool(tensor.any())):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_training(name: str, accelerated: bool) -> None:
    model = meta_model(ARGS, config(name), bf16=True)
    if accelerated:
        accelerate_model(model)
    model.activation_checkpointing = "full"  # so that each forward runs also in the backward pass
    model.extend_rope_cache(20, DEVICE)
    with Copies() as copies, Numbers() as numbers:
        ((tokens, labels, batch),) = micro_batches(ROWS, 4, DEVICE)
        losses = model(tokens, labels=labels, batch=batch)
        stats = losses.router_stats
        aux = 0 if stats is None else model.load_balancing_loss(stats, stats.tokens_per_expert / 15)
        (losses.ce_loss + aux).backward()
    assert len(copies.waiting) >= 3 and not any(copies.waiting) and not numbers.waiting
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ALL)
def test_decoding(name: str | None) -> None:
    model = meta_model(ARGS, config(name), bf16=True).eval()
    params = SamplingParams((0, 1), min_new_tokens=3, temperature=0.5, top_p=0.9)
    requests = [Request(i, row.tokens, 5, [0.5] * 5) for i, row in enumerate(ROWS)]
    with torch.inference_mode(), FastDecoding(model).running(5, hooked=False) as decode:
        cache = model.new_cache(3, 20)
        prefill(model, cache, [row.tokens for row in ROWS], DEVICE)
        next_tokens = async_to_device([1, 2, 3], DEVICE)
        with Copies() as copies, Numbers() as numbers:
            tokens = sample_running(decode(model, cache, next_tokens).float(), requests, params)
        assert copies.waiting == [False] * 4 and not numbers.waiting  # lengths; early rows, stops, uniforms
        assert tokens.shape == (3,) and tokens.device == DEVICE
        with Copies() as copies:
            next_tokens = remove(cache, requests, tokens, requests[:1])
        assert copies.waiting == [False] and next_tokens.shape == (2,)
