"""A training step on tensors without contents: what autograd keeps of it, and what is sent.

Nothing is known here of single adapters or routers: the model itself runs, on torch's meta device. Attention keeps
other tensors on a real device than there, so a stand-in keeps what the device's kernels keep.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import llama.model
from llama.args import ModelArgs
from llama.checkpoint import shard_specs
from llama.loss import chunked_cross_entropy
from llama.model import Transformer
from llama.packing import PackedBatch
from moa.config import AdapterConfig
from moa.state import adapter_parameters, freeze_base
from training.config import RECOMPUTED
from training.layout import Message
from training.loop import all_reduce_gradients


def unfilled_model(args: ModelArgs, config: AdapterConfig | None, bf16: bool) -> Transformer:
    """This rank's model on the meta device, the base in its type, ready to train. ValueError where it cannot be cut."""
    with torch.device("meta"):
        model = Transformer(args, config)
        dtype = torch.bfloat16 if bf16 else torch.float32
        base = {key: torch.empty_like(model.get_parameter(key), dtype=dtype) for key in shard_specs(model)}
    model.load_state_dict(base, strict=False, assign=True)
    freeze_base(model)
    return model.train()


class Kept(NamedTuple):
    """Bytes for the backward pass, by choice of `Transformer.activation_checkpointing`. standing: what a forward pass
    keeps. again: of the parts that are then worked out again, one at a time, what the largest keeps beside that."""

    standing: dict[str, int]
    again: dict[str, int]


def kept(model: Transformer, lengths: list[int], device: torch.device) -> Kept:
    """What autograd keeps on `device` of a micro-batch of rows of these lengths. The model's own tensors do not count,
    but copies of adapters in the base's type do."""
    found = _Storages(model)

    def begin(choice: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.begin(choice, inputs[0])

    hooks = []
    for block in model.layers:  # `TransformerBlock`: whole, and from the second norm on
        hooks.append(block.register_forward_pre_hook(partial(begin, "all")))
        hooks.append(block.ffn_norm.register_forward_pre_hook(partial(begin, "ffn")))
        hooks.append(block.register_forward_hook(lambda *_: found.end()))
    recompute, model.activation_checkpointing = model.activation_checkpointing, "none"
    try:
        with saved_tensors_hooks(found.add, lambda t: t), _attention_of(device, model):
            every = torch.zeros(sum(lengths), dtype=torch.int64)  # labels, which stay on the CPU
            losses = model(_tokens(len(every)), labels=every, batch=PackedBatch(lengths, "meta"))
    finally:
        model.activation_checkpointing = recompute
        for hook in hooks:
            hook.remove()
    assert losses.ce_loss.requires_grad
    return found.kept()


class StepMessages(NamedTuple):
    """What a rank takes part in during a step: of each micro-batch, and once at the step's end."""

    forward: list[Message]
    loss: list[Message]
    backward: list[Message]
    gradients: list[Message]


def messages_of_step(model: Transformer, lengths: list[int], notes: list[Message]) -> StepMessages:
    """Rehearse a step with a micro-batch of rows of these lengths, all tokens being labels. notes: of `first_rank`."""

    def of(work: Callable[[], Any]) -> tuple[Any, list[Message]]:
        begin = len(notes)
        return work(), notes[begin:]

    hidden, forward = of(lambda: model.forward_hidden(_tokens(sum(lengths)), PackedBatch(lengths, "meta"))[0])
    loss, in_loss = of(lambda: _loss(model, hidden, len(lengths)))
    _, backward = of(loss.backward)
    model.zero_grad(set_to_none=True)
    parameters = [entry.parameter for entry in adapter_parameters(model).values()]
    _, gradients = of(lambda: all_reduce_gradients(parameters))
    model.zero_grad(set_to_none=True)
    return StepMessages(forward, in_loss, backward, gradients)


class GenerationMessages(NamedTuple):
    """What a rank takes part in for the prompts of a batch of rows, and for one more token of each row."""

    prefill: list[Message]
    decode: list[Message]


@torch.no_grad()
def messages_of_generation(
    model: Transformer, n_rows: int, prompt_len: int, notes: list[Message]
) -> GenerationMessages:
    """Rehearse the first steps of generation. notes: of `first_rank`."""
    model.eval()
    cache = model.new_cache(n_rows, prompt_len + 1)
    begin = len(notes)
    rows = PackedBatch([prompt_len] * n_rows, "meta")
    places = cache.allocate(rows.lengths)
    model.output(model.forward_hidden(_tokens(n_rows * prompt_len), rows, cache, places)[0][:n_rows])
    middle = len(notes)
    model.decode(_tokens(n_rows), cache, _tokens(n_rows), max(cache.advance()), True)
    model.train()
    return GenerationMessages(notes[begin:middle], notes[middle:])


def _tokens(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64, device="meta")


def _loss(model: Transformer, hidden: Tensor, n_rows: int) -> Tensor:
    """As `Transformer.losses` does it where all tokens are labels, but for each row's first."""
    labels = _tokens(len(hidden) - n_rows)
    return chunked_cross_entropy(hidden[labels], model.output.weight, labels)


class _Storages:
    """The memory behind the tensors that autograd keeps, each piece once: of each choice, in parts that are worked out
    again and outside of them."""

    def __init__(self, model: nn.Module):
        self._own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._alive: list[Tensor] = []  # so that no address is given out twice
        self._outside: dict[str, dict[int, int]] = {choice: {} for choice in RECOMPUTED}
        self._parts: dict[str, list[dict[int, int]]] = {choice: [{}] for choice in RECOMPUTED}
        self._here = dict(self._outside)

    def begin(self, choice: str, given: Tensor) -> None:
        """From now on a part is worked out that keeps what it is given."""
        self._note(given, self._outside[choice])
        self._here[choice] = {}
        self._parts[choice].append(self._here[choice])

    def end(self) -> None:
        """All parts end here."""
        self._here = dict(self._outside)

    def add(self, tensor: Tensor) -> Tensor:
        for pieces in self._here.values():
            self._note(tensor, pieces)
        return tensor

    def _note(self, tensor: Tensor, pieces: dict[int, int]) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._own:
            self._alive.append(tensor)
            pieces[storage._cdata] = storage.nbytes()

    def kept(self) -> Kept:
        standing = {choice: sum(pieces.values()) for choice, pieces in self._outside.items()}
        again = {choice: max(map(partial(self._beside, choice), parts)) for choice, parts in self._parts.items()}
        return Kept(standing, again)

    def _beside(self, choice: str, part: dict[int, int]) -> int:
        return sum(size for piece, size in part.items() if piece not in self._outside[choice])


@contextmanager
def _attention_of(device: torch.device, model: Transformer) -> Iterator[None]:
    """Meanwhile attention keeps what it keeps on a device: query, key, value, output, and a float32 per query and head;
    of a GPU's kernels in float32, each row its own output.

    In float32 with shared key heads there is no such kernel for a GPU: all weights are kept, as on the meta device.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch, flash: bool) -> Tensor:
        if device.type != "cuda" or batch.equal_lengths or bf16:
            return _Attention.apply(q, k, v)
        return torch.cat([_Attention.apply(q[a:b], k[a:b], v[a:b]) for a, b in batch.spans])

    real, args = llama.model.causal_attention, model.args
    bf16 = model.output.weight.dtype == torch.bfloat16
    if device.type != "cuda" or bf16 or args.n_heads == args.n_kv_heads:
        llama.model.causal_attention = attention
    try:
        yield
    finally:
        llama.model.causal_attention = real


class _Attention(torch.autograd.Function):
    """Of a forward pass alone."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out
