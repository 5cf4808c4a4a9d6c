"""Copies of weights for generation: their products are the plain ones, and they last as long as the weights do."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import llama.copies
import llama.derivations
import llama.parallel_layers
from llama import Llama
from llama.copies import can_pack, fits_half, frozen_product, product_of_copy
from tiny import build, drawn, tokens

needs_pack = pytest.mark.skipif(not can_pack(), reason="no fbgemm here")


@pytest.mark.parametrize("n", [1, 2, 16, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packs", [False, pytest.param(True, marks=needs_pack)])
def test_the_product_of_a_copy(n: int, dtype: torch.dtype, packs: bool, monkeypatch) -> None:
    """Of two weights, one above the other. Packed ones are multiplied in float32."""
    monkeypatch.setattr(llama.copies, "can_sort", lambda: False)
    monkeypatch.setattr(llama.copies, "can_pack", lambda: packs)
    weights = [drawn(k, 200).bfloat16().to(dtype) for k in (40, 23)]
    x = drawn(n, 200).to(dtype)
    product = product_of_copy(weights, dtype)
    assert isinstance(product, partial) != packs
    wanted = F.linear(x.double(), torch.cat(weights).double())
    within = 1e-5 if dtype == torch.float32 else 2e-2
    found = product(x)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=within, atol=within * 15)


@pytest.mark.parametrize(
    "weight", [drawn(6, 50), drawn(6, 50).bfloat16().float() * 2**17, torch.full((6, 50), 2.0**-26)]
)
def test_a_weight_that_fp16_does_not_hold_stays_as_it_is(weight: Tensor) -> None:
    """Numbers of float32, ones beyond fp16's, ones below its smallest."""
    assert not fits_half(weight) and fits_half(drawn(6, 50).bfloat16())
    x = drawn(3, 50)
    assert torch.equal(product_of_copy([weight], torch.float32)(x), frozen_product(x, weight))


def test_other_types_are_copied_as_they_are() -> None:
    x, weight = drawn(3, 50).double(), drawn(6, 50).double()
    assert torch.equal(product_of_copy([weight], torch.float64)(x), F.linear(x, weight))


def test_a_row_of_one_value_too_many_digits_does_not_fit() -> None:
    weight = drawn(6, 50).bfloat16().float()
    assert fits_half(weight)
    weight[3, 7] += 2**-14
    assert not fits_half(weight)


class Counted:
    """`product_of_copy`, and how often it was asked."""

    def __init__(self, monkeypatch):
        self.n = 0
        monkeypatch.setattr(llama.parallel_layers, "product_of_copy", self)

    def __call__(self, *words) -> llama.copies.Product:
        self.n += 1
        return product_of_copy(*words)

    def of(self, llm: Llama, steps: int = 6) -> tuple[int, list[list[int]]]:
        """How many copies a run makes, and its answers."""
        before, row = self.n, [256, *tokens(7).tolist()]
        answers = llm.generate([row, row[:5]], steps, steps)
        return self.n - before, answers


@pytest.fixture
def copies(monkeypatch) -> Counted:
    monkeypatch.setattr(llama.derivations, "COPIES_PAY_FROM", 6)
    return Counted(monkeypatch)


def test_copies_last_until_a_weight_changes(copies: Counted) -> None:
    llm = build("soft_moa")
    made, answers = copies.of(llm)
    assert made == 4 * 3 + 1 and copies.of(llm) == (0, answers)
    assert copies.of(llm, 5) == (0, [row[:5] for row in answers])  # fewer steps than would pay for them
    one, other = llm.model.layers[1].attention.wo.weight, llm.model.output.weight
    with torch.no_grad():
        one.add_(drawn(*one.shape), alpha=0.2)
    found = copies.of(llm)
    assert found[0] == made and found[1] != answers
    other.data += 0.3 * drawn(*other.shape)  # no version is counted
    again = copies.of(llm)
    assert again[0] == made and again[1] != found[1]
    fresh = Llama(llm.model, llm.tokenizer, llm.max_seq_len, llm.max_batch_size)
    assert copies.of(fresh, 5) == (0, [row[:5] for row in again[1]])


def test_what_an_adapter_gives_is_of_its_weights_now(copies: Counted) -> None:
    llm = build("soft_moa")
    before = copies.of(llm)[1]
    for parameter in llm.model.parameters():
        if parameter.requires_grad:
            parameter.data *= -2
    after = copies.of(llm)[1]
    assert after != before
    assert after == copies.of(Llama(llm.model, llm.tokenizer, llm.max_seq_len, llm.max_batch_size))[1]


@needs_pack
def test_a_hook_sees_no_pass_that_was_not_asked_for(copies: Counted) -> None:
    llm, seen = build("soft_moa"), []
    handle = llm.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    copies.of(llm)
    assert len(seen) == 6
    handle.remove()


def test_short_runs_make_none(copies: Counted) -> None:
    llm = build("soft_moa")
    assert copies.of(llm, 5)[0] == 0 and copies.of(llm)[0] > 0


def test_without_memory_there_are_none(copies: Counted, monkeypatch) -> None:
    monkeypatch.setattr(llama.derivations, "free_memory", lambda device: 0)
    assert copies.of(build("soft_moa"))[0] == 0
