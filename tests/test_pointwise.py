"""The parts of a block with backward passes of their own, against autograd on the plain formulas."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from llama.pointwise import rms_norm, swiglu
from tiny import drawn


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return drawn(*shape, dtype=dtype).requires_grad_(True)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_a_norm_and_its_gradients_are_the_formulas(dtype, within, trained) -> None:
    x, weight = leaf(7, 24, dtype=dtype), drawn(24, dtype=dtype).requires_grad_(trained)
    out, grad = rms_norm(x, weight, 1e-5), drawn(7, 24, dtype=dtype).flip(0)
    exact_x, exact_weight = (t.detach().double().requires_grad_(True) for t in (x, weight))
    exact = exact_x / (exact_x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * exact_weight
    out.backward(grad)
    exact.backward(grad.double())
    assert out.dtype == dtype and (weight.grad is not None) == trained
    for found, expected in ((out, exact), (x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        if found is not None:
            torch.testing.assert_close(found.double(), expected, rtol=within, atol=within)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gated_unit_and_its_gradients_are_autograds_to_the_bit(dtype) -> None:
    grad = drawn(9, 16, dtype=dtype).flip(1)
    leaves = [[leaf(9, 16, dtype=dtype), drawn(16, 9, dtype=dtype).T.requires_grad_(True)] for _ in range(2)]
    first, second = swiglu(*leaves[0]), F.silu(leaves[1][0]) * leaves[1][1]
    first.backward(grad)
    second.backward(grad)
    assert torch.equal(first, second)
    for found, expected in zip(*leaves, strict=True):
        assert torch.equal(found.grad, expected.grad)


def test_what_is_kept_is_the_input_alone() -> None:
    kept = []
    x, weight, gate, up = leaf(5, 8), drawn(8), leaf(5, 6), leaf(5, 6)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        rms_norm(x, weight, 1e-5)
        swiglu(gate, up)
    assert kept == [40, 8, 5, 30, 30]


def test_derivatives_by_differences() -> None:
    gate, up = (leaf(3, 4, dtype=torch.float64) for _ in range(2))
    assert gradcheck(swiglu, (gate, up))
