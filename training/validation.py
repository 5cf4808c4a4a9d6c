"""Validation: the loss on rows that are not trained on, the lowest so far, and when it is time to stop."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mp

from llama.data import Example
from llama.distributed import broadcast_from_rank0, dp_rank, dp_size
from llama.model import Transformer
from training.data import label_count, local_micro_batches


@dataclass
class BestLoss:
    """The lowest validation loss so far.

    step: the step it belongs to, 0 before the first evaluation. stale: evaluations since without a lower one.
    stop: there were so many that the run is over.
    """

    loss: float = math.inf
    step: int = 0
    stale: int = 0
    stop: bool = False

    def update(self, step: int, loss: float, patience: int | None) -> bool:
        """Count an evaluation -> whether its loss is the lowest so far."""
        if loss < self.loss:
            self.loss, self.step, self.stale = loss, step, 0
        else:
            self.stale += 1
        self.stop = patience is not None and self.stale >= patience
        return self.step == step

    def __str__(self) -> str:
        if not self.step:
            return "no validation loss was finite"
        lowest = f"the lowest validation loss is {self.loss:.4f}, of step {self.step} (checkpoint-BEST.pth)"
        return lowest + (f", no lower one in {self.stale} evaluations since" if self.stale else "")


@dataclass(frozen=True)
class Validation:
    """Rows to validate on. batch_size: of a micro-batch on each data-parallel rank; every: steps between evaluations;
    patience: evaluations without a lower loss after which the run ends. score: answers rows of a suite -> percent
    right; all processes call it."""

    examples: Sequence[Example]
    batch_size: int
    every: int
    patience: int | None = None
    score: Callable[[], float] | None = None

    def loss(self, model: Transformer) -> float:
        """Mean cross-entropy over all label tokens, the same on all processes. They share the rows; all must call it.

        Leaves the model in training mode.
        """
        device = model.output.weight.device
        total = torch.zeros((), dtype=torch.float64, device=device)
        model.eval()  # no noise in a router
        with torch.no_grad():
            for micro_batch in local_micro_batches(self.examples, self.batch_size, device, dp_rank(), dp_size()):
                if micro_batch is not None:
                    tokens, labels, batch = micro_batch
                    total += model(tokens, labels=labels, batch=batch).ce_loss
        model.train()
        if dp_size() > 1:
            dist.all_reduce(total, group=mp.get_data_parallel_group())
        # All decide by the same number, whatever the last bits of a rank of the model say
        return broadcast_from_rank0(lambda: total.item() / sum(map(label_count, self.examples)))
