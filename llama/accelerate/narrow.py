"""Trained weights in the type of the activations, on a GPU those of the whole model at once.

A training step reads every adapter's weights in bf16, those that share an input one above the other. Made one by one,
each copy would be a launch or two, and its gradient, back to float32, another.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class NarrowCopies:
    """What a forward pass read is made for the next one by one copy of many tensors, as are its gradients."""

    def __init__(self) -> None:
        self._copies: dict[tuple, Tensor | None] = {}  # (type, weights...) -> the copy; None: from the next pass on

    def refresh(self) -> None:
        """Begin a forward pass: the weights have changed since the last."""
        if self._copies and torch.is_grad_enabled():
            keys = list(self._copies)
            copies = _Copies.apply(keys, *(weight for _, *weights in keys for weight in weights))
            self._copies = dict(zip(keys, copies, strict=True))

    def stacked(self, weights: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Weights (k, ...) one above the other, in this type."""
        if weights[0].is_cuda and weights[0].dtype != dtype and torch.is_grad_enabled():
            copy = self._copies.setdefault((dtype, *weights), None)
            if copy is not None:
                return copy
        return (weights[0] if len(weights) == 1 else torch.cat(list(weights))).to(dtype)


class _Copies(torch.autograd.Function):
    """The copies of `NarrowCopies`, by their keys."""

    @staticmethod
    def forward(ctx, keys: Sequence[tuple], *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.heights, ctx.dtype = [[len(weight) for weight in ws] for _, *ws in keys], weights[0].dtype
        copies = tuple(
            ws[0].new_empty(sum(heights), *ws[0].shape[1:], dtype=dtype)
            for (dtype, *ws), heights in zip(keys, ctx.heights, strict=True)
        )
        parts = [part for copy, heights in zip(copies, ctx.heights, strict=True) for part in copy.split(heights)]
        torch._foreach_copy_(parts, weights)
        return copies

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        parts: list[Tensor | None] = []
        for grad, heights in zip(grads, ctx.heights, strict=True):
            parts += [None] * len(heights) if grad is None else grad.split(heights)
        narrow = [part for part in parts if part is not None]
        wide = [torch.empty_like(part, dtype=ctx.dtype) for part in narrow]
        torch._foreach_copy_(wide, narrow)
        of_part = iter(wide)
        return None, *(None if part is None else next(of_part) for part in parts)
