"""Variable-length kernels of a GPU, flash-attn 2's and PyTorch's own; here others, written from their published
signatures, stand for them, so that the calls are tested without a GPU."""

import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from torch import Tensor

import llama.generation
from llama import Llama
from llama.accelerate import attention
from llama.generation import check_gpu_features
from llama.model import causal_attention
from llama.packing import PackedBatch
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
    rows = PackedBatch([3, 1, 10], "cpu")
    ragged = tokens(14)
    prompts = [[256, 1, 2, 3], [256, 9], [256, 4, 4, 7, 8, 1]]

    def results() -> tuple[Tensor, Tensor, list, dict]:
        if name is not None:
            losses = model(ragged, labels=ragged, batch=rows)
            stats = losses.router_stats
            aux = 0 if stats is None else model.load_balancing_loss(stats, stats.tokens_per_expert / 14) / 14
            (losses.ce_loss + aux).backward()
        hidden, _ = model.forward_hidden(ragged, rows)
        return model(batch), hidden, llm.generate(prompts, max_gen_len=5), gradients(model)

    expected = results()
    assert not flash
    for block in model.layers:
        monkeypatch.setattr(block.attention, "causal_attention", partial(attention.causal_attention, flash=True))
    actual = results()
    assert len(flash) == (4 if name else 3) * 3  # each layer: the loss, logits, hidden, one prefill
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-4)
    assert actual[2] == expected[2]
    for key, grad in actual[3].items():
        assert relative(grad, expected[3][key]) < (2e-3 if "threshold" in key else 1e-4), key  # sums in another order


def test_asked_for_where_it_cannot_run(monkeypatch) -> None:
    with pytest.raises(ValueError, match="flash_attention2 needs a GPU"):
        Llama.build(BASE, device="cpu", bf16=True, flash_attention2=True)
    gpu = torch.device("cuda")
    with pytest.raises(ValueError, match="flash_attention2 needs bf16"):
        check_gpu_features(gpu, False, 1, flash_attention2=True, cuda_graphs=False)
    monkeypatch.setattr(llama.generation, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="flash_attention2: the package flash-attn is not installed"):
        check_gpu_features(gpu, True, 1, flash_attention2=True, cuda_graphs=False)


def _varlen_forward(q, k, v, cu_q, cu_k, max_q, max_k, is_causal, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    """For a CPU, with the scores' logarithms and the state of a dropout that there is not."""
    assert is_causal
    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=True)
    return out, q.new_zeros(q.shape[1], len(q)), torch.zeros(2, dtype=torch.uint64)


def _varlen_backward(grad, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, is_causal, *_: object) -> tuple[Tensor, ...]:
    assert is_causal
    grads = [torch.zeros_like(t) for t in (q, k, v)]
    for begin, end in zip(cu_q[:-1].tolist(), cu_q[1:].tolist(), strict=True):
        for head in range(q.shape[1]):
            places = [(slice(begin, end), head // (q.shape[1] // t.shape[1])) for t in (q, k, v)]
            query, keys = (t[place] / q.shape[-1] ** 0.5 for t, place in zip((q, k), places, strict=False))
            scores = query @ k[places[1]].T
            p = scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
            along = grad[places[0]] @ v[places[2]].T
            of_scores = p * (along - (along * p).sum(-1, keepdim=True))
            parts = (of_scores @ keys, of_scores.T @ query, p.T @ grad[places[0]])
            for whole, place, part in zip(grads, places, parts, strict=True):
                whole[place] += part
    return tuple(grads)


def test_pytorchs_own_kernel_gives_the_same() -> None:
    """Of rows of different lengths, with key heads that are shared: values and gradients."""
    from torch.nn.attention import varlen

    varlen._varlen_attn.register_kernel("cpu")(_varlen_forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(_varlen_backward)
    rows, generator = PackedBatch([3, 1, 10], "cpu"), torch.Generator().manual_seed(0)
    results = []
    for attend in (attention.varlen_attention, causal_attention):
        generator.manual_seed(0)
        q, k, v = (torch.randn(14, heads, 16, generator=generator).requires_grad_() for heads in (4, 2, 2))
        out = attend(q, k, v, rows)
        out.square().sum().backward()
        results.append([out.detach(), q.grad, k.grad, v.grad])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


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
