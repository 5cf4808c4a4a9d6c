"""Where the CPU would wait for a GPU: nowhere in the passes of a training step, nor in a decode step up to the tokens
that it chooses. Seen without a GPU, on the meta device, whose tensors cannot tell their values either."""

from collections.abc import Callable
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
from tiny import ARGS, METHODS, config
from training.data import micro_batches
from training.estimate import meta_model

DEVICE = torch.device("meta")
ROWS = [Example(list(range(n)), [IGNORE_INDEX] * p + list(range(p, n)), p) for n, p in ((5, 2), (3, 2), (7, 3))]


class Copies(TorchDispatchMode):
    """Counts what goes to the device, and notes what of it waits."""

    def __init__(self):
        super().__init__()
        self.all, self.waiting = 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | (kwargs or {})
        match func.overloadpacket.__name__:
            case "to" | "_to_copy":
                self._note(given["self"], out, given.get("non_blocking", False))
            case "copy_":
                self._note(given["src"], given["self"], given.get("non_blocking", False))
            case "index" | "index_put_" | "_index_put_impl_":
                for index in given["indices"]:
                    if index is not None:
                        self._note(index, given["self"], False)
        return out

    def __enter__(self) -> "Copies":
        self._calls = _Calls(self._note)
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error)

    def _note(self, source: Tensor, target: Tensor, non_blocking: bool) -> None:
        if source.device != target.device:
            self.all += 1
            if not non_blocking:
                self.waiting.append(f"{tuple(source.shape)}: {source.device} to {target.device}")


class _Calls(TorchFunctionMode):
    """Numbers that a call itself brings to the device, which no operation shows."""

    def __init__(self, note: Callable[[Tensor, Tensor, bool], None]):
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            self._note(torch.empty(0), out, False)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(part, list) for part in index):
                self._note(torch.empty(0), args[0], False)
        return out


@pytest.fixture(autouse=True)
def alone() -> None:
    init_distributed(torch.device("cpu"))


def test_what_waits_is_seen() -> None:
    with Copies() as copies:
        tensor = torch.ones(3).to(DEVICE, non_blocking=True)
        assert copies.all == 1 and not copies.waiting
        torch.ones(3).to(DEVICE)
        tensor.copy_(torch.ones(3))
        tensor[[0, 1]] = 0.0
        tensor[torch.tensor([0, 1])] = 0.0
        torch.tensor([1, 2], device=DEVICE)
        assert len(copies.waiting) == 5, copies.waiting
    for ask in (tensor.tolist, tensor.nonzero, tensor.sum().item, lambda: bool(tensor.any())):
        with pytest.raises((RuntimeError, NotImplementedError)):
            ask()


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_training(name: str, accelerated: bool, recompute: str) -> None:
    model = meta_model(ARGS, config(name), bf16=True)
    if accelerated:
        accelerate_model(model)
    model.activation_checkpointing = recompute
    model.extend_rope_cache(20, DEVICE)
    with Copies() as copies:
        ((tokens, labels, batch),) = micro_batches(ROWS, 4, DEVICE)
        losses = model(tokens, labels=labels, batch=batch)
        stats = losses.router_stats
        aux = 0 if stats is None else model.load_balancing_loss(stats, stats.tokens_per_expert / 15)
        (losses.ce_loss + aux).backward()
    assert copies.all >= 3 and not copies.waiting
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", [None, *METHODS])
def test_decoding(name: str | None) -> None:
    model = meta_model(ARGS, config(name), bf16=True).eval()
    params = SamplingParams((0, 1), min_new_tokens=3, temperature=0.5, top_p=0.9)
    requests = [Request(i, row.tokens, 5, [0.5] * 5) for i, row in enumerate(ROWS)]
    with torch.inference_mode(), FastDecoding(model).running(5, hooked=False) as decode:
        cache = model.new_cache(3, 20)
        prefill(model, cache, [row.tokens for row in ROWS], DEVICE)
        next_tokens = async_to_device([1, 2, 3], DEVICE)
        with Copies() as copies:
            tokens = sample_running(decode(model, cache, next_tokens).float(), requests, params)
        assert copies.all == 4 and not copies.waiting  # lengths; early rows, stops, uniforms
        assert tokens.shape == (3,) and tokens.device == DEVICE
        with Copies() as copies:
            next_tokens = remove(cache, requests, tokens, requests[:1])
        assert copies.all == 1 and not copies.waiting and next_tokens.shape == (2,)
