"""What the routers of a model return while it reads rows, recorded by forward hooks that are gone afterwards."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llama import Llama
from llama.packing import PackedBatch
from moa.adapter import AdapterModule
from moa.comol import CoMoL
from moa.routers import SparseRouter


class RouterKey(NamedTuple):
    """A router: that of a layer's block, or (slot) that of the experts of one of its adapters."""

    layer: int
    slot: str | None = None


class Router(NamedTuple):
    """names: of what it weighs, the block's slots or the experts' numbers. module: what computes the weights."""

    names: list[str]
    module: AdapterModule

    @property
    def is_sparse(self) -> bool:
        return isinstance(self.module, SparseRouter)

    def weights(self, args: tuple[Any, ...], output: Any) -> Tensor:
        """(N, names), or (R, names) of a router that runs once per row; a sparse one's threshold is one column more.

        args, output: of `module`'s forward pass.
        """
        if isinstance(self.module, CoMoL):  # an adapter whose router is one of its parameters
            return self.module.core_weights(self.module.target.project_in(args[0], self.module.lora_A))
        if self.is_sparse:
            threshold = self.module.limit(self.module.threshold and self.module.threshold(args[0]))
            output = output | {"threshold": torch.as_tensor(threshold).expand(len(args[0]), 1).to(args[0])}
        return torch.cat(list(output.values()), 1) if isinstance(output, dict) else output[0]


def routers_of(model: nn.Module) -> dict[RouterKey, Router]:
    """All routers, by layer and slot. ValueError for a model without one."""
    routers: dict[RouterKey, Router] = {}
    for block in model.layers:
        slots = [slot.name for slot in model.config.slots(block.layer)] if model.config else []
        if block.router is not None:
            routers[RouterKey(block.layer)] = Router(slots, block.router)
        adapters = {**block.attention.adapters, **block.feed_forward.adapters, **block.adapters}
        for slot in slots:
            adapter, experts = adapters[slot], adapters[slot].expert_router
            module = adapter if isinstance(adapter, CoMoL) else experts
            if module is not None:
                num_experts = len(adapter.cores if module is adapter else experts.proj.weight)
                routers[RouterKey(block.layer, slot)] = Router(list(map(str, range(num_experts))), module)
    if not routers:
        raise ValueError(f"a model with {model.config.method if model.config else 'no adapter'} has no router")
    return routers


class Recording(NamedTuple):
    """T tokens of rows laid end to end. is_answer: (T,) bool, not for a prompt's tokens. weights: of each router."""

    is_answer: Tensor
    weights: dict[RouterKey, Tensor]


def record(llm: Llama, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> Iterator[Recording]:
    """Read each prompt with its answer, cut at max_seq_len, and yield a recording of each forward pass, of
    `max_batch_size` rows."""
    routers, device = routers_of(llm.model), llm.model.output.weight.device
    for begin in range(0, len(prompts), llm.max_batch_size):
        part = slice(begin, begin + llm.max_batch_size)
        rows = [(p + a)[: llm.max_seq_len] for p, a in zip(prompts[part], answers[part], strict=True)]
        prompt_lens = [len(prompt) for prompt in prompts[part]]
        batch = PackedBatch([len(row) for row in rows], device, prompt_lens)
        is_answer = [i >= n for row, n in zip(rows, prompt_lens, strict=True) for i in range(len(row))]
        recording = Recording(torch.tensor(is_answer, device=device), {})
        hooks = [
            r.module.register_forward_hook(partial(_keep, recording.weights, key, r)) for key, r in routers.items()
        ]
        try:
            with torch.inference_mode():
                llm.model.forward_hidden(torch.tensor([t for row in rows for t in row], device=device), batch)
        finally:
            for hook in hooks:
                hook.remove()
        yield recording


def _keep(
    weights: dict[RouterKey, Tensor], key: RouterKey, router: Router, _: nn.Module, args: tuple[Any, ...], output: Any
) -> None:
    weights[key] = router.weights(args, output)
