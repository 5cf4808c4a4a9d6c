"""What the routers of a model return while it runs, recorded by forward hooks. Without a recorder a model has no hook.

The hooks only keep tensors; every few thousand tokens a consumer gets them all at once, so that the many small forward
passes of generation cost almost nothing more.
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llama.packing import PackedBatch
from moa.adapter import AdapterModule
from moa.routers import SparseRouter


class RouterKey(NamedTuple):
    """What a router returned. kind: "gates" (N, slots of the layer) or "threshold" (N, 1) of a block's router,
    "experts" (N, E) of the one of an adapter."""

    kind: str
    layer: int
    slot: str | None = None


class RouterBatch(NamedTuple):
    """T tokens of any number of forward passes, in the order in which the model read them.

    is_answer: (T,) bool, False for tokens of a prompt. values: (T, columns) by key, or (R, columns) where the layer's
    router runs once per sequence.
    """

    is_answer: Tensor
    values: dict[RouterKey, Tensor]


class RouterRecorder:
    """`with RouterRecorder(model, consume): ...` calls `consume` with a RouterBatch whenever `flush_tokens` tokens have
    been read inside, and at the end with the rest. For forward passes without gradients."""

    def __init__(self, model: nn.Module, consume: Callable[[RouterBatch], None], flush_tokens: int = 8192):
        self.model, self.consume, self.flush_tokens = model, consume, flush_tokens
        self._handles: list[Any] = []
        self._is_answer: list[bool] = []
        self._kept: dict[RouterKey, list[Tensor]] = defaultdict(list)

    def __enter__(self) -> "RouterRecorder":
        self._handles = [self.model.layers[0].register_forward_pre_hook(self._start_pass)]
        for block in self.model.layers:
            if block.router is not None:
                self._handles.append(block.router.register_forward_hook(partial(self._keep_gates, block.layer)))
        for layer, slot, adapter in multi_expert_adapters(self.model):
            hook = partial(self._keep_experts, RouterKey("experts", layer, slot))
            self._handles.append(adapter.expert_router.register_forward_hook(hook))
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        if error_type is None:
            self._flush()

    @torch.no_grad()
    def _flush(self) -> None:
        if self._is_answer:
            values = {key: torch.cat(kept) for key, kept in self._kept.items()}
            self.consume(RouterBatch(torch.tensor(self._is_answer, device=self.model.output.weight.device), values))
        self._is_answer, self._kept = [], defaultdict(list)

    def _start_pass(self, block: nn.Module, args: tuple[Tensor, Any]) -> None:
        """args: hidden states (N, D), and the pass's context: its PackedBatch, or None in a decode step, all of whose
        tokens are answer."""
        if len(self._is_answer) >= self.flush_tokens:
            self._flush()
        batch: PackedBatch | None = args[1].batch
        if batch is None:
            self._is_answer += [True] * len(args[0])
            return
        for length, prompt_len in zip(batch.lengths, batch.prompt_lens, strict=True):
            self._is_answer += [False] * prompt_len + [True] * (length - prompt_len)

    def _keep_gates(self, layer: int, router: AdapterModule, args: tuple[Tensor], gates: dict[str, Tensor]) -> None:
        self._kept[RouterKey("gates", layer)].append(torch.cat(list(gates.values()), 1))
        if isinstance(router, SparseRouter):
            threshold = router.limit(None if router.threshold is None else router.threshold(args[0]))
            if not isinstance(threshold, Tensor):
                threshold = torch.full_like(next(iter(gates.values())), threshold)
            self._kept[RouterKey("threshold", layer)].append(threshold)

    def _keep_experts(self, key: RouterKey, router: nn.Module, args: tuple, output: tuple[Tensor, Any]) -> None:
        self._kept[key].append(output[0])


def multi_expert_adapters(model: nn.Module) -> list[tuple[int, str, AdapterModule]]:
    """(layer, slot, adapter) of the adapters that have several experts, in the order of layers and slots."""
    adapters = []
    for block in model.layers:
        by_slot = {**block.attention.adapters, **block.feed_forward.adapters, **block.adapters}
        slots = model.config.slots(block.layer) if model.config else []
        adapters += [(block.layer, slot.name, by_slot[slot.name]) for slot in slots]
    return [(layer, slot, adapter) for layer, slot, adapter in adapters if adapter.expert_router is not None]


def read_answers(llm: Any, prompts: list[list[int]], answers: list[list[int]]) -> None:
    """Run one forward pass over each prompt with its answer, cut at max_seq_len, `max_batch_size` rows at a time."""
    device = llm.model.output.weight.device
    for begin in range(0, len(prompts), llm.max_batch_size):
        part = slice(begin, begin + llm.max_batch_size)
        rows = [(p + a)[: llm.max_seq_len] for p, a in zip(prompts[part], answers[part], strict=True)]
        batch = PackedBatch([len(tokens) for tokens in rows], device, [len(prompt) for prompt in prompts[part]])
        with torch.inference_mode():
            llm.model.forward_hidden(torch.tensor([token for tokens in rows for token in tokens], device=device), batch)
