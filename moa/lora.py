"""LoRA: a low-rank update beside a linear layer (arXiv 2106.09685).

W x + sum_e g_e (alpha / r) B_e A_e x

rsLoRA's scale is alpha / sqrt(r) (arXiv 2312.03732). LoRA+ gives B a larger learning rate (arXiv 2402.12354).
"""

from torch import Tensor

from moa.adapter import AdapterModule, Target, apply_gates, linear_init, zeros
from moa.config import AdapterConfig
from moa.expert_routers import build_expert_router


class LoRA(AdapterModule):
    """E experts side by side: lora_A (E r, in), or (r, in) where they share it (hydra, arXiv 2404.19245);
    lora_B (out, E r)."""

    def __init__(self, target: Target, config: AdapterConfig):
        super().__init__()
        lora, num_experts = config.adapters["lora"], config.expert_num
        self.target, self.rank, self.scale = target, lora.rank, lora.scale
        width = lora.rank * num_experts
        a_shape = (lora.rank if lora.hydra else width, target.in_features)
        self.add_parameter("lora_A", a_shape, linear_init(target.in_features), target.shard_inputs(1))
        shard = target.shard_outputs(0)
        self.add_parameter("lora_B", (target.out_features, width), zeros, shard, lr_scale=lora.lr_ratio)
        self.expert_router = build_expert_router(target, config, softmax_bias=False)

    def forward(self, x: Tensor, output: Tensor, gate: Tensor | None) -> Tensor:
        """x (N, in), the layer's output (N, out), gate (N, E) -> output with the update, (N, out)."""
        a = self.target.project_in(x, self.lora_A)  # A x: (N, E r) or (N, r)
        if gate is not None:
            a = apply_gates(a, gate, self.rank)  # (N, E r)
        return output + self.scale * self.target.project_out(a, self.lora_B)
