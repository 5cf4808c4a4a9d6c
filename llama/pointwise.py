"""Two pointwise parts of a block whose backward passes keep little and work the rest out again.

Left to autograd they keep more than the matrices between them need: a norm on a CPU four float32 copies of its input,
silu(gate) * up a third tensor of the hidden width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension, in float32 inside. x (N, D), weight (D,)."""
    if x.device.type == "cuda":  # which has a kernel for it
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RMSNorm.apply(x, weight, eps) if torch.is_grad_enabled() else _normed(x, weight, eps)[0]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)


def swiglu_gradients(gate: Tensor, up: Tensor, active: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Those of gate and up. active: silu(gate), which is overwritten."""
    return torch.ops.aten.silu_backward(grad * up, gate), active.mul_(grad)


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed x, and 1 / sqrt(mean(x^2) + eps), (N, 1), in as few operations as can be: in a decode step each takes
    longer to start than to compute."""
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = torch.full_like(norm, eps).addcmul_(norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (wide * scale).mul_(weight).to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

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
        return swiglu_gradients(gate, up, F.silu(gate), grad)
