"""CoMoL: experts in the core of a LoRA, an r x r matrix each, chosen from the projected input (arXiv 2603.00573).

W x + s B sum_e p_e C_e^T A x        p = softmax(R A x), s = alpha / r
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from moa.adapter import AdapterModule, Target, linear_init, uniform, zeros
from moa.config import AdapterConfig


class CoMoL(AdapterModule):
    """lora_A (r, in), cores C (E, r, r), router R (E, r), lora_B (out, r); cores and router are replicated."""

    def __init__(self, target: Target, config: AdapterConfig):
        super().__init__()
        options = config.adapters["comol"]
        rank, num_cores = options.rank, options.cores
        self.target, self.scale = target, options.alpha / rank
        self.add_parameter(
            "lora_A", (rank, target.in_features), linear_init(target.in_features), target.shard_inputs(1)
        )
        self.add_parameter("cores", (num_cores, rank, rank), uniform(1 / math.sqrt(rank)))
        self.add_parameter("core_router", (num_cores, rank), linear_init(rank))
        self.add_parameter("lora_B", (target.out_features, rank), zeros, target.shard_outputs(0))

    def forward(self, x: Tensor, output: Tensor, gate: Tensor | None) -> Tensor:
        """x (N, in), the layer's output (N, out), gate (N, 1) -> output with the update, (N, out)."""
        a = self.target.project_in(x, self.lora_A)  # (N, r)
        mixed = torch.einsum("ne,nr,erk->nk", self.core_weights(a), a, self.cores.to(a.dtype))  # sum_e p_e C_e^T A x
        if gate is not None:
            mixed = mixed * gate
        return output + self.scale * self.target.project_out(mixed, self.lora_B)

    def core_weights(self, a: Tensor) -> Tensor:
        """p of each token: from a = A x (N, r) to (N, E)."""
        return F.linear(a, self.core_router.to(a.dtype)).softmax(-1)
