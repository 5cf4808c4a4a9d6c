"""Choosing the next token. A row's choices depend on its prompt, the seed and its logits alone."""

import hashlib

import torch
from torch import Tensor


def seeded_uniforms(prompt: list[int], seed: int, sample: int, n: int) -> Tensor:
    """(n,) numbers in [0, 1) for the n tokens of one row: drawn from its prompt, the seed and the sample's number, so
    that neither neighbours nor the row's place in a batch matter."""
    digest = hashlib.sha256(f"{seed}/{sample}/{prompt}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(n, generator=generator, dtype=torch.float64)


def sample(logits: Tensor, temperature: float, top_p: float, uniforms: Tensor | None) -> Tensor:
    """logits (R, V) float32 -> (R,) token ids.

    temperature 0: the largest logit, the lowest id of equals. Otherwise one draw per row, by its number in `uniforms`
    (R,), from the fewest most likely tokens whose probabilities sum to at least top_p.
    """
    if temperature == 0:
        return logits.argmax(-1)
    # Less the largest: a small temperature must not overflow
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    mass = ordered.double().cumsum(-1)
    kept = (mass - ordered < top_p * mass[:, -1:]).sum(-1, keepdim=True)  # those before them do not reach top_p
    kept.clamp_(min=1)  # 0 where a logit is not finite
    place = (mass <= uniforms[:, None] * mass.gather(-1, kept - 1)).sum(-1, keepdim=True)
    return ids.gather(-1, place).squeeze(-1)
