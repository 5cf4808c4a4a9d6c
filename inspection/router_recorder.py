"""What the routers of a model return while it runs, recorded by forward hooks. Without a recorder a model has no hook.

The hooks only keep tensors; every few thousand tokens a consumer gets them all at once, so that the many small forward
passes of generation cost almost nothing more.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llama.packing import PackedBatch
from moa.adapter import AdapterModule
from moa.routers import SparseRouter


@dataclass
class RouterBatch:
    """T tokens of any number of forward passes, in the order in which the model read them.

    is_answer: (T,) bool, False for tokens of a prompt. gates: layer -> slot -> (T, 1), or (R, 1) where the layer's
    router runs once per sequence. thresholds: layer -> (T, 1), of sparse routers. experts: (layer, slot) -> (T, E), the
    weights of an adapter's experts.
    """

    is_answer: Tensor
    gates: dict[int, dict[str, Tensor]]
    thresholds: dict[int, Tensor]
    experts: dict[tuple[int, str], Tensor]


class RouterRecorder:
    """`with RouterRecorder(model, consume): ...` calls `consume` with a RouterBatch whenever `flush_tokens` tokens have
    been read inside, and at the end with the rest. For forward passes without gradients."""

    def __init__(self, model: nn.Module, consume: Callable[[RouterBatch], None], flush_tokens: int = 8192):
        self.model, self.consume, self.flush_tokens = model, consume, flush_tokens
        self._handles: list[Any] = []
        self._clear()

    def __enter__(self) -> "RouterRecorder":
        assert not self._handles, "a recorder records once at a time"
        self._handles.append(self.model.layers[0].register_forward_pre_hook(self._start_pass))
        for block in self.model.layers:
            if block.router is not None:
                self._handles.append(block.router.register_forward_hook(partial(self._keep_gates, block.layer)))
        for layer, slot, adapter in multi_expert_adapters(self.model):
            hook = partial(self._keep_experts, (layer, slot))
            self._handles.append(adapter.expert_router.register_forward_hook(hook))
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if error_type is None:
            self.flush()
        self._clear()

    @torch.no_grad()
    def flush(self) -> None:
        """Hand the kept tensors to the consumer."""
        if not self._is_answer:
            return
        gates = {
            layer: {slot: torch.cat([gates[slot] for gates in kept]) for slot in kept[0]}
            for layer, kept in self._gates.items()
        }
        thresholds = {layer: torch.cat(kept) for layer, kept in self._thresholds.items()}
        experts = {key: torch.cat(kept) for key, kept in self._experts.items()}
        is_answer = torch.tensor(self._is_answer, device=self.model.output.weight.device)
        self._clear()
        self.consume(RouterBatch(is_answer, gates, thresholds, experts))

    def _clear(self) -> None:
        self._is_answer: list[bool] = []
        self._gates: dict[int, list[dict[str, Tensor]]] = defaultdict(list)
        self._thresholds: dict[int, list[Tensor]] = defaultdict(list)
        self._experts: dict[tuple[int, str], list[Tensor]] = defaultdict(list)

    def _start_pass(self, block: nn.Module, args: tuple[Tensor, Any]) -> None:
        """args: hidden states (N, D), and the pass's context: its PackedBatch, or None in a decode step, all of whose
        tokens are answer."""
        if len(self._is_answer) >= self.flush_tokens:
            self.flush()
        batch: PackedBatch | None = args[1].batch
        if batch is None:
            self._is_answer += [True] * len(args[0])
            return
        for length, prompt_len in zip(batch.lengths, batch.prompt_lens, strict=True):
            self._is_answer += [False] * prompt_len + [True] * (length - prompt_len)

    def _keep_gates(self, layer: int, router: AdapterModule, args: tuple[Tensor], gates: dict[str, Tensor]) -> None:
        self._gates[layer].append(gates)
        if isinstance(router, SparseRouter):
            threshold = router.limit(None if router.threshold is None else router.threshold(args[0]))
            if not isinstance(threshold, Tensor):
                threshold = torch.full_like(next(iter(gates.values())), threshold)
            self._thresholds[layer].append(threshold)

    def _keep_experts(self, key: tuple[int, str], router: nn.Module, args: tuple, output: tuple[Tensor, Any]) -> None:
        self._experts[key].append(output[0])


def multi_expert_adapters(model: nn.Module) -> list[tuple[int, str, AdapterModule]]:
    """(layer, slot, adapter) of the adapters that have several experts, in the order of layers and slots."""
    adapters = []
    for block in model.layers:
        by_slot = {**block.attention.adapters, **block.feed_forward.adapters, **block.adapters}
        slots = model.config.slots(block.layer) if model.config else []
        adapters += [(block.layer, slot.name, by_slot[slot.name]) for slot in slots]
    return [(layer, slot, adapter) for layer, slot, adapter in adapters if adapter.expert_router is not None]
