"""The training loop: forward, division, backward, reduction, optimizer step.

One optimizer step is one mean over all its label tokens, whatever the micro-batches and ranks.
"""

import math
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp
from torch import Tensor, nn

from llama.data import Example
from llama.distributed import dp_rank, dp_size
from llama.model import Transformer
from moa.adapter import AdapterModule
from moa.parallel import mp_size
from moa.state import AdapterParameter, adapter_parameters, optimizer_groups, self_balancing
from training.data import MicroBatch, label_count, local_micro_batches
from training.schedule import Schedule
from training.validation import BestLoss


@dataclass
class TrainState:
    """Progress of a run. done: steps, with the `skipped` ones, whose numbers (from 1) these are."""

    done: int = 0
    skipped: list[int] = field(default_factory=list)
    best: BestLoss = field(default_factory=BestLoss)

    def is_complete(self, steps: int) -> bool:
        return self.done >= steps or self.best.stop


class NonFiniteLoss(ValueError):
    """The loss or a gradient was not finite twice in a row."""


class Stopped(SystemExit):
    """The run has ended early, in order, because of a signal. Its exit status is the shell's for that signal."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.name = signal.Signals(signum).name


def step_batches(
    examples: Sequence[Example], schedule: Schedule, seed: int, first: int, batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], int, int, list[MicroBatch | None]]]:
    """Rows of each step from `first` on, how many tokens and labels they have, and this rank's micro-batches."""
    for step in count(first):
        rows = schedule.rows(step, seed)
        batch = [examples[row] for row in rows]
        num_tokens, num_labels = sum(len(example.tokens) for example in batch), sum(map(label_count, batch))
        yield rows, num_tokens, num_labels, [*local_micro_batches(batch, batch_size, device, dp_rank(), dp_size())]


def make_optimizer(model: nn.Module, weight_decay: float, beta2: float = 0.95) -> torch.optim.AdamW:
    """AdamW over the adapters. Its fused form needs no memory beside its two moments."""
    return torch.optim.AdamW(optimizer_groups(model, weight_decay), lr=0.0, betas=(0.9, beta2), fused=True)


def forward_backward(model: Transformer, micro_batch: MicroBatch, num_labels: int, num_tokens: int) -> Tensor:
    """Add a micro-batch's gradients to the parameters' -> (2,), its parts of the step's loss and auxiliary loss.

    num_labels, num_tokens: of the whole step, over all micro-batches and ranks.
    """
    tokens, labels, batch = micro_batch
    losses = model(tokens, labels=labels, batch=batch)
    ce_loss = losses.ce_loss / num_labels
    aux_loss = torch.zeros_like(ce_loss)
    if losses.router_stats is not None and model.config.lb_loss_coeff > 0:
        fraction = expert_fraction(losses.router_stats.tokens_per_expert, len(tokens))
        aux_loss = model.load_balancing_loss(losses.router_stats, fraction) / num_tokens
    (ce_loss + aux_loss).backward()
    return torch.stack([ce_loss.detach(), aux_loss.detach()])


def train(
    model: Transformer,
    optimizer: torch.optim.AdamW,
    examples: list[Example],
    schedule: Schedule,
    batch_size: int,
    seed: int,
    state: TrainState,
    on_step: Callable[[dict[str, Any]], None],
    stop_signal: Callable[[], int] = lambda: 0,
    grad_clip: float | None = None,
    forward_backward: Callable[[Transformer, MicroBatch, int, int], Tensor] = forward_backward,
) -> None:
    """Run steps `state.done` + 1 to `schedule.steps`, calling on_step with each step's log entry after it.

    on_step may set `state.best.stop`: then there are no further steps.

    A step whose loss or gradient is not finite is skipped, and its entry says so. A second one in a row raises
    NonFiniteLoss, naming steps and rows, and is not counted: the adapters are as they were before both. Raises Stopped,
    after a step, when `stop_signal` is not 0 on any process. grad_clip: the largest norm of a step's gradient.
    forward_backward: or a faster equal (`llama.accelerate`).
    """
    adapters = list(adapter_parameters(model).values())
    parameters, balancing = [entry.parameter for entry in adapters], self_balancing(model)
    device = parameters[0].device
    batches = step_batches(examples, schedule, seed, state.done, batch_size, device)
    next_batch = next(batches)
    model.train()
    while not state.is_complete(schedule.steps):
        step, begin = state.done, time.perf_counter()
        rows, num_tokens, num_labels, micro_batches = next_batch
        lr = schedule.learning_rate(step)
        # Randomness follows from the step's number: a resumed run needs no generator's state
        torch.manual_seed((seed * schedule.steps + step) * dp_size() + dp_rank())

        optimizer.zero_grad(set_to_none=True)
        for module in balancing:
            module.token_counts.zero_()
        losses = torch.zeros(2, device=device)  # cross-entropy; auxiliary
        for micro_batch in micro_batches:
            if micro_batch is not None:
                losses += forward_backward(model, micro_batch, num_labels, num_tokens)
            elif uses_load_balancing(model):
                expert_fraction(torch.zeros(balanced_routers(model), device=device), 0)
        all_reduce_gradients(parameters, balancing)
        result = reduce_step(losses, parameters, stop_signal())
        if grad_clip is not None:
            clip_gradients(adapters, grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        optimizer.found_inf = result[2]  # where it is 1, the fused step changes nothing
        optimizer.step()
        next_batch = next(batches)  # while a GPU is at work on this step
        ce_loss, aux_loss, not_finite, signum = result.tolist()  # a step's one wait for a GPU
        skipped = None
        if not_finite:
            skipped = _not_finite(step, ce_loss + aux_loss, rows)
            if state.skipped[-1:] == [step]:
                raise NonFiniteLoss(f"{skipped}, nor was it in step {step}; a lower --lr may help")
            state.skipped.append(step + 1)
        else:
            for module in balancing:
                module.balance()
        state.done += 1

        seconds = time.perf_counter() - begin
        on_step(
            {
                "step": step + 1,
                "epoch": round((step + 1) / schedule.steps_per_epoch, 4),
                "loss": ce_loss if math.isfinite(ce_loss) else None,
                **({"auxiliary_loss": aux_loss} if aux_loss and math.isfinite(aux_loss) else {}),
                "lr": lr,
                "rows": len(rows),
                "tokens": num_tokens,
                "label_tokens": num_labels,
                **({"skipped": skipped} if skipped else {}),
                "seconds": round(seconds, 4),
                "tokens_per_s": round(num_tokens / seconds, 1),
                "peak_memory_bytes": peak_memory(device),
            }
        )
        if signum:
            raise Stopped(int(signum))


def uses_load_balancing(model: Transformer) -> bool:
    """Whether the method has a load-balancing loss: its model returns `router_stats`, and the coefficient is not 0."""
    return model.config.lb_loss_coeff > 0 and balanced_routers(model)[0] > 0


def balanced_routers(model: Transformer) -> tuple[int, int]:
    """Number of routers that choose among experts, and so have a load-balancing loss; experts of the largest."""
    num_experts = [m.num_experts for m in model.modules() if getattr(m, "chooses_experts", False)]
    return len(num_experts), max(num_experts, default=0)


def expert_fraction(tokens_per_expert: Tensor, num_tokens: int) -> Tensor:
    """f_e of a micro-batch: the fraction of tokens that chose each expert, over all data-parallel ranks.

    tokens_per_expert (routers, E) and num_tokens are this rank's; every rank must call it (arXiv 2501.11873).
    """
    counts = torch.cat([tokens_per_expert.flatten(), tokens_per_expert.new_full((1,), num_tokens)])
    if dp_size() > 1:
        dist.all_reduce(counts, group=mp.get_data_parallel_group())
    return counts[:-1].view_as(tokens_per_expert) / counts[-1]


def all_reduce_gradients(parameters: list[nn.Parameter], balancing: list[AdapterModule]) -> None:
    """Sum gradients, and the counts of adapters that balance themselves, over the data-parallel ranks in one message.

    An unused parameter counts with zeros.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if dp_size() == 1:
        return
    tensors = [parameter.grad for parameter in parameters] + [module.token_counts for module in balancing]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=mp.get_data_parallel_group())
    for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(total.view_as(tensor))


def clip_gradients(adapters: list[AdapterParameter], max_norm: float) -> None:
    """Scale all gradients so that the norm of the whole adapter's is at most `max_norm`. All ranks must call it.

    A shard counts once, however many ranks of the model hold it.
    """
    squares = [
        entry.parameter.grad.square().sum() * (entry.spec.shard.num_shards if entry.spec.shard else 1) / mp_size()
        for entry in adapters
    ]
    total = torch.stack(squares).sum()
    if mp_size() > 1:
        dist.all_reduce(total, group=mp.get_model_parallel_group())
    nn.utils.clip_grads_with_norm_([entry.parameter for entry in adapters], max_norm, total.sqrt())


def reduce_step(losses: Tensor, parameters: list[nn.Parameter], signum: int) -> Tensor:
    """(4,): loss, auxiliary loss, 1 where one of these or a gradient is not finite, signal; of all processes.

    losses (2,): this data-parallel rank's parts. Gradients are summed already.
    """
    if dp_size() > 1:
        dist.all_reduce(losses, group=mp.get_data_parallel_group())
    largest = nn.utils.get_total_norm([parameter.grad for parameter in parameters], torch.inf)
    finite = torch.isfinite(torch.stack([largest.square(), *losses])).all()  # squares are what AdamW keeps
    not_finite = finite.logical_not().to(losses.dtype)
    # Ranks of a model hold different gradients, and a signal comes to each process at its own time
    agreed = torch.stack([not_finite, torch.full_like(not_finite, signum)])
    if dist.get_world_size() > 1:
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return torch.cat([losses, agreed])


def _not_finite(step: int, loss: float, rows: list[int]) -> str:
    listed = ", ".join(str(row + 1) for row in sorted(rows)[:16]) + (", ..." if len(rows) > 16 else "")
    what = "a gradient" if math.isfinite(loss) else "the loss"
    return f"step {step + 1}: {what} is not finite (loss {loss:g}; rows {listed} of the training rows that fit)"


def peak_memory(device: torch.device) -> int:
    """Largest memory of this process so far, in bytes: the GPU's, or the whole process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss would begin at that of the process that started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, in bytes
