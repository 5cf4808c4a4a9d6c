"""What the routers of a model say while it runs, taken by forward hooks. The model is not touched; without a recorder
it has no hook and pays nothing.

The hooks only keep what the routers return; every few thousand tokens a consumer gets it all at once, so that the many
small forward passes of generation cost almost nothing more.
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

TOKENS_AT_ONCE = 8192  # what is kept before the consumer gets it


@dataclass
class Batch:
    """T tokens of any number of forward passes, in the order in which the model read them.

    answer: (T,) bool, whether a token is one of an answer (False: of a prompt). gates: layer -> slot -> (T, 1), or
    (R, 1) where the layer's router is asked once per row. limits: layer -> (T, 1), the thresholds of a sparse router.
    experts: (layer, slot) -> (T, E), the weights of an adapter's experts.
    """

    answer: Tensor
    gates: dict[int, dict[str, Tensor]]
    limits: dict[int, Tensor]
    experts: dict[tuple[int, str], Tensor]


class Recorder:
    """`with Recorder(model, consume): ...` calls `consume` with the batches of what runs inside, the last one at the
    end. For forward passes without gradients; those of `Transformer.hidden`, and so of all that uses it."""

    def __init__(self, model: nn.Module, consume: Callable[[Batch], None], tokens_at_once: int = TOKENS_AT_ONCE):
        self.model, self.consume, self.tokens_at_once = model, consume, tokens_at_once
        self._handles: list[Any] = []
        self._clear()

    def __enter__(self) -> "Recorder":
        assert not self._handles, "a recorder records once at a time"
        keep = self._handles.append
        keep(self.model.layers[0].register_forward_pre_hook(self._begin))
        for block in self.model.layers:
            if block.router is not None:
                keep(block.router.register_forward_hook(partial(self._gates, block.layer)))
        for layer, slot, adapter in mixtures(self.model):
            keep(adapter.expert_router.register_forward_hook(partial(self._experts, (layer, slot))))
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if kind is None:
            self.flush()
        self._clear()

    @torch.no_grad()
    def flush(self) -> None:
        """Hand over what has been kept."""
        if not self._passes:
            return
        gates = {
            layer: {slot: torch.cat([gates[slot] for gates in kept]) for slot in kept[0]}
            for layer, kept in self._kept_gates.items()
        }
        limits = {layer: torch.cat(kept) for layer, kept in self._kept_limits.items()}
        experts = {place: torch.cat(kept) for place, kept in self._kept_experts.items()}
        batch = Batch(torch.tensor(_is_answer(self._passes), device=_device(self.model)), gates, limits, experts)
        self._clear()
        self.consume(batch)

    def _clear(self) -> None:
        self._passes: list[PackedBatch] = []
        self._tokens = 0
        self._kept_gates: dict[int, list[dict[str, Tensor]]] = defaultdict(list)
        self._kept_limits: dict[int, list[Tensor]] = defaultdict(list)
        self._kept_experts: dict[tuple[int, str], list[Tensor]] = defaultdict(list)

    def _begin(self, block: nn.Module, args: tuple) -> None:
        """A forward pass begins: args are the hidden states and the step, which knows the rows."""
        if self._tokens >= self.tokens_at_once:
            self.flush()
        rows = args[1].rows
        self._passes.append(rows)
        self._tokens += sum(rows.lengths)

    def _gates(self, layer: int, router: AdapterModule, args: tuple[Tensor], gates: dict[str, Tensor]) -> None:
        self._kept_gates[layer].append(gates)
        if hasattr(router, "limit"):
            limit = router.limit(args[0])
            if not isinstance(limit, Tensor):
                limit = torch.full_like(next(iter(gates.values())), limit)
            self._kept_limits[layer].append(limit)

    def _experts(self, place: tuple[int, str], router: AdapterModule, args: tuple, output: tuple[Tensor, Any]) -> None:
        self._kept_experts[place].append(output[0])


def mixtures(model: nn.Module) -> list[tuple[int, str, AdapterModule]]:
    """(layer, slot, adapter) of the adapters that have several experts, in the order of layers and slots."""
    found = []
    for block in model.layers:
        adapters = {**block.attention.adapters, **block.feed_forward.adapters, **block.adapters}
        slots = model.config.slots(block.layer) if model.config else []
        found += [(block.layer, slot.name, adapters[slot.name]) for slot in slots]
    return [(layer, slot, adapter) for layer, slot, adapter in found if adapter.expert_router is not None]


def _is_answer(passes: list[PackedBatch]) -> list[bool]:
    """Of each token. What is read behind a row's first pass is answer."""
    marks: list[bool] = []
    for rows in passes:
        for start, length, prompt_len in zip(rows.starts, rows.lengths, rows.prompt_lens, strict=True):
            prompt = 0 if start else prompt_len
            marks += [False] * prompt + [True] * (length - prompt)
    return marks


def _device(model: nn.Module) -> torch.device:
    return model.output.weight.device
