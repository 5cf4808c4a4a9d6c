"""What one process of a run will need and send, from sizes alone: for `--dry_run`, before any weight is read.

Everything is worked out on the model that this rank would hold (`training.rehearsal.unfilled_model`), cut as it is cut.
Left out: what the libraries take (on a GPU about a gigabyte), and what stands only while the activations do not: the
message of gradients.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from llama.checkpoint import shard_specs
from llama.loss import chunk_size
from llama.model import Transformer
from moa.state import adapter_parameters
from training.config import RECOMPUTED
from llama.accelerate.lanes import split_lanes, usable_threads
from training.layout import Message
from training.rehearsal import Kept, StepMessages, kept


def base_parameters(model: Transformer) -> int:
    """Parameters of the whole base."""
    return sum(math.prod(place.shape) for place in shard_specs(model).values())


def uneven(n_rows: int, length: int) -> list[int]:
    """Lengths of rows that are as long as can be and, as rows are, not all the same: where attention then takes them
    one by one, that keeps a little more."""
    return [length] * (n_rows - 1) + [max(1, length - (n_rows > 1))]


def held_bytes(model: Transformer) -> dict[str, int]:
    """What this rank holds from the first step to the last: its parts of the base and of the float32 adapters, their
    gradients and the optimizer's two moments."""
    trained = sum(4 * entry.parameter.numel() for entry in adapter_parameters(model).values())
    base = sum(math.prod(t.shape) * t.element_size() for t in map(model.get_parameter, shard_specs(model)))
    return {"base": base, "adapters": trained, "gradients": trained, "optimizer": 2 * trained}


def activation_bytes(found: Kept, recompute: str) -> int:
    """What this rank keeps for the backward pass of a micro-batch, with the largest part that is worked out again."""
    return found.standing[recompute] + found.again[recompute]


def temporary_bytes(model: Transformer, lengths: Sequence[int], device: torch.device) -> int:
    """The most that comes and goes while all activations of rows of these lengths stand: at the end of the forward
    pass, in each lane (`llama.accelerate.lanes`), the logits of a chunk of labels (`llama.loss`: in the base's type and in
    float32), or at the start of the backward pass the gradients inside a feed-forward block, three of its hidden width
    and four of the model's."""
    weight = model.output.weight
    width, (vocab, dim) = weight.element_size(), weight.shape
    chunk = chunk_size(vocab, device)
    lanes = split_lanes(lengths, usable_threads(model, device))
    at_once, n_tokens = sum(min(chunk, sum(lengths[i] for i in lane)) for lane in lanes), sum(lengths)
    logits = at_once * vocab * (4 if width >= 4 else width + 4) + n_tokens * dim * width
    hidden = model.layers[0].feed_forward.w1.weight.shape[0]
    return max(logits, n_tokens * width * (3 * hidden + 4 * dim))


def estimates(model: Transformer, lengths: list[int], device: torch.device) -> dict[str, dict[str, int]]:
    """Bytes on this rank, by what takes them, for micro-batches of rows of these lengths; for each choice of
    --activation_checkpointing."""
    found, temporary = kept(model, lengths, device), temporary_bytes(model, lengths, device)
    by_choice = {}
    for choice in RECOMPUTED:
        parts = held_bytes(model) | {"activations": activation_bytes(found, choice), "temporary": temporary}
        by_choice[choice] = parts | {"total": sum(parts.values())}
    return by_choice


def cache_bytes(model: Transformer, n_rows: int, length: int) -> int:
    """What this rank's keys and values take when so many rows of up to `length` tokens are generated at once."""
    cache = model.new_cache(n_rows, length)
    return sum(t.numel() * t.element_size() for t in (*cache.k, *cache.v))


def traffic(messages: StepMessages, micro_batches: int) -> dict[str, Any]:
    """What a rank exchanges in an optimizer step of so many micro-batches: between replicas, the adapters' gradients,
    once; among those that share a model, in every micro-batch. sent_bytes: in all, as many as it receives."""
    parts = {name: summed(getattr(messages, name)) for name in ("forward", "loss", "backward")}
    model = [*messages.forward, *messages.loss, *messages.backward]
    return {
        "gradients": summed(messages.gradients),
        "micro_batch": parts,
        "micro_batches": micro_batches,
        "sent_bytes": round(sum(m.sent for m in messages.gradients) + micro_batches * sum(m.sent for m in model)),
    }


def summed(messages: Iterable[Message]) -> dict[str, int]:
    """Number and size of messages; sent_bytes: what this rank sends of them, the ranks standing in a ring."""
    messages = list(messages)
    return {
        "messages": len(messages),
        "bytes": sum(message.bytes for message in messages),
        "sent_bytes": round(sum(message.sent for message in messages)),
    }
