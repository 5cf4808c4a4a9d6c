"""Memory and messages of one process of a run, from sizes alone, before any weight is read.

The model that the process would hold runs on torch's meta device, in torch's fake process group of as many processes as
the run has. Nothing is known here of single adapters or routers. Left out: what the libraries take (on a GPU about a
gigabyte), and the message of gradients, which is sent when the activations are gone.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed._tools.fake_collectives import CollectiveOp  # also lets meta tensors take part in collectives
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from llama.accelerate import accelerate_model
from llama.accelerate.lanes import split_lanes, usable_threads
from llama.accelerate.loss import chunk_size
from llama.args import ModelArgs
from llama.checkpoint import shard_specs
from llama.distributed import destroy_distributed, init_distributed, init_single_process
from llama.model import Transformer
from llama.packing import PackedBatch
from llama.quantize import NF4Layer, is_quantizable, nf4_bytes, quantize_layer
from moa.config import AdapterConfig
from moa.state import adapter_parameters, freeze_base, self_balancing
from training.config import CHECKPOINTING_MODES
from training.loop import all_reduce_gradients, forward_backward


class Message(NamedTuple):
    """A collective as one of its `ranks` takes part in it. kind: all_reduce or all_gather; bytes: of its tensor."""

    kind: str
    ranks: int
    bytes: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends, as many as it receives, where the ranks form a ring."""
        return (self.ranks - 1) * self.bytes * (2 / self.ranks if self.kind == "all_reduce" else 1)


class CommRecorder(TorchDispatchMode):
    """Lists the collectives that this process takes part in (torch's CommDebugMode counts them, without sizes)."""

    def __init__(self, messages: list[Message]):
        super().__init__()
        self._messages = messages

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            kind = {"allreduce_": "all_reduce", "allgather_": "all_gather"}[func._opname]
            ranks = CollectiveOp.get_process_group(func, args).size()
            size = CollectiveOp.get_comm_tensor_size(func, result, args, kwargs or {})
            self._messages.append(Message(kind, ranks, size if kind == "all_reduce" else size // ranks))
        return result


@contextmanager
def fake_rank(processes: int, model_parallel_size: int) -> Iterator[list[Message]]:
    """Be the first of `processes` processes, whose others do not exist. Yields the growing list of its messages.

    Tensors must be on the meta device. ValueError where the sizes do not divide.
    """
    restore = dist.is_initialized()
    assert not restore or dist.get_world_size() == 1, "a process group of several processes exists"
    destroy_distributed()
    messages: list[Message] = []
    try:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's: a fake group has no timeout
            init_distributed(torch.device("cpu"), model_parallel_size)
        with CommRecorder(messages):
            yield messages
    finally:
        destroy_distributed()
        if restore:
            init_single_process()
            init_distributed(torch.device("cpu"))


def meta_model(args: ModelArgs, config: AdapterConfig | None, bf16: bool, quantize: str | None = None) -> Transformer:
    """Build this rank's model on the meta device, as a run has it. ValueError where it cannot be sharded."""
    with torch.device("meta"):
        model = Transformer(args, config)
        dtype = torch.bfloat16 if bf16 else torch.float32
        base = {key: torch.empty_like(model.get_parameter(key), dtype=dtype) for key in shard_specs(model)}
    for key in filter(is_quantizable, list(base) if quantize else ()):
        quantize_layer(model.get_submodule(key.rpartition(".")[0]), base.pop(key))
    model.assign_base(base)
    freeze_base(model)
    accelerate_model(model)
    return model.train()


def longest_batch(n_rows: int, length: int) -> list[int]:
    """Lengths of the largest micro-batch whose rows are, as rows are, not all of one length."""
    return [length] * (n_rows - 1) + [max(1, length - (n_rows > 1))]


def base_parameters(model: Transformer) -> int:
    """Count the parameters of the whole base."""
    return sum(math.prod(spec.shape) for spec in shard_specs(model).values())


def static_bytes(model: Transformer) -> dict[str, int]:
    """What this rank holds all the time: its shards of the base and of the float32 adapters, gradients, and moments."""
    adapters = sum(4 * entry.parameter.numel() for entry in adapter_parameters(model, untrained=True).values())
    trained = sum(4 * entry.parameter.numel() for entry in adapter_parameters(model).values())
    base = sum(layer_bytes(model.get_submodule(key.rpartition(".")[0])) for key in shard_specs(model))
    return {"base": base, "adapters": adapters, "gradients": trained, "optimizer": 2 * trained}


def layer_bytes(layer: nn.Module) -> int:
    """What the frozen weight of a layer takes."""
    weight = layer.weight
    return nf4_bytes(weight.numel()) if isinstance(layer, NF4Layer) else weight.numel() * weight.element_size()


def cache_bytes(model: Transformer, n_rows: int, length: int) -> int:
    """What this rank's KV cache takes for so many sequences of up to `length` tokens."""
    cache = model.new_cache(n_rows, length)
    return sum(t.numel() * t.element_size() for t in (*cache.k, *cache.v))


def peak_temporary_bytes(model: Transformer, lengths: Sequence[int], device: torch.device) -> int:
    """The most that is allocated for a moment while all activations of sequences of these lengths are saved.

    That is, at the end of the forward pass, each lane's logits of a chunk of labels, in the base's type and in float32;
    or, at the start of the backward pass, gradients in a feed-forward block: 3 of its hidden width, 4 of the model's,
    and one of its matrices where it is quantised.
    """
    weight, n_tokens = model.output.weight, sum(lengths)
    size, (vocab, dim) = weight.element_size(), weight.shape
    lanes = split_lanes(lengths, usable_threads(model, device))
    labels = sum(min(chunk_size(vocab, device), sum(lengths[i] for i in lane)) for lane in lanes)
    logits = labels * vocab * (4 if size >= 4 else size + 4) + n_tokens * dim * size
    w1 = model.layers[0].feed_forward.w1
    hidden = w1.weight.shape[0]
    dequantized = hidden * dim * size if isinstance(w1, NF4Layer) else 0
    return max(logits, n_tokens * size * (3 * hidden + 4 * dim) + dequantized)


class SavedBytes(NamedTuple):
    """Bytes saved for the backward pass, by checkpointing mode.

    saved: by the forward pass. recomputed: by the largest part that the backward pass runs again, beside these.
    """

    saved: dict[str, int]
    recomputed: dict[str, int]

    def total(self, mode: str) -> int:
        return self.saved[mode] + self.recomputed[mode]


def saved_activation_bytes(model: Transformer, lengths: list[int], device: torch.device) -> SavedBytes:
    """What autograd saves on `device` of a micro-batch of sequences of these lengths, the model's own tensors aside.

    One forward pass without checkpointing tells it for all modes: what is saved inside a part that a mode recomputes
    counts as recomputed, and the part's input as saved. The model is for estimates alone from then on.
    """
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    alive: list[Tensor] = []  # no address is given out twice
    outside: dict[str, dict[int, int]] = {mode: {} for mode in CHECKPOINTING_MODES}  # storage -> bytes
    parts: dict[str, list[dict[int, int]]] = {mode: [{}] for mode in CHECKPOINTING_MODES}
    current = dict(outside)

    def count(tensor: Tensor, storages: dict[int, int]) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            alive.append(tensor)
            storages[storage._cdata] = storage.nbytes()

    def pack(tensor: Tensor) -> Tensor:
        for storages in current.values():
            count(tensor, storages)
        return tensor

    def begin_part(mode: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        count(inputs[0], outside[mode])
        current[mode] = {}
        parts[mode].append(current[mode])

    hooks = []
    for block in model.layers:
        hooks.append(block.register_forward_pre_hook(partial(begin_part, "full")))
        hooks.append(block.ffn_norm.register_forward_pre_hook(partial(begin_part, "selective")))
        hooks.append(block.register_forward_hook(lambda *_: current.update(outside)))
        # A GPU's kernel for float32 and shared key heads saves all weights, as the meta device does
        if device.type != "cuda" or model.output.weight.dtype == torch.bfloat16:
            block.attention.causal_attention = lambda q, k, v, batch: _Attention.apply(q, k, v)
    mode, model.activation_checkpointing = model.activation_checkpointing, "none"
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        tokens, labels, batch = _micro_batch(lengths)
        model(tokens, labels=labels, batch=batch)
    model.activation_checkpointing = mode
    for hook in hooks:
        hook.remove()
    saved = {mode: sum(storages.values()) for mode, storages in outside.items()}
    largest = {
        mode: max(sum(size for key, size in part.items() if key not in outside[mode]) for part in of_mode)
        for mode, of_mode in parts.items()
    }
    return SavedBytes(saved, largest)


class _Attention(torch.autograd.Function):
    """Saves what fused kernels save: query, key, value, output, and a float32 per query and head."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


def _micro_batch(lengths: list[int]) -> tuple[Tensor, Tensor, PackedBatch]:
    """Tokens on the meta device, all of them labels; labels stay on the CPU, as in a run."""
    tokens = torch.empty(sum(lengths), dtype=torch.int64, device="meta")
    return tokens, torch.zeros(sum(lengths), dtype=torch.int64), PackedBatch(lengths, "meta")


def memory_by_mode(model: Transformer, lengths: list[int], device: torch.device) -> dict[str, dict[str, int]]:
    """Bytes on this rank by what takes them, and in total, for each checkpointing mode."""
    static, temporary = static_bytes(model), peak_temporary_bytes(model, lengths, device)
    activations = saved_activation_bytes(model, lengths, device)
    parts = {
        mode: static | {"activations": activations.total(mode), "temporary": temporary} for mode in CHECKPOINTING_MODES
    }
    return {mode: by_kind | {"total": sum(by_kind.values())} for mode, by_kind in parts.items()}


def trace_step(model: Transformer, lengths: list[int], messages: list[Message]) -> tuple[list[Message], list[Message]]:
    """Run a step of one micro-batch -> its messages up to the gradients, and those that sum these at the end.

    messages: the list of `fake_rank`.
    """
    begin = len(messages)
    forward_backward(model, _micro_batch(lengths), sum(lengths), sum(lengths))
    end = len(messages)
    all_reduce_gradients([entry.parameter for entry in adapter_parameters(model).values()], self_balancing(model))
    model.zero_grad(set_to_none=True)
    return messages[begin:end], messages[end:]


def comm_bytes(messages: Sequence[Message]) -> dict[str, int]:
    """Number and size of messages. sent_bytes: what this rank sends of them, the ranks forming a ring."""
    sent = sum(message.sent for message in messages)
    return {"messages": len(messages), "bytes": sum(message.bytes for message in messages), "sent_bytes": round(sent)}


def comm_bytes_of_step(
    micro_batch: Sequence[Message], gradients: Sequence[Message], micro_batches: int
) -> dict[str, Any]:
    """Sum up what a rank exchanges in an optimizer step of so many micro-batches."""
    parts = {"gradients": comm_bytes(gradients), "micro_batch": comm_bytes(micro_batch)}
    sent = parts["gradients"]["sent_bytes"] + micro_batches * parts["micro_batch"]["sent_bytes"]
    return parts | {"micro_batches": micro_batches, "sent_bytes": sent}
