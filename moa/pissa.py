"""PiSSA: a LoRA that starts from the principal part of its matrix (arXiv 2404.02948).

W x + s (B A - B0 A0) x        s = alpha / r; s B0 A0 is W's best approximation of rank r, and A, B start as A0, B0

The paper takes s B0 A0 out of W; subtracting it here leaves the base as it is, and the model starts the same.
"""

import torch
from torch import Tensor

from moa.adapter import AdapterModule, Target
from moa.config import AdapterConfig
from moa.parallel import Shard, gather, mp_size

OVERSAMPLING, ITERATIONS = 8, 4  # of the randomised decomposition


class PiSSA(AdapterModule):
    """lora_A (r, in) and lora_B (out, r); start_A and start_B, what they started as, are saved and do not train."""

    def __init__(self, target: Target, config: AdapterConfig):
        super().__init__()
        options = config.adapters["pissa"]
        self.target, self.rank, self.scale = target, options.rank, options.alpha / options.rank
        if self.rank > min(target.in_features, target.out_features):
            shape = f"({target.out_features}, {target.in_features})"
            raise ValueError(f"pissa_rank {self.rank} is more than a matrix of shape {shape} has")
        inputs, outputs = target.shard_inputs(1), target.shard_outputs(0)
        for name, trained in (("lora", True), ("start", False)):
            self.add_parameter(f"{name}_A", (self.rank, target.in_features), self._init_a, inputs, trained=trained)
            self.add_parameter(f"{name}_B", (target.out_features, self.rank), self._init_b, outputs, trained=trained)

    def _init_a(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return self.principal_factors()[0]

    def _init_b(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return self.principal_factors()[1]

    def principal_factors(self) -> tuple[Tensor, Tensor]:
        """A0 (r, in) and B0 (out, r), whole: sqrt(S / s) V^T and U sqrt(S / s) of W's largest singular values S."""
        weight = self.target.layers[0].weight
        if self.target.parallel is not None and mp_size() > 1:
            dim = 0 if self.target.parallel == "column" else 1
            weight = gather(weight, Shard(dim, self.target.num_shards or mp_size()))
        n = min(self.rank + OVERSAMPLING, *weight.shape)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(weight.float(), n, ITERATIONS)
        root = (s[: self.rank] / self.scale).sqrt()
        return (root[:, None] * v.T[: self.rank]).cpu(), (u[:, : self.rank] * root).cpu()

    def forward(self, x: Tensor, output: Tensor, gate: Tensor | None) -> Tensor:
        """x (N, in), the layer's output (N, out), gate (N, 1) -> output with the update, (N, out)."""
        a = self.target.project_in(x, torch.cat([self.lora_A, self.start_A]))  # (N, 2 r)
        if gate is not None:
            a = a * gate
        return output + self.scale * self.target.project_out(a, torch.cat([self.lora_B, -self.start_B], 1))
