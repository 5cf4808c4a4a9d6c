"""Routers of experts: from an adapter's own input to the weight of each of its E experts, per token.

u (N, in) is the input of the layer that the adapter stands beside; a router gets the products of u that it reads. One
that chooses may let its experts wither; its load-balancing loss, E sum_e f_e p_e, keeps them in use: f_e is the share
of tokens that chose expert e, p_e the mean weight that the router would give it.

Each returns the weights (N, E) in u's dtype and, where it is one that chooses, what its load-balancing loss is made of
(None in inference mode).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moa.adapter import AdapterModule, Target
from moa.config import AdapterConfig
from moa.load import load_class
from moa.methods import EXPERT_ROUTERS
from moa.routers import RouterLinear


class RouterStats(NamedTuple):
    """What a load-balancing loss is made of, (..., E) float32, means over tokens. load: f_e, without a gradient."""

    load: Tensor
    p: Tensor

    def loss(self) -> Tensor:
        """E sum_e f_e p_e, a float32 scalar; of several routers the sum of theirs."""
        return self.p.shape[-1] * (self.load * self.p).sum()


def _balance(chosen: Tensor, p: Tensor) -> RouterStats | None:
    """Of chosen (N, E), True or False, and p (N, E)."""
    return None if torch.is_inference_mode_enabled() else RouterStats(chosen.float().mean(0), p.mean(0))


class SoftmaxRouter(AdapterModule):
    """softmax(R u), with a bias where `soft_bias` says so."""

    def __init__(self, site: Target, config: AdapterConfig, soft_bias: bool):
        super().__init__()
        self.linear = RouterLinear(site.in_features, config.experts.expert_num, bias=soft_bias, cut=site.inputs(1))

    def reads(self) -> list[Tensor]:
        return [self.linear.weight]

    def forward(self, y: Tensor) -> tuple[Tensor, None]:
        return self.linear.finish(y).softmax(-1).to(y.dtype), None


class TopKRouter(AdapterModule):
    """The k largest of softmax(R u + b), made to sum to 1; under `noisy_router` the logits carry noise while training,
    N(0, 1) softplus(W_n u + b_n) (arXiv 1701.06538)."""

    def __init__(self, site: Target, config: AdapterConfig, soft_bias: bool):
        super().__init__()
        self.top_k = config.experts.top_k
        self.linear = RouterLinear(site.in_features, config.experts.expert_num, cut=site.inputs(1))
        noisy = config.experts.noisy_router
        self.noise = RouterLinear(site.in_features, config.experts.expert_num, cut=site.inputs(1)) if noisy else None
        self.draws = noisy

    def reads(self) -> list[Tensor]:
        return [self.linear.weight] + ([self.noise.weight] if self.noise is not None else [])

    def forward(self, y: Tensor, y_noise: Tensor | None = None) -> tuple[Tensor, RouterStats | None]:
        logits = self.linear.finish(y)
        if self.noise is not None and self.training:
            logits = logits + torch.randn_like(logits) * F.softplus(self.noise.finish(y_noise))
        best = logits.topk(self.top_k, -1).indices
        chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, best, True)
        weights = logits.masked_fill(~chosen, -torch.inf).softmax(-1)
        return weights.to(y.dtype), _balance(chosen, logits.softmax(-1))


class AdaMoLERouter(AdapterModule):
    """p = softmax(R u + b) against the threshold G = (1/E) s(w.u + b_G); d = p - G counts where it is not negative, and
    is divided by the sum (arXiv 2405.00361)."""

    def __init__(self, site: Target, config: AdapterConfig, soft_bias: bool):
        super().__init__()
        self.linear = RouterLinear(site.in_features, config.experts.expert_num, cut=site.inputs(1))
        self.threshold = RouterLinear(site.in_features, 1, cut=site.inputs(1))

    def reads(self) -> list[Tensor]:
        return [self.linear.weight, self.threshold.weight]

    def forward(self, y: Tensor, y_threshold: Tensor) -> tuple[Tensor, RouterStats | None]:
        p = self.linear.finish(y).softmax(-1)
        d = p - torch.sigmoid(self.threshold.finish(y_threshold)) / p.shape[1]
        chosen = d >= 0
        weights = d.masked_fill(~chosen, 0)
        total = weights.sum(-1, keepdim=True)
        weights = weights / total.masked_fill(total == 0, 1)  # all zero where no expert is chosen
        return weights.to(y.dtype), _balance(chosen, d)


def build_expert_router(site: Target, config: AdapterConfig, soft_bias: bool = True) -> AdapterModule | None:
    """The router of an adapter's experts; None where it has one expert. soft_bias: whether a soft router has a bias
    (LoRA's has none, as published)."""
    if config.experts.expert_num == 1:
        return None
    return load_class(EXPERT_ROUTERS[config.experts.expert_router].module)(site, config, soft_bias)
