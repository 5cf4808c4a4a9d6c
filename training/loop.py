"""The fine-tuning loop: one optimizer step is one mean over all its label tokens, whatever the layout."""

import math
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp
from torch import nn

from llama.data import Example
from llama.distributed import dp_rank, dp_size
from llama.model import Transformer
from moa.state import adapter_parameters, optimizer_groups
from training.data import label_count, micro_batches
from training.exchange import GradientSum
from training.lanes import Passes
from training.schedule import Plan, share_out
from training.shutdown import Stopped


@dataclass
class Progress:
    """How far a run is. done: steps, with the `skipped` ones, whose numbers (from 1) these are."""

    done: int = 0
    skipped: list[int] = field(default_factory=list)


class NotFinite(ValueError):
    """The loss or a gradient was not finite twice in a row."""


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW as in the published runs, over the adapters. Its fused form takes no memory beside its two moments."""
    return torch.optim.AdamW(optimizer_groups(model, weight_decay), lr=0.0, betas=(0.9, 0.95), fused=True)


def train(
    model: Transformer,
    optimizer: torch.optim.AdamW,
    examples: list[Example],
    plan: Plan,
    batch_size: int,
    seed: int,
    progress: Progress,
    on_step: Callable[[dict[str, Any]], None],
    stop_signal: Callable[[], int] = lambda: 0,
) -> None:
    """Run steps `progress.done` + 1 to `plan.steps`, calling on_step with each step's log entry after it.

    A step whose loss or gradient is not finite is skipped, and its entry says so; a second one in a row raises
    NotFinite, naming steps and rows, and is not counted: the adapters are as they were before both. Raises Stopped,
    after a step, when `stop_signal` is other than 0 on any process.
    """
    parameters = [entry.parameter for entry in adapter_parameters(model).values()]
    device = parameters[0].device
    exchange, passes = GradientSum(parameters), Passes(model, parameters)
    model.train()
    try:
        while progress.done < plan.steps:
            step, begin = progress.done, time.perf_counter()
            numbers = plan.rows(step, seed)
            batch = [examples[i] for i in numbers]
            lengths = [len(example.tokens) for example in batch]
            n_tokens, n_labels = sum(lengths), sum(map(label_count, batch))
            # Whatever is random in a step follows from its number: a resumed run needs no generator's state.
            torch.manual_seed((seed * plan.steps + step) * dp_size() + dp_rank())
            for group in optimizer.param_groups:
                group["lr"] = plan.learning_rate(step)
            optimizer.zero_grad(set_to_none=True)
            losses = torch.zeros(2, device=device)  # of the labels; auxiliary
            share = [batch[i] for i in share_out(lengths, dp_size())[dp_rank()]]
            # On all ranks alike, also where an epoch's last step has too few rows to go round
            n_micro_batches = -(-len(batch) // (dp_size() * batch_size))
            mine = list(micro_batches(share, batch_size, device, n_micro_batches))
            for i, micro_batch in enumerate(mine, 1):
                if i == len(mine):
                    exchange.begin()
                losses += passes.run(micro_batch, n_labels, n_tokens)
            exchange.finish()
            value, auxiliary, finite, signum = _agree(losses, parameters, stop_signal())
            entry = {
                "step": step + 1,
                "epoch": round((step + 1) / plan.steps_per_epoch, 4),
                "loss": value if math.isfinite(value) else None,
                **({"auxiliary_loss": auxiliary} if auxiliary and math.isfinite(auxiliary) else {}),
                "lr": plan.learning_rate(step),
                "rows": len(numbers),
                "tokens": n_tokens,
                "label_tokens": n_labels,
            }
            if finite:
                optimizer.step()
            else:
                entry["skipped"] = _not_finite(step, value + auxiliary, numbers)
                if progress.skipped[-1:] == [step]:
                    raise NotFinite(f"{entry['skipped']}, nor was it in step {step}; a lower --lr may help")
                progress.skipped.append(step + 1)
            progress.done += 1
            seconds = time.perf_counter() - begin
            entry["seconds"], entry["tokens_per_s"] = round(seconds, 4), round(n_tokens / seconds, 1)
            on_step(entry | {"peak_memory_bytes": peak_memory(device)})
            if signum:
                raise Stopped(signum)
    finally:
        exchange.close()
        passes.close()


def _not_finite(step: int, loss: float, numbers: list[int]) -> str:
    listed = ", ".join(str(i + 1) for i in sorted(numbers)[:16]) + (", ..." if len(numbers) > 16 else "")
    what = "a gradient" if math.isfinite(loss) else "the loss"
    return f"step {step + 1}: {what} is not finite (loss {loss:g}; rows {listed} of the rows that fit)"


def _agree(losses: torch.Tensor, parameters: list[nn.Parameter], signum: int) -> tuple[float, float, bool, int]:
    """(loss, auxiliary loss, whether they and all gradients are finite, signal), the same on all processes.

    `losses` are this data-parallel rank's parts, gradients are summed already (zeros where there is none).
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if dp_size() > 1:
        dist.all_reduce(losses, group=mp.get_data_parallel_group())
    largest = nn.utils.get_total_norm([parameter.grad for parameter in parameters], torch.inf)
    finite = torch.isfinite(torch.stack([largest.square(), *losses])).all()  # squares are what AdamW keeps
    bad = finite.logical_not().to(losses.dtype)
    # Ranks of a model hold different gradients, and a signal comes to each process at its own time
    decided = torch.stack([bad, torch.full_like(bad, signum)])
    if dist.get_world_size() > 1:
        dist.all_reduce(decided, dist.ReduceOp.MAX)
    value, auxiliary, any_bad, signum = torch.cat([losses, decided]).tolist()  # a step's one wait for a GPU
    return value, auxiliary, not any_bad, int(signum)


def peak_memory(device: torch.device) -> int:
    """Largest memory of this process so far, in bytes: the GPU's, or the whole process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
