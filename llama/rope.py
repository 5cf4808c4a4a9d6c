"""Rotary position embedding (arXiv 2104.09864), with LLaMA-3.1's frequency scaling."""

import math

import torch
from torch import Tensor

from llama.args import ModelArgs


def frequencies(args: ModelArgs) -> Tensor:
    """(h/2,) float32: radians per position of each pair of a head's components.

    With `use_scaled_rope`, pairs whose wavelength exceeds the original context / low_freq_factor turn
    `rope_scaling_factor` times slower, those below context / high_freq_factor stay, those between are interpolated.
    """
    exponents = torch.arange(0, args.head_dim, 2, dtype=torch.float32) / args.head_dim
    freqs = 1.0 / args.rope_theta**exponents
    if not args.use_scaled_rope:
        return freqs
    turns = args.rope_original_max_seq_len * freqs / (2 * math.pi)  # full turns within the original context
    low, high = args.rope_low_freq_factor, args.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (kept + (1 - kept) / args.rope_scaling_factor)


def rotations(freqs: Tensor, positions: Tensor) -> Tensor:
    """(..., h/2) complex64, of length 1: how far each pair of components turns at these positions (...)."""
    angles = positions.float()[..., None] * freqs
    return torch.complex(angles.cos(), angles.sin())


class Rope:
    """The rotations of a batch, shared by all layers. turns: (N, h/2), of the batch's positions.

    Turns (N, heads, h) tensors; in Meta's layout components 2i and 2i + 1 form a pair, read as a complex number.
    """

    def __init__(self, turns: Tensor):
        self.forth = turns[:, None]
        self.back = self.forth.conj().resolve_conj() if torch.is_grad_enabled() else None

    def __call__(self, x: Tensor) -> Tensor:
        return _Turn.apply(x, self.forth, self.back) if torch.is_grad_enabled() else _turn(x, self.forth)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, forth: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return _turn(x, forth)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _turn(grad, ctx.back), None, None


def _turn(x: Tensor, by: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * by).flatten(-2).to(x.dtype)
