"""Memory of a run: what it will take, told before, and what to turn down when it is not enough."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cli import out_of_memory
from llama.args import ModelArgs
from llama.parallel import bf16_is_fast
from training.estimate import estimate, uneven
from training.layout import first_rank
from training.rehearsal import kept, unfilled_model
from training.settings import Settings


def needed(settings: Settings, args: ModelArgs, device: torch.device) -> dict[str, int]:
    """Bytes that this process will take, by what takes them (`training.estimate`); "recomputed": the total under
    --activation_checkpointing. No process group may stand. ValueError as the run would raise it."""
    flags = settings.train
    bf16 = bf16_is_fast(device) if flags.bf16 is None else flags.bf16
    lengths = uneven(flags.batch_size, flags.max_seq_len)
    with first_rank(int(os.environ.get("WORLD_SIZE", 1)), flags.model_parallel_size):
        model = unfilled_model(args, settings.config(args), bf16)
        found, n_tokens = kept(model, lengths, device), sum(lengths)
        parts = estimate(model, found, n_tokens, flags.activation_checkpointing)
        return parts | {"recomputed": estimate(model, found, n_tokens, True)["total"]}


def in_words(parts: dict[str, int]) -> str:
    """The estimate on one line, in GiB."""
    names = ("base", "adapters", "gradients", "optimizer", "activations", "temporary")
    listed = ", ".join(f"{name} {parts[name] / 2**30:.2f}" for name in names)
    return f"{parts['total'] / 2**30:.2f} GiB ({listed})"


@contextmanager
def advice(settings: Settings, parts: dict[str, int]) -> Iterator[None]:
    """Where memory runs out: a MemoryError that says what to turn down, with the estimate beside it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        flags = settings.train
        said = (str(error).splitlines() or ["no more can be had"])[0].rstrip(".")
        ways = [f"lower --max_seq_len ({flags.max_seq_len})"]
        if flags.batch_size > 1:
            ways.insert(0, f"lower --batch_size ({flags.batch_size}; a larger --accum_iter keeps the rows of a step)")
        if not flags.activation_checkpointing:
            ways.append(f"give --activation_checkpointing ({parts['recomputed'] / 2**30:.2f} GiB)")
        ways.append(f"give --model_parallel_size above {flags.model_parallel_size} on as many GPUs")
        told = f"{said}; by the estimate a step takes {in_words(parts)} on each process: {', '.join(ways[:-1])}"
        raise MemoryError(f"{told}, or {ways[-1]}") from None
