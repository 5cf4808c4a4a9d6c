"""LoRA: a low-rank update beside a linear layer (arXiv 2106.09685), W u + sum_e g_e (alpha / r) B_e A_e u."""

from torch import Tensor

from moa.adapter import AdapterModule, Target, add_product, like_linear, narrow_type, weigh, zeros
from moa.config import AdapterConfig
from moa.expert_routers import build_expert_router


class LoRA(AdapterModule):
    """E experts, lying side by side: A (E r, in), or (r, in) where they share it (hydra, arXiv 2404.19245);
    B (out, E r)."""

    def __init__(self, site: Target, config: AdapterConfig):
        super().__init__()
        knobs, n_experts = config.adapters["lora"], config.experts.expert_num
        self.site, self.rank = site, knobs.rank
        self.scale = knobs.alpha / knobs.rank
        width = knobs.rank * n_experts
        self.add_parameter(
            "A",
            (knobs.rank if knobs.hydra else width, site.in_features),
            like_linear(site.in_features),
            site.inputs(1),
        )
        self.add_parameter("B", (site.out_features, width), zeros, site.outputs(0))
        self.expert_router = build_expert_router(site, config, soft_bias=False)

    def reads(self) -> list[Tensor]:
        return [self.A]

    def forward(self, output: Tensor, a: Tensor, gate: Tensor | None) -> Tensor:
        """The layer's output (N, out) and a = A u, (N, E r) or (N, r) -> the output with the update. The gate (N, E)
        weighs the r-wide middles: the same product for a fraction of the work, and whole on every model-parallel
        rank."""
        if gate is not None:
            a = weigh(a, gate, self.rank)  # (N, E r)
        return add_product(output, self.site, a, self.turned("B", narrow_type(self, a)), self.scale)
