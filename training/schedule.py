"""Steps, the rows of each step, who takes which of them, and the learning rate at each step."""

import math
from dataclasses import dataclass

import torch

from training.config import TrainConfig


@dataclass(frozen=True)
class Plan:
    """How long a run is. `rows_per_step`: over all ranks and micro-batches; an epoch's last step may have fewer."""

    n_rows: int
    rows_per_step: int
    steps: int
    warmup_steps: int
    lr: float
    min_lr: float
    constant: bool

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.n_rows // self.rows_per_step)

    def learning_rate(self, step: int) -> float:
        """At step 0, 1, ...: linear up to `lr` over the warm-up, then half a cosine down to `min_lr` (or constant)."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.constant:
            return self.lr
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * done))

    def rows(self, step: int, seed: int) -> list[int]:
        """Row numbers of a step: each epoch is a new order of all rows, given by the seed alone."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = torch.randperm(self.n_rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        return order[place * self.rows_per_step : (place + 1) * self.rows_per_step].tolist()


def make_plan(
    n_rows: int,
    rows_per_step: int,
    epochs: float,
    max_steps: int | None,
    warmup_epochs: float | None,
    lr: float | None,
    blr: float,
    min_lr: float,
    constant: bool,
) -> Plan:
    """Work out the run. lr None: blr * rows_per_step / 256. warmup_epochs None: half of the run, at most one epoch."""
    per_epoch = -(-n_rows // rows_per_step)
    steps = max_steps or max(1, round(epochs * per_epoch))
    warmup = min(per_epoch, steps // 2) if warmup_epochs is None else round(warmup_epochs * per_epoch)
    peak = blr * rows_per_step / 256 if lr is None else lr
    if min_lr > peak:
        raise ValueError(f"--min_lr {min_lr} is above the peak learning rate {peak:g}")
    return Plan(n_rows, rows_per_step, steps, min(warmup, steps), peak, min_lr, constant)


def plan_of(flags: TrainConfig, n_rows: int, ranks: int, rows_per_step: int | None = None) -> Plan:
    """The plan of a run with these flags on `ranks` data-parallel ranks. rows_per_step: of a run that is resumed, on
    whatever ranks it was; None: `batch_size * accum_iter` on each."""
    return make_plan(
        n_rows,
        rows_per_step or flags.batch_size * flags.accum_iter * ranks,
        flags.epochs,
        flags.max_steps,
        flags.warmup_epochs,
        flags.lr,
        flags.blr,
        flags.min_lr,
        flags.lr_schedule == "constant",
    )
