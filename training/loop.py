"""The fine-tuning loop: one optimizer step is one mean over all its label tokens, whatever the layout."""

import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp
from torch import nn

from llama.data import Example
from llama.model import Transformer
from llama.parallel import data_rank, data_size
from moa.state import adapter_parameters, optimizer_groups
from training.data import label_count, micro_batches
from training.schedule import Plan


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW as in the published runs, over the adapters."""
    return torch.optim.AdamW(optimizer_groups(model, weight_decay), lr=0.0, betas=(0.9, 0.95))


def train(
    model: Transformer,
    optimizer: torch.optim.AdamW,
    examples: list[Example],
    plan: Plan,
    batch_size: int,
    seed: int,
    done: int,
    on_step: Callable[[dict[str, Any]], None],
) -> None:
    """Run steps `done` + 1 to `plan.steps`, calling on_step with each step's log entry after it.

    Raises ValueError, naming step and rows, where the loss or a gradient is not finite; the adapters are then as they
    were before that step.
    """
    parameters = [entry.parameter for entry in adapter_parameters(model).values()]
    device = parameters[0].device
    model.train()
    for step in range(done, plan.steps):
        begin = time.perf_counter()
        numbers = plan.rows(step, seed)
        batch = [examples[i] for i in numbers]
        n_labels = sum(map(label_count, batch))
        # Whatever is random in a step follows from its number: a resumed run needs no generator's state.
        torch.manual_seed((seed * plan.steps + step) * data_size() + data_rank())
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate(step)
        optimizer.zero_grad(set_to_none=True)
        n_tokens = sum(len(example.tokens) for example in batch)
        losses = torch.zeros(2, device=device)  # of the labels; auxiliary
        for tokens, labels, rows in micro_batches(batch[data_rank() :: data_size()], batch_size, device):
            part = model.losses(tokens, labels, rows)
            # The auxiliary loss is a mean over a micro-batch's tokens: each counts by its share of the step's.
            parts = torch.stack([part.labels / n_labels, part.auxiliary * len(tokens) / n_tokens])
            parts.sum().backward()
            losses += parts.detach()
        (value, auxiliary), finite = sum_gradients(parameters, losses)
        if not finite:
            listed = ", ".join(str(i + 1) for i in sorted(numbers)[:16]) + (", ..." if len(numbers) > 16 else "")
            what = "loss" if not math.isfinite(value + auxiliary) else "gradient"
            raise ValueError(
                f"step {step + 1}: the {what} is not finite (loss {value}; rows {listed} of the rows that fit); "
                "a lower --lr may help"
            )
        optimizer.step()
        seconds = time.perf_counter() - begin
        on_step(
            {
                "step": step + 1,
                "epoch": round((step + 1) / plan.steps_per_epoch, 4),
                "loss": value,
                **({"auxiliary_loss": auxiliary} if auxiliary else {}),
                "lr": plan.learning_rate(step),
                "rows": len(numbers),
                "tokens": n_tokens,
                "label_tokens": n_labels,
                "seconds": round(seconds, 4),
                "tokens_per_s": round(n_tokens / seconds, 1),
                "peak_memory_bytes": peak_memory(device),
            }
        )


def sum_gradients(parameters: list[nn.Parameter], losses: torch.Tensor) -> tuple[list[float], bool]:
    """Sum gradients and losses over the data-parallel ranks, in one message; adapters alone travel.

    Returns the losses and whether they and all gradients are finite, on every rank.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    flat = torch.cat([losses, *(parameter.grad.flatten() for parameter in parameters)])
    if data_size() > 1:
        dist.all_reduce(flat, group=mp.get_data_parallel_group())
        begin = len(losses)
        for parameter in parameters:
            parameter.grad.copy_(flat[begin : begin + parameter.numel()].view_as(parameter))
            begin += parameter.numel()
    finite = torch.isfinite(flat).all()
    if mp.get_model_parallel_world_size() > 1:  # ranks of a group hold different parts: all must agree to stop
        finite = finite.to(torch.uint8)
        dist.all_reduce(finite, dist.ReduceOp.MIN, group=mp.get_model_parallel_group())
    return flat[: len(losses)].tolist(), bool(finite)


def peak_memory(device: torch.device) -> int:
    """Largest memory of this process so far, in bytes: the GPU's, or the whole process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
