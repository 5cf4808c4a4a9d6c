"""A training step on tensors without contents: what autograd keeps of it, and what is sent.

Nothing is known here of single adapters or routers: the model itself runs, on torch's meta device. Attention keeps
other tensors on a real device than there, so a stand-in keeps what the device's kernels keep.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from llama.args import ModelArgs
from llama.checkpoint import placements
from llama.loss import label_loss
from llama.model import Transformer
from moa.config import AdapterConfig
from moa.rows import Rows
from moa.state import adapter_parameters, freeze_base
from training.exchange import GradientSum
from training.layout import Message


def unfilled_model(args: ModelArgs, config: AdapterConfig | None, bf16: bool) -> Transformer:
    """This rank's model on the meta device, the base in its type, ready to train. ValueError where it cannot be cut."""
    with torch.device("meta"):
        model = Transformer(args, config)
        dtype = torch.bfloat16 if bf16 else torch.float32
        base = {key: torch.empty_like(model.get_parameter(key), dtype=dtype) for key in placements(model)}
    model.load_state_dict(base, strict=False, assign=True)
    freeze_base(model)
    return model.train()


class Kept(NamedTuple):
    """Bytes that a forward pass keeps for the backward pass. blocks: those that each block adds."""

    total: int
    blocks: list[int]
    inputs: int  # of all blocks


def kept(model: Transformer, lengths: list[int], device: torch.device) -> Kept:
    """What autograd keeps on `device` of a micro-batch of rows of these lengths. The model's own tensors do not count,
    but copies of adapters in the base's type do."""
    found = _Storages(model)
    marks, inputs = [], []

    def note(_: nn.Module, block_inputs: tuple[Any, ...], __: Any) -> None:
        marks.append(found.bytes)
        inputs.append(_bytes(block_inputs[0]))

    hooks = [block.register_forward_hook(note) for block in model.layers]
    recompute, model.activation_checkpointing = model.activation_checkpointing, False
    try:
        with saved_tensors_hooks(found.add, lambda t: t), _Kernels(model, device):
            loss = _loss(model, _hidden(model, lengths), len(lengths))
    finally:
        model.activation_checkpointing = recompute
        for hook in hooks:
            hook.remove()
    assert loss.requires_grad
    return Kept(found.bytes, [end - begin for begin, end in zip([0, *marks], marks, strict=False)], sum(inputs))


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

    hidden, forward = of(lambda: _hidden(model, lengths))
    loss, in_loss = of(lambda: _loss(model, hidden, len(lengths)))
    _, backward = of(loss.backward)
    model.zero_grad(set_to_none=True)
    exchange = GradientSum([entry.parameter for entry in adapter_parameters(model).values()])
    _, gradients = of(exchange.finish)
    exchange.close()
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
    cache = model.make_cache(n_rows, prompt_len + 1)
    begin = len(notes)
    rows = Rows([prompt_len] * n_rows, "meta")
    places = cache.admit(rows.lengths)
    model.output(model.hidden(_tokens(n_rows * prompt_len), rows, cache, places)[:n_rows])
    middle = len(notes)
    cache.advance()
    rows = Rows([1] * n_rows, "meta", starts=[prompt_len] * n_rows)
    model.output(model.hidden(_tokens(n_rows), rows, cache))
    model.train()
    return GenerationMessages(notes[begin:middle], notes[middle:])


def _tokens(n: int) -> Tensor:
    return torch.empty(n, dtype=torch.int64, device="meta")


def _hidden(model: Transformer, lengths: list[int]) -> Tensor:
    return model.hidden(_tokens(sum(lengths)), Rows(lengths, "meta"))


def _loss(model: Transformer, hidden: Tensor, n_rows: int) -> Tensor:
    """As `Transformer.losses` does it where all tokens are labels, but for each row's first."""
    labels = _tokens(len(hidden) - n_rows)
    return label_loss(hidden[labels], model.output.weight, labels)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Storages:
    """The memory behind the tensors that autograd keeps, each piece once."""

    def __init__(self, model: nn.Module):
        self._seen = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
        self._alive: list[Tensor] = []  # so that no address is given out twice
        self.bytes = 0

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._alive.append(tensor)
            self.bytes += storage.nbytes()
        return tensor


class _Kernels(TorchFunctionMode):
    """Attention as a device's kernels keep it.

    Query, key, value, output and a float32 per query and head, in float32 on a CPU (`llama.attention`).
    PyTorch's kernels for GPUs do so in bf16; in float32 with shared key heads there is none, and all weights are kept,
    as on the meta device.
    """

    def __init__(self, model: Transformer, device: torch.device):
        super().__init__()
        bf16 = model.output.weight.dtype == torch.bfloat16
        self.attention = device.type != "cuda" or bf16 or model.args.n_heads == model.args.n_kv_heads
        self.dtype = torch.float32 if device.type == "cpu" else model.output.weight.dtype

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.attention:
            q, k, v = (t.to(self.dtype) for t in args)
            return _Attention.apply(q, k, v).to(args[0].dtype)
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    """Of a forward pass alone."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q.transpose(1, 2)).transpose(1, 2)  # rows, heads, tokens, width
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out
