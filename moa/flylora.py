"""FlyLoRA: a LoRA whose ranks are experts, chosen by the projected input itself (arXiv 2510.08396).

W x + s B (chosen * A x)        chosen: the k largest of |A x + b|, s = alpha / r

A is random, sparse and frozen. b balances the ranks: a training step adds 0.001 sign(mean count - count), counts being
the tokens that chose each rank. As in the authors' code; they change b at every forward pass, here it is once a step.
"""

import threading

import torch
from torch import Tensor

from moa.adapter import AdapterModule, Target, zeros
from moa.config import AdapterConfig

BALANCE_RATE = 0.001
_counting = threading.Lock()  # two threads may run the model at once


class FlyLoRA(AdapterModule):
    """lora_A (r, in), frozen; lora_B (out, r); rank_bias (r,), changed by `balance` alone."""

    self_balancing = True

    def __init__(self, target: Target, config: AdapterConfig):
        super().__init__()
        options = config.adapters["flylora"]
        self.target, self.top_k, self.scale = target, options.top_k, options.alpha / options.rank
        a_shape = (options.rank, target.in_features)
        self.add_parameter("lora_A", a_shape, self._init_a, target.shard_inputs(1), trained=False)
        self.add_parameter("lora_B", (target.out_features, options.rank), zeros, target.shard_outputs(0))
        self.add_parameter("rank_bias", (options.rank,), zeros, trained=False)
        self.register_buffer("token_counts", torch.zeros(options.rank), persistent=False)

    def _init_a(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """in k / r numbers from N(0, 1 / r^2) in each row, at random columns."""
        rank, width = shape
        columns = torch.rand(shape, generator=generator).topk(max(1, width * self.top_k // rank), -1).indices
        return torch.zeros(shape).scatter_(1, columns, torch.randn(columns.shape, generator=generator) / rank)

    def forward(self, x: Tensor, output: Tensor, gate: Tensor | None) -> Tensor:
        """x (N, in), the layer's output (N, out), gate (N, 1) -> output with the update, (N, out)."""
        a = self.target.project_in(x, self.lora_A)  # (N, r)
        best = (a + self.rank_bias).abs().topk(self.top_k, -1).indices  # in float32, for the small steps of b
        chosen = torch.zeros_like(a, dtype=torch.bool).scatter(1, best, True)
        a = a.masked_fill(~chosen, 0)
        if gate is not None:
            a = a * gate
        update = self.target.project_out(a, self.lora_B)
        if self.training and update.requires_grad:
            counts = chosen.sum(0)
            # In the backward pass: it runs once, the forward pass twice under activation checkpointing
            update.register_hook(lambda _: self._count(counts))
        return output + self.scale * update

    def _count(self, counts: Tensor) -> None:
        with _counting:
            self.token_counts += counts

    @torch.no_grad()
    def balance(self) -> None:
        self.rank_bias += BALANCE_RATE * (self.token_counts.mean() - self.token_counts).sign()
