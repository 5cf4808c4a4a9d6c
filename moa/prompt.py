"""Layer-wise prompt with a zero-initialised gate per head (LLaMA-Adapter, arXiv 2303.16199).

Each head's query also attends to E L trained vectors P, L of each expert, in a softmax of their own:

    z sum_e g_e softmax(q (W_k P)^T / sqrt(h))_e (W_v P_e)

W_k and W_v are the frozen projections; the keys get no rotary embedding. Where the model norms its keys, so are these.
"""

import math

import torch
from torch import Tensor

from moa.adapter import AdapterModule, Target, normal, zeros
from moa.config import AdapterConfig
from moa.expert_routers import build_expert_router
from moa.parallel import copy_to_model_parallel_region


class Prompt(AdapterModule):
    """prompt (E L, D), replicated; gate (H,), sharded as the heads."""

    def __init__(self, target: Target, config: AdapterConfig):
        super().__init__()
        self.target, self.num_experts = target, config.expert_num
        length = self.num_experts * config.adapters["prompt"].len
        self.add_parameter("prompt", (length, target.in_features), normal)
        self.add_parameter("gate", (target.n_heads,), zeros, target.shard_outputs(0))
        self.expert_router = build_expert_router(target, config)

    def keys_and_values(self, prompt: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        """Of the vectors `prompt` in the type of the layers, (E L, K, h) each, of this rank's key/value heads."""
        prompt = copy_to_model_parallel_region(prompt)
        wk, wv, k_norm = self.target.layers
        return k_norm(wk(prompt).unflatten(-1, (-1, head_dim))), wv(prompt).unflatten(-1, (-1, head_dim))

    def forward(self, x: Tensor, output: Tensor, gate: Tensor | None, query: Tensor) -> Tensor:
        """output (N, H, h), the attention's; query (N, H, h), rotated; gate (N, E) -> output with the prompt's part.

        x, the attention's input, is not needed here.
        """
        keys, values = self.keys_and_values(self.prompt.to(query.dtype), query.shape[-1])
        groups = query.shape[1] // keys.shape[1]
        keys, values = (t.repeat_interleave(groups, 1) for t in (keys, values))  # (E L, H, h)
        scores = torch.einsum("nhd,lhd->nhl", query, keys) / math.sqrt(query.shape[-1])
        weights = scores.float().softmax(-1).to(query.dtype)
        if gate is not None:
            gate = copy_to_model_parallel_region(gate.to(query.dtype))  # each rank's heads give a part of its gradient
            weights = (weights.unflatten(-1, (self.num_experts, -1)) * gate[:, None, :, None]).flatten(2)
        return output + self.gate.to(query.dtype)[:, None] * torch.einsum("nhl,lhd->nhd", weights, values)
