"""flash-attn 2's variable-length kernel takes the place of PyTorch's attention; here one written from its published
signature stands for it, so that the call is tested without a GPU."""

import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

import llama.generation
from llama import Llama
from moa.rows import Rows
from tiny import BASE, METHODS, gradients, relative, shared, tokens


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
) -> Tensor:
    """q (total_q, H, h), k and v (total_k, K, h), K dividing H; cu_seqlens (R + 1,) int32; -> (total_q, H, h)."""
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        assert tensor.dtype == torch.int32 and tensor.device == q.device, name
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k) == len(v)
    assert cu_seqlens_q.diff().max() == max_seqlen_q and cu_seqlens_k.diff().max() == max_seqlen_k
    shared_by = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for begin, end in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        for head in range(q.shape[1]):
            keys, values = (t[begin:end, head // shared_by] for t in (k, v))
            scores = q[begin:end, head] @ keys.T / q.shape[-1] ** 0.5
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
            out[begin:end, head] = scores.softmax(-1) @ values
    return out


@pytest.fixture
def flash(monkeypatch) -> list[int]:
    """The package as if it were installed; counts its calls."""
    calls: list[int] = []

    def counted(*args, **kwargs) -> Tensor:
        calls.append(1)
        return flash_attn_varlen_func(*args, **kwargs)

    module = ModuleType("flash_attn")
    module.flash_attn_varlen_func = counted
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


@pytest.mark.parametrize("name", [None, *METHODS])
def test_same_results_by_the_kernel(name: str | None, flash: list[int], monkeypatch) -> None:
    llm = shared(name)
    model, batch = llm.model, tokens(2, 7)
    rows = Rows([3, 1, 10], "cpu")
    ragged = tokens(14)
    prompts = [[256, 1, 2, 3], [256, 9], [256, 4, 4, 7, 8, 1]]

    def results() -> tuple[Tensor, Tensor, list, dict]:
        if name is not None:
            sum(model.losses(ragged, ragged, rows)).backward()
        return model(batch), model.hidden(ragged, rows), llm.generate(prompts, max_gen_len=5), gradients(model)

    expected = results()
    assert not flash
    monkeypatch.setattr(model, "flash", True)
    found = results()
    assert len(flash) == (4 if name else 3) * 3  # each layer: the loss, logits, hidden, one prefill
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)
    assert found[2] == expected[2]
    for key, grad in found[3].items():
        assert relative(grad, expected[3][key]) < (2e-3 if "threshold" in key else 1e-4), key  # sums in another order


def test_asked_for_without_the_package(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # importing it raises ImportError
    with pytest.raises(ValueError, match="flash_attention2: the package flash-attn is not installed"):
        Llama.build(BASE, device="cpu", flash_attention2=True)


def test_asked_for_where_it_cannot_run(flash: list[int], monkeypatch) -> None:
    with pytest.raises(ValueError, match="flash_attention2 needs a GPU"):
        Llama.build(BASE, device="cpu", bf16=True, flash_attention2=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="flash_attention2 needs bf16"):
        llama.generation.require_flash("auto", bf16=False)
    llama.generation.require_flash("auto", bf16=True)
