"""The frozen layers' products, and those of adapters beside them, against the plain formulas."""

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from llama.copies import frozen_product
from llama.parallel_layers import RowParallel, _GatedSideBySide, gated_side_by_side
from moa.adapter import AdapterModule, Target, zeros
from moa.block import AdapterDict
from tiny import drawn


@pytest.mark.parametrize("n", [1, 2, 64, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [False, True])
def test_a_frozen_product_is_the_layers_for_any_number_of_rows(n: int, dtype: torch.dtype, grad: bool) -> None:
    x, weight = drawn(n, 24, dtype=dtype).requires_grad_(grad), drawn(40, 24, dtype=dtype)
    with torch.set_grad_enabled(grad):
        found = frozen_product(x, weight)
    within = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, F.linear(x, weight), rtol=within, atol=within)
    assert found.is_contiguous() and found.requires_grad == grad


class Reader(AdapterModule):
    """At a layer from 6 to 4. narrow: it reads a product of two numbers, else the whole input."""

    def __init__(self, narrow: bool):
        super().__init__()
        self.narrow = narrow
        self.add_parameter("A", (2, 6), zeros)
        self.A.data = drawn(2, 6)

    def reads(self) -> list[Tensor]:
        return [self.A] if self.narrow else []


def beside(*readers: Reader) -> AdapterDict:
    adapters = AdapterDict(None, [], {"FFN_DOWN": Target(6, 4, "in", 1)})
    for number, reader in enumerate(readers):
        adapters[f"reader_{number}"] = reader
        adapters.slots_at["FFN_DOWN"].append(f"reader_{number}")
    return adapters


def inputs() -> tuple[Tensor, Tensor, RowParallel]:
    layer = RowParallel(6, 4)
    layer.weight = torch.nn.Parameter(drawn(4, 6), requires_grad=False)
    return drawn(5, 6).requires_grad_(), drawn(5, 6).flip(0).requires_grad_(), layer


@pytest.mark.parametrize("narrow", [[], [True], [False], [True, True], [True, False]])
@pytest.mark.parametrize("trains", [False, True])
def test_what_lies_behind_a_gated_product(narrow: list[bool], trains: bool) -> None:
    """Its layer's output, and what those beside the layer read or see of it."""
    gate, up, layer = inputs()
    readers = [Reader(each) for each in narrow]
    with torch.set_grad_enabled(trains):
        output, read = gated_side_by_side(gate, up, layer, beside(*readers), "FFN_DOWN")
    wanted = F.silu(gate) * up
    torch.testing.assert_close(output, wanted @ layer.weight.T)
    for reader in readers:
        (found,) = read.by(reader)
        torch.testing.assert_close(found, wanted @ reader.A.T if reader.narrow else wanted)


def test_a_gated_product_is_not_kept() -> None:
    gate, up, layer = inputs()
    kept, reader = [], Reader(narrow=True)
    with saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        gated_side_by_side(gate, up, layer, beside(reader), "FFN_DOWN")
    assert kept == [gate.data_ptr(), up.data_ptr(), reader.A.data_ptr()]


def test_derivatives_by_differences() -> None:
    gate, up, trained = (drawn(*shape, dtype=torch.float64).requires_grad_() for shape in ((3, 6), (3, 6), (2, 6)))
    frozen = [drawn(4, 6, dtype=torch.float64), drawn(5, 6, dtype=torch.float64)]
    assert gradcheck(lambda *leaves: _GatedSideBySide.apply(*leaves, *frozen), (gate, up, trained))
