"""Parts of a block as autograd functions that keep less for the backward pass, and products that are computed together.

Every function equals the plain formula of `llama.model` or `moa`; `llama.accelerate.forwards` puts them in its place.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from llama.model import apply_rotary_emb
from moa.parallel import all_reduce

aten = torch.ops.aten


class Fusable:
    """A function of small operations. `fuse_small_operations` lets torch.compile make them one kernel."""

    enabled = False

    def __init__(self, plain: Callable[..., Any]):
        self.plain, self._compiled = plain, None

    def __call__(self, *inputs: Any) -> Any:
        if not Fusable.enabled:
            return self.plain(*inputs)
        self._compiled = self._compiled or torch.compile(self.plain, dynamic=True)
        return self._compiled(*inputs)


def fuse_small_operations(device: torch.device) -> None:
    """From now on in this process. ValueError where torch.compile does not work."""
    Fusable.enabled = True
    try:
        swiglu(*torch.ones(2, 16, 16, device=device))
    except Exception as error:
        Fusable.enabled = False
        reason = str(getattr(error, "inner_exception", error)).partition("\n")[0]
        raise ValueError(f"--compile needs a C++ compiler on a CPU, Triton on a GPU ({reason})") from None


def upcast_on_cpu(t: Tensor) -> Tensor:
    """bf16 -> float32 on a CPU, whose bf16 attention takes three to five times as long."""
    return t.float() if t.device.type == "cpu" and t.dtype.itemsize < 4 else t


class RMSNormFunction(torch.autograd.Function):
    """Keeps x and 1 / sqrt(mean(x^2) + eps); autograd would keep four float32 copies of x on a CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed, grad_weight, grad_x = x.float() * scale, None, None
        grad = grad.float()
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            grad = grad * weight
            mean = (grad * normed).mean(-1, keepdim=True)
            grad_x = grad.sub_(normed.mul_(mean)).mul_(scale).to(x.dtype)
        return grad_x, grad_weight, None


def normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed x (N, D), and its scale (N, 1), in few operations: in a decode step each costs more to start than to
    compute."""
    wide = x.float()
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = torch.full_like(norm, eps).addcmul_(norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (wide * scale).mul_(weight).to(x.dtype), scale


def rotate(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """`apply_rotary_emb`; where it is fused in real numbers, as torch.compile knows no complex ones."""
    return rotate_pairs(x, torch.view_as_real(freqs_cis)) if Fusable.enabled else apply_rotary_emb(x, freqs_cis)


@Fusable
def rotate_pairs(x: Tensor, rotations: Tensor) -> Tensor:
    """x (N, heads, h), rotations (N, h/2, 2)."""
    a, b = x.to(rotations.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotations[:, None].unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


class RotaryFunction(torch.autograd.Function):
    """Rotates x (N, heads, h) by freqs_cis (N, h/2); the backward pass rotates back."""

    @staticmethod
    def forward(ctx, x: Tensor, freqs_cis: Tensor) -> Tensor:
        ctx.freqs_cis = freqs_cis
        return rotate(x, freqs_cis)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return rotate(grad, ctx.freqs_cis.conj().resolve_conj()), None


@Fusable
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate).mul_(up)


@Fusable
def swiglu_parts(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """silu(gate), and the whole."""
    silu_gate = F.silu(gate)
    return silu_gate, silu_gate * up


@Fusable
def swiglu_backward(gate: Tensor, up: Tensor, silu_gate: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up. silu_gate is overwritten."""
    return aten.silu_backward(grad * up, gate), silu_gate.mul_(grad)


class SwiGLUFunction(torch.autograd.Function):
    """silu(gate) * up, which keeps gate and up alone."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return swiglu_backward(gate, up, F.silu(gate), grad)


class PromptAttentionFunction(torch.autograd.Function):
    """output + sum_e weight_e times expert e's part of softmax(query keys^T) values.

    output, query (N, H, h); keys, values (K, E L, h), keys divided by sqrt(h); weight (H, E, N). Scores lie with tokens
    innermost: the softmax runs along an outer dimension, which takes a tenth of the time.
    """

    @staticmethod
    def forward(ctx, output: Tensor, query: Tensor, keys: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        q, k, v, w = _per_head(query, keys, values, weight)
        attention = torch.bmm(k, q.mT).softmax(1)  # (H, E L, N)
        total = output.to(q.dtype, copy=True)
        total.transpose(0, 1).baddbmm_(_weigh(attention, w).mT, v)
        ctx.save_for_backward(query, keys, values, weight, attention.to(query.dtype))
        return total.to(output.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        *inputs, attention = ctx.saved_tensors
        q, k, v, w = _per_head(*inputs)
        attention, heads = upcast_on_cpu(attention), upcast_on_cpu(grad).transpose(0, 1)  # (H, E L, N), (H, N, h)
        grad_weighed = torch.bmm(v, heads.mT)  # (H, E L, N)
        grad_weight = (grad_weighed * attention).unflatten(1, (w.shape[1], -1)).sum(2)
        grad_values = torch.bmm(_weigh(attention, w), heads)
        grad_scores = aten._softmax_backward_data(_weigh(grad_weighed, w), attention, 1, attention.dtype)
        grad_keys = torch.bmm(grad_scores, q)
        grad_query = torch.empty_like(inputs[0], dtype=q.dtype)
        torch.bmm(grad_scores.mT, k, out=grad_query.transpose(0, 1))
        grad_keys, grad_values = (t.unflatten(0, (len(inputs[1]), -1)).sum(1) for t in (grad_keys, grad_values))
        grads = (grad_query, grad_keys, grad_values, grad_weight)
        return grad, *(g.to(t.dtype) for g, t in zip(grads, inputs, strict=True))


def _per_head(query: Tensor, keys: Tensor, values: Tensor, weight: Tensor) -> list[Tensor]:
    """Queries (H, N, h), keys and values of each query head (H, E L, h), weights."""
    repeated = (t.repeat_interleave(query.shape[1] // len(t), 0) for t in (keys, values))
    return [upcast_on_cpu(t) for t in (query.transpose(0, 1), *repeated, weight)]


def _weigh(scores: Tensor, weight: Tensor) -> Tensor:
    """Scores (H, E L, N), each expert's times its weight (H, E, N)."""
    return (scores.unflatten(1, (weight.shape[1], -1)) * weight[:, :, None]).flatten(1, 2)


class FusedLinearFunction(torch.autograd.Function):
    """x (N, in) times frozen weights (k, in) each, and times one trained weight; one gradient of x for all.

    sharded: the frozen weights are this rank's shards, and their part of the gradient of x is summed over the ranks.
    """

    @staticmethod
    def forward(ctx, x: Tensor, trained: Tensor, sharded: bool, *frozen: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, trained)
        ctx.frozen, ctx.sharded = frozen, sharded
        return tuple(F.linear(x, weight) for weight in (*frozen, trained))

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, trained = ctx.saved_tensors
        return *_linear_backward(x, ctx.frozen, trained, grads, ctx.sharded), None, *(None for _ in ctx.frozen)


class FusedSwiGLULinearFunction(torch.autograd.Function):
    """The same for one frozen weight and x = silu(gate) * up, which the backward pass recomputes."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, trained: Tensor, frozen: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(gate, up, trained)
        ctx.frozen = frozen
        x = swiglu(gate, up)
        return F.linear(x, frozen), F.linear(x, trained)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, trained = ctx.saved_tensors
        silu_gate, x = swiglu_parts(gate, up)
        grad_x, grad_trained = _linear_backward(x, [ctx.frozen], trained, grads)
        return *swiglu_backward(gate, up, silu_gate, grad_x), grad_trained, None


def _linear_backward(
    x: Tensor, frozen: Sequence[Tensor], trained: Tensor, grads: Sequence[Tensor], sharded: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the trained weight."""
    *grads_frozen, grad_trained = grads
    grad_x = grads_frozen[0] @ frozen[0]
    for grad, weight in zip(grads_frozen[1:], frozen[1:], strict=True):
        grad_x.addmm_(grad, weight)
    grad_x = all_reduce(grad_x) if sharded else grad_x
    grad_x.addmm_(grad_trained, trained)
    return grad_x, grad_trained.T @ x
