"""MixLoRA: experts of the whole feed-forward block, with updates inside its nonlinearity (arXiv 2404.15159).

sum_e g_e (W2 + D2_e) (silu((W1 + D1_e) x) * (W3 + D3_e) x)        D = s B A, s = alpha / r

g is a top-k router's: the k largest of softmax(R x), divided by their sum.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moa.adapter import AdapterModule, Target, linear_init, normal, zeros
from moa.config import AdapterConfig
from moa.expert_routers import ExpertRouter, TopKRouter
from moa.parallel import copy_to_model_parallel_region


class MixLoRARouter(TopKRouter):
    """R x without a bias, R from N(0, 0.02)."""

    def __init__(self, target: Target, num_experts: int, top_k: int):
        ExpertRouter.__init__(self, target, num_experts, bias=False, init=lambda *args: 0.02 * normal(*args))
        self.top_k, self.noise = top_k, None


class MixLoRA(AdapterModule):
    """E experts: A1, A3 (E r, D), B1, B3 (F, E r), A2 (E r, F), B2 (D, E r). target.layers: w2."""

    def __init__(self, target: Target, config: AdapterConfig):
        super().__init__()
        options, (w2,) = config.adapters["mixlora"], target.layers
        dim, hidden, width = target.in_features, w2.in_features, options.rank * options.experts
        self.target, self.rank, self.num_experts = target, options.rank, options.experts
        self.scale = options.alpha / options.rank
        self.up = Target(dim, hidden, "column", target.n_heads)  # of w1 and w3
        self.down = Target(hidden, dim, "row", target.n_heads)
        for name in ("1", "3"):
            self.add_parameter(f"lora_A{name}", (width, dim), linear_init(dim))
            self.add_parameter(f"lora_B{name}", (hidden, width), zeros, self.up.shard_outputs(0))
        self.add_parameter("lora_A2", (width, hidden), linear_init(hidden), self.down.shard_inputs(1))
        self.add_parameter("lora_B2", (dim, width), zeros)
        self.expert_router = MixLoRARouter(target, options.experts, options.top_k)

    def forward(self, x: Tensor, output: Tensor, gate: Tensor, w1_x: Tensor, w3_x: Tensor) -> Tensor:
        """x (N, D), the block's output (N, D), gate (N, E), w1_x and w3_x (N, F) -> (N, D).

        That is output + sum_e g_e (expert_e(x) - W2 (silu(w1_x) * w3_x)): what other adapters add to W2 stays. Without
        a router of the block the gates sum to 1.
        """
        a1, a3 = (self.up.project_in(x, a).split(self.rank, -1) for a in (self.lora_A1, self.lora_A3))
        b1, b3 = (b.split(self.rank, 1) for b in (self.lora_B1, self.lora_B3))
        shared_gate = copy_to_model_parallel_region(gate)  # it weighs shards of hidden units
        weighed = []
        for e in range(self.num_experts):
            gate_proj = w1_x + self.scale * self.up.project_out(a1[e], b1[e])
            up_proj = w3_x + self.scale * self.up.project_out(a3[e], b3[e])
            weighed.append(shared_gate[:, e, None] * F.silu(gate_proj) * up_proj)
        low_rank = zip(weighed, self.lora_A2.split(self.rank), strict=True)
        a2 = torch.cat([self.down.project_in(hidden, a) for hidden, a in low_rank], 1)  # (N, E r)
        (w2,) = self.target.layers
        change = sum(weighed) - shared_gate.sum(1, keepdim=True) * F.silu(w1_x) * w3_x
        return output + w2(change) + self.scale * self.down.project_out(a2, self.lora_B2)
