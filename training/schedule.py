"""The schedule of a run: its steps, the rows of each step, and the learning rate at each step."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from training.config import TrainConfig


@dataclass(frozen=True)
class Schedule:
    """rows_per_step: over all ranks and micro-batches; an epoch's last step may have fewer. lr: the peak."""

    n_rows: int
    rows_per_step: int
    steps: int
    warmup_steps: int
    lr: float
    min_lr: float
    constant: bool

    @classmethod
    def from_config(cls, flags: TrainConfig, n_rows: int, ranks: int = 1, record: dict[str, Any] | None = None):
        """Work out a run with these flags on `ranks` data-parallel ranks.

        record: of a run that is resumed, on whatever ranks it was: rows per step and warm-up stay.
        """
        rows_per_step = record["rows_per_step"] if record else flags.rows_per_rank * ranks
        per_epoch = -(-n_rows // rows_per_step)
        steps = flags.max_steps or max(1, round(flags.epochs * per_epoch))
        if record:
            warmup_steps = record["warmup_steps"]
        elif flags.warmup_epochs is None:
            warmup_steps = min(per_epoch, steps // 2)
        else:  # also beyond the end: the slope is the one asked for
            warmup_steps = round(flags.warmup_epochs * per_epoch)
        lr = flags.blr * rows_per_step / 256 if flags.lr is None else flags.lr
        if flags.min_lr > lr:
            raise ValueError(f"--min_lr {flags.min_lr} is above the peak learning rate {lr:g}")
        return cls(n_rows, rows_per_step, steps, warmup_steps, lr, flags.min_lr, flags.lr_schedule == "constant")

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.n_rows // self.rows_per_step)

    def learning_rate(self, step: int) -> float:
        """At step 0, 1, ...: linear up to `lr` over the warm-up, then half a cosine down to `min_lr` (or constant)."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.constant:
            return self.lr
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    def rows(self, step: int, seed: int) -> list[int]:
        """Row numbers of a step. Each epoch is a new order of all rows, which follows from the seed alone."""
        epoch, i = divmod(step, self.steps_per_epoch)
        order = torch.randperm(self.n_rows, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        return order[i * self.rows_per_step : (i + 1) * self.rows_per_step].tolist()
