"""Routers of experts: from an adapter's own input x (N, in) to the weight of each of its E experts, per token.

Each returns the weights (N, E) in the type of x and, where it chooses among experts, `RouterStats`. A router that
chooses may let experts wither; the load-balancing loss E sum_e f_e p_e keeps them in use (arXiv 2101.03961): f_e is the
fraction of tokens that chose expert e, p_e its mean router probability.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moa.adapter import AdapterModule, Init, Target
from moa.config import AdapterConfig
from moa.methods import EXPERT_ROUTERS, import_class
from moa.routers import RouterLinear


class RouterStats(NamedTuple):
    """Sums over the tokens of a micro-batch, (..., E) float32: tokens that chose each expert (without a gradient), and
    E times the router probabilities."""

    tokens_per_expert: Tensor
    scaled_probs: Tensor

    def load_balancing_loss(self, fraction: Tensor) -> Tensor:
        """E sum_e f_e p_e summed over the tokens and over several routers, a float32 scalar.

        fraction (..., E): f_e, over all tokens that share the loss.
        """
        return (fraction * self.scaled_probs).sum()


def router_stats(chosen: Tensor, probs: Tensor) -> RouterStats:
    """chosen (N, E), bool; probs (N, E)."""
    return RouterStats(chosen.float().sum(0), probs.shape[1] * probs.sum(0))


def stack_stats(stats: list[RouterStats]) -> RouterStats:
    """The statistics of several routers, (routers, E); zeros where one has fewer experts than another."""
    most = max(len(counts) for counts, _ in stats)
    columns = zip(*stats, strict=True)
    rows = ([t if len(t) == most else F.pad(t, (0, most - len(t))) for t in column] for column in columns)
    return RouterStats(*map(torch.stack, rows))


class ExpertRouter(AdapterModule):
    """Base: the products of x with its linear layers, in the order of their declaration, go to `route`."""

    chooses_experts = True  # and returns `RouterStats`

    def __init__(self, target: Target, num_experts: int, bias: bool = True, init: Init | None = None):
        super().__init__()
        self.num_experts = num_experts
        self.proj = RouterLinear(target.in_features, num_experts, bias, target, init)

    def forward(self, x: Tensor) -> tuple[Tensor, RouterStats | None]:
        return self.route(x.dtype, *(linear(x) for linear in self.children()))


class SoftmaxRouter(ExpertRouter):
    """softmax(R x)."""

    chooses_experts = False

    def __init__(self, target: Target, config: AdapterConfig, softmax_bias: bool):
        super().__init__(target, config.expert_num, softmax_bias)

    def route(self, dtype: torch.dtype, logits: Tensor) -> tuple[Tensor, None]:
        return logits.softmax(-1).to(dtype), None


class TopKRouter(ExpertRouter):
    """The k largest of softmax(R x + b), renormalised to sum to 1.

    With `noisy_router` the logits carry noise in training: N(0, 1) softplus(W_n x + b_n) (arXiv 1701.06538).
    """

    def __init__(self, target: Target, config: AdapterConfig, softmax_bias: bool):
        super().__init__(target, config.expert_num)
        self.top_k, self.is_stochastic = config.top_k, config.noisy_router
        self.noise = RouterLinear(target.in_features, config.expert_num, target=target) if config.noisy_router else None

    def route(self, dtype: torch.dtype, logits: Tensor, noise: Tensor | None = None) -> tuple[Tensor, RouterStats]:
        if noise is not None and self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(noise)
        best = logits.topk(self.top_k, -1).indices
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(1, best, True)
        weights = logits.masked_fill(~chosen, -torch.inf).softmax(-1)
        return weights.to(dtype), router_stats(chosen, logits.softmax(-1))


class AdaMoLERouter(ExpertRouter):
    """p = softmax(R x + b), threshold G = (1/E) s(w x + b_G); experts with p - G >= 0 count with it, divided by the
    sum (arXiv 2405.00361)."""

    def __init__(self, target: Target, config: AdapterConfig, softmax_bias: bool):
        super().__init__(target, config.expert_num)
        self.threshold = RouterLinear(target.in_features, 1, target=target)

    def route(self, dtype: torch.dtype, logits: Tensor, threshold: Tensor) -> tuple[Tensor, RouterStats]:
        margin = logits.softmax(-1) - torch.sigmoid(threshold) / logits.shape[1]
        chosen = margin >= 0
        weights = margin.masked_fill(~chosen, 0)
        total = weights.sum(-1, keepdim=True)
        weights = weights / total.masked_fill(total == 0, 1)  # all zero where no expert is chosen
        return weights.to(dtype), router_stats(chosen, margin)


def build_expert_router(target: Target, config: AdapterConfig, softmax_bias: bool = True) -> AdapterModule | None:
    """The router of an adapter's experts; None where it has one expert.

    softmax_bias: whether a softmax router has a bias. LoRA's has none, as published.
    """
    if config.expert_num == 1:
        return None
    return import_class(EXPERT_ROUTERS[config.expert_router].module)(target, config, softmax_bias)
