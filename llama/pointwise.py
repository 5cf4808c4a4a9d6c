"""Two pointwise parts of a block whose backward passes keep little and work the rest out again.

Left to autograd they keep more than the matrices between them need: a norm on a CPU four float32 copies of its input,
silu(gate) * up a third tensor of the hidden width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension, in float32 inside. x (N, D), weight (D,)."""
    if x.device.type == "cuda" or not torch.is_grad_enabled():  # a kernel that does so; a CPU's keeps much
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, of_weight, of_x = x.float() * scale, None, None
        wide = grad.float()
        if ctx.needs_input_grad[1]:
            of_weight = (wide * normed).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            wide = wide * weight
            along = (wide * normed).mean(-1, keepdim=True)
            of_x = wide.sub_(normed.mul_(along)).mul_(scale).to(x.dtype)
        return of_x, of_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_up = F.silu(gate).mul_(grad)
        return torch.ops.aten.silu_backward(grad * up, gate), of_up
