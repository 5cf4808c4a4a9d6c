"""LoRA: a low-rank update beside a linear layer (arXiv 2106.09685), W u + g (alpha / r) B A u."""

from torch import Tensor

from moa.adapter import AdapterModule, Site, like_linear, project_in, project_out, zeros
from moa.config import AdapterConfig


class LoRA(AdapterModule):
    """A: (r, in), B: (out, r)."""

    def __init__(self, site: Site, config: AdapterConfig):
        super().__init__()
        knobs = config.adapters["lora"]
        self.site = site
        self.scale = knobs.alpha / knobs.rank
        self.declare(
            "A", (knobs.rank, site.in_features), like_linear(site.in_features), 1 if site.cut == "in" else None
        )
        self.declare("B", (site.out_features, knobs.rank), zeros, 0 if site.cut == "out" else None)

    def forward(self, u: Tensor, gate: Tensor | None) -> Tensor:
        """u (N, in) -> what to add to the layer's output (N, out). The gate (N, 1) weighs the r-wide middle: the same
        product for a fraction of the work, and whole on every model-parallel rank."""
        a = project_in(self.site, u, self.A)
        a = a * (self.scale if gate is None else gate * self.scale)
        return project_out(self.site, a, self.B)
