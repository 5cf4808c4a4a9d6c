"""Variable-length kernels of a GPU, flash-attn 2's and PyTorch's own; here others, written from their published
signatures, stand for them, so that the calls are tested without a GPU."""

import inspect
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import llama.machine
from llama import Llama
from llama.accelerate import attention
from llama.machine import check_machine
from llama.model import causal_attention
from llama.packing import PackedBatch
from tiny import ALL, BASE, drawn, gradients, prompts, relative, shared, tokens


def by_ends(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int) -> Tensor:
    """Causal attention of q (N, H, h) to k and v (N, K, h), of sequences that end at `ends_q` (R + 1,) int32."""
    for tensor, ends, longest in ((q, ends_q, longest_q), (k, ends_k, longest_k), (v, ends_k, longest_k)):
        assert ends.dtype == torch.int32 and ends.device == q.device
        assert ends[-1] == len(tensor) and ends.diff().max() == longest
    return causal_attention(q, k, v, PackedBatch(ends_q.diff().tolist(), "cpu"))


@pytest.fixture
def flash(monkeypatch) -> list[bool]:
    """The package as if it were installed; `causal` of each of its calls."""
    calls: list[bool] = []

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False) -> Tensor:
        calls.append(causal)
        return by_ends(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)

    module = SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    return calls


@pytest.mark.parametrize("name", ALL)
def test_same_results_by_the_kernel(name: str | None, flash: list[bool], monkeypatch) -> None:
    llm = shared(name)
    model, batch, ragged, rows = llm.model, tokens(2, 7), tokens(14), PackedBatch([3, 1, 10], "cpu")

    def results() -> tuple[Tensor, Tensor, list, dict]:
        if name is not None:
            losses = model(ragged, labels=ragged, batch=rows)
            stats = losses.router_stats
            aux = 0 if stats is None else model.load_balancing_loss(stats, stats.tokens_per_expert / 14) / 14
            (losses.ce_loss + aux).backward()
        hidden, _ = model.forward_hidden(ragged, rows)
        return model(batch), hidden, llm.generate(prompts(4, 2, 6), max_gen_len=5), gradients(model)

    expected = results()
    assert not flash
    for block in model.layers:
        monkeypatch.setattr(block.attention, "causal_attention", partial(attention.causal_attention, flash=True))
    actual = results()
    assert flash == [True] * (4 if name else 3) * 3  # each layer: the loss, logits, hidden, one prefill
    torch.testing.assert_close(actual[:2], expected[:2], rtol=1e-4, atol=1e-4)
    assert actual[2] == expected[2]
    for key, grad in actual[3].items():
        assert relative(grad, expected[3][key]) < (2e-3 if "threshold" in key else 1e-4), key  # sums in another order


def test_a_feature_that_cannot_run_is_refused(monkeypatch) -> None:
    for feature in ({"flash_attention2": True, "bf16": True}, {"cuda_graphs": True}):
        with pytest.raises(ValueError, match=f"{next(iter(feature))} needs a GPU"):
            Llama.build(BASE, device="cpu", **feature)
    with pytest.raises(ValueError, match="flash_attention2 needs a GPU and bf16"):
        check_machine("cuda", False, flash_attention2=True)
    with pytest.raises(ValueError, match="cuda_graphs needs a GPU and --model_parallel_size 1"):
        check_machine("cuda", True, cuda_graphs=True, model_parallel_size=2)
    monkeypatch.setattr(llama.machine, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="flash_attention2: the package flash-attn is not installed"):
        check_machine("cuda", True, flash_attention2=True)


def test_pytorchs_own_kernel_gives_the_same(monkeypatch) -> None:
    """Of rows of different lengths, with key heads that are shared: values and gradients."""
    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)

    def varlen_attn(*args, **kwargs) -> Tensor:
        call = signature.bind(*args, **kwargs).arguments
        q, k, v, *ends = (call[name] for name in list(signature.parameters)[:7])
        assert call["window_size"] == (-1, 0) and (call.get("enable_gqa") or q.shape == k.shape)
        return by_ends(q, k, v, *ends)

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    rows, results = PackedBatch([3, 1, 10], "cpu"), []
    for gqa in (None, False, "enable_gqa" in signature.parameters):
        monkeypatch.setattr(attention, "_varlen_has_gqa", lambda gqa=gqa: gqa)
        q, k, v = (drawn(14, heads, 16).requires_grad_() for heads in (4, 2, 2))
        out = causal_attention(q, k, v, rows) if gqa is None else attention.varlen_attention(q, k, v, rows)
        out.square().sum().backward()
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for actual in results[1:]:
        torch.testing.assert_close(actual, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, width, generation, built, takes",
    [
        (torch.bfloat16, 128, (8, 0), True, True),
        (torch.float16, 64, (9, 0), True, True),
        (torch.float32, 128, (9, 0), True, False),
        (torch.bfloat16, 12, (9, 0), True, False),
        (torch.bfloat16, 264, (9, 0), True, False),
        (torch.bfloat16, 128, (7, 5), True, False),
        (torch.bfloat16, 128, (9, 0), False, False),
    ],
)
def test_what_pytorchs_own_kernel_takes(dtype, width, generation, built, takes, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: generation)
    assert attention.has_varlen(torch.empty(1, 1, width, dtype=dtype)) == takes
