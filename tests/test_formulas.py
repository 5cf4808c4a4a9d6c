"""Every fast path beside the plain formula, in value and in gradient."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from convert import hf as from_hf
from convert_samples import write_hf
from llama import ModelArgs, Transformer
from llama.accelerate.loss import chunked_cross_entropy
from llama.model import RMSNorm, rope_frequencies
from llama.packing import PackedBatch
from moa.state import adapter_parameters
from plain_model import PlainModel, rms_norm
from tiny import METHODS, PARAMS, build, config, drawn, float64, gradients, relative, require_close, shared, tokens


def plain(name: str | None, model: Transformer) -> PlainModel:
    """The same model, written out: float64 copies of the tensors, the adapters' with a gradient."""
    adapters = adapter_parameters(model)
    w = {k: t.detach().double().requires_grad_(k in adapters) for k, t in model.named_parameters()}
    return PlainModel(asdict(model.args), config(name or "lora").to_dict(), w)


@pytest.mark.parametrize("name", [None, *METHODS])
def test_model_equals_the_formulas(name: str | None) -> None:
    near = 5e-4 if name == "adamole" else 5e-5  # which divides differences of nearly equal numbers by their sum
    # float32 against float64; thresholds see differences of nearly equal numbers
    require_formulas(name, shared(name).model, near, lambda key: 1e-3 if "threshold" in key else 5e-4)


@pytest.fixture(scope="module")
def qwen3_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Queries and keys normed, heads wider than the model's width shared among them, tied embeddings."""
    folder = tmp_path_factory.mktemp("qwen3")
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 16, "tie_word_embeddings": True}
    write_hf(folder / "hf", "qwen", qwen3=True, **sizes)
    return from_hf.convert(folder / "hf", folder / "meta", dtype="fp32").folder


@pytest.mark.parametrize("name", [None, *METHODS])
def test_qwen3_equals_the_formulas(name: str | None, qwen3_base: Path) -> None:
    with float64(build(name, ckpt_dir=qwen3_base, seed=2).model) as model:  # every adapter is in use
        args = model.args
        assert args.qk_norm and args.tied_embeddings and args.head_dim * args.n_heads > args.dim
        require_formulas(name, model, 1e-6, lambda key: 1e-6)  # frequencies of the rotary embedding are float32


def require_formulas(name: str | None, model: Transformer, near: float, bound_of: Callable[[str], float]) -> None:
    """Logits (within `near`), loss and every gradient (relatively, within `bound_of` its key) are the plain model's."""
    by_hand, batch, prompt_lens = plain(name, model), tokens(2, 6), [2, 5]
    rows = list(zip(batch.tolist(), prompt_lens, strict=True))
    logits, expected = model(batch, prompt_lens), torch.stack([by_hand.logits(*row) for row in rows])
    torch.testing.assert_close(logits.double(), expected, rtol=near, atol=near)
    if name is None:
        return
    loss = model.loss(batch, batch, prompt_lens)
    plain_loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    assert bool(by_hand.routed) == (name in ("topk_moelora", "adamole", "custom"))
    plain_loss = plain_loss + by_hand.auxiliary()
    torch.testing.assert_close(loss.double(), plain_loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    plain_loss.backward()
    for key, grad in gradients(model).items():
        exact = by_hand.w[key].grad
        assert exact is not None and exact.norm() > 0, key
        assert relative(grad.double(), exact) < bound_of(key), key


def test_adapters_matter() -> None:
    """The comparison above would also hold for adapters that do nothing."""
    base, batch = shared(None).model(tokens(1, 6)), tokens(1, 6)
    for name in METHODS:
        assert (shared(name).model(batch) - base).abs().max() > 0.1, name


def test_sparse_router_switches_some_adapters_off() -> None:
    for name in ("sparse_moa", "sparse_moa_const_threshold"):
        model = shared(name).model
        gates = torch.cat(list(model.layers[0].router(model.tok_embeddings(tokens(40))).values()), 1)
        off = (gates == 0).float().mean().item()
        assert 0.1 < off < 0.9, (name, off)


# Loss


def by_cross_entropy(model: torch.nn.Module, batch: Tensor, labels: Tensor, prompt_lens: list[int] | None = None):
    return F.cross_entropy(model(batch, prompt_lens)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def test_loss_equals_cross_entropy_of_all_logits() -> None:
    model, batch = shared("soft_moa").model, tokens(3, 9)
    labels = batch.clone()
    labels[0, :4] = labels[1, 5:] = -100  # the first column's labels, which nothing predicts, must not count
    results = []
    for loss in (by_cross_entropy(model, batch, labels), model.loss(batch, labels)):
        (2.5 * loss).backward()
        results.append((loss.detach(), gradients(model)))
    (expected_loss, expected), (loss, grads) = results
    torch.testing.assert_close(loss, expected_loss)
    require_close(grads, expected, 1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
@pytest.mark.parametrize("scale", [1, 1e3])  # of which the logits' exp overflows
def test_loss_in_chunks_equals_cross_entropy(chunk: int, scale: float) -> None:
    hidden, weight = drawn(10, 8) * scale, drawn(20, 8) * scale
    labels = torch.randint(0, 20, (10,), generator=torch.Generator().manual_seed(0))
    results = []
    for loss_of in (
        lambda h: chunked_cross_entropy(h, weight, labels, chunk),
        lambda h: F.cross_entropy(h @ weight.T, labels, reduction="sum"),
    ):
        h = hidden.clone().requires_grad_()
        loss = loss_of(h)
        (2.5 * loss).backward()
        with torch.no_grad():
            torch.testing.assert_close(loss_of(hidden), loss)
        results.append((loss.detach(), h.grad))
    torch.testing.assert_close(*results)


def test_loss_needs_a_label_and_equal_shapes() -> None:
    model, batch = shared(None).model, tokens(2, 4)
    labels = torch.full_like(batch, -100)
    labels[:, 0] = 5
    with pytest.raises(ValueError, match="no label"):
        model.loss(batch, labels)
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\)"):
        model.loss(batch, labels[:, 1:])


ROWS, PROMPT_LENS = [tokens(n, seed=n) for n in (5, 11, 1, 8)], [2, 6, 1, 4]
PACKED = PackedBatch([len(row) for row in ROWS], "cpu", PROMPT_LENS)


def packed_alone_and_padded(model: torch.nn.Module) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Summed loss and gradients of the same rows, three times over."""
    labels = [row.clone() for row in ROWS]
    labels[1][:6] = -100
    padded = torch.nn.utils.rnn.pad_sequence(ROWS, batch_first=True, padding_value=7)
    padded_labels = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    whole = PackedBatch([padded.shape[1]] * len(ROWS), "cpu", PROMPT_LENS)

    def alone(row: Tensor, label: Tensor, n: int) -> Tensor:
        return by_cross_entropy(model, row[None], label[None], [n]) * (label[1:] != -100).sum()

    for loss in (
        model(torch.cat(ROWS), labels=torch.cat(labels), batch=PACKED).ce_loss,
        sum(alone(*row) for row in zip(ROWS, labels, PROMPT_LENS, strict=True) if len(row[0]) > 1),
        model(padded, labels=padded_labels, batch=whole).ce_loss,
    ):
        loss.backward()
        yield loss.detach(), gradients(model)


@pytest.mark.parametrize("name", METHODS)
def test_packed_rows_equal_each_row_alone_and_padded_rows(name: str) -> None:
    """In float64, where rounding hides nothing: every gradient by itself."""
    model = shared(name).model
    hidden, _ = model.forward_hidden(torch.cat(ROWS), PACKED)
    for row, n, (begin, end) in zip(ROWS, PROMPT_LENS, PACKED.spans, strict=True):
        alone, _ = model.forward_hidden(row, PackedBatch([len(row)], "cpu", [n]))
        torch.testing.assert_close(hidden[begin:end], alone, rtol=1e-5, atol=1e-5)

    with float64(copy.deepcopy(model)) as exact:
        (loss, grads), *others = packed_alone_and_padded(exact)
    for other_loss, other_grads in others:
        assert relative(loss.double(), other_loss.double()) < 1e-6  # summed in float32
        require_close(grads, other_grads, 1e-10)


@pytest.mark.parametrize("method", ["soft_moa", "custom"])
@pytest.mark.parametrize(("choice", "blocks", "second_halves"), [("none", 1, 1), ("selective", 1, 2), ("full", 2, 2)])
def test_activation_checkpointing_changes_nothing(monkeypatch, method, choice, blocks, second_halves) -> None:
    model, batch = shared(method).model, tokens(2, 7)
    model.loss(batch, batch).backward()
    expected = gradients(model)
    monkeypatch.setattr(model, "activation_checkpointing", choice)
    block, runs = model.layers[0], {"blocks": 0, "second halves": 0}
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
        for name, module in {"blocks": block, "second halves": block.ffn_norm}.items()
    ]
    model.loss(batch, batch).backward()
    for hook in hooks:
        hook.remove()
    assert runs == {"blocks": blocks, "second halves": second_halves}  # once more in the backward pass
    require_close(gradients(model), expected, 1e-6)


# RoPE and norm


def rope_args(**kwargs) -> ModelArgs:
    return ModelArgs(dim=256, n_layers=1, n_heads=2, vocab_size=1, **kwargs)


@pytest.mark.parametrize("theta, factor, low, high, context", [(5e5, 8, 1, 4, 8192), (1e4, 32, 2, 5, 1000)])
def test_scaled_rope(theta: float, factor: float, low: float, high: float, context: int) -> None:
    """The published rule: by wavelength, three pieces."""

    def scaled(freq: float) -> tuple[str, float]:
        wavelength = 2 * math.pi / freq
        if wavelength < context / high:
            return "kept", freq
        if wavelength > context / low:
            return "slowed", freq / factor
        smooth = (context / wavelength - low) / (high - low)
        return "between", (1 - smooth) * freq / factor + smooth * freq

    pieces, expected = zip(*(scaled(theta ** (-i / 128)) for i in range(0, 128, 2)), strict=True)
    assert len(set(pieces)) == 3
    numbers = {"rope_theta": theta, "rope_scaling_factor": factor, "rope_original_max_seq_len": context}
    args = rope_args(use_scaled_rope=True, rope_low_freq_factor=low, rope_high_freq_factor=high, **numbers)
    torch.testing.assert_close(rope_frequencies(args), torch.tensor(expected), rtol=1e-5, atol=0)


def test_rope_scaling_defaults_are_llama_3_1s() -> None:
    numbers = {"rope_scaling_factor": 8.0, "rope_low_freq_factor": 1.0, "rope_high_freq_factor": 4.0}
    explicit = rope_args(use_scaled_rope=True, rope_theta=500000.0, rope_original_max_seq_len=8192, **numbers)
    assert rope_args(use_scaled_rope=True) == explicit
    assert not torch.equal(rope_frequencies(explicit), rope_frequencies(rope_args()))  # off by default


def test_rms_norm() -> None:
    norm, weight, x = RMSNorm(16, eps=0.1), drawn(16), drawn(3, 16)
    norm.load_state_dict({"weight": weight}, assign=True)
    torch.testing.assert_close(norm(x), torch.stack([rms_norm(row, weight, 0.1) for row in x]))


# Initial state


@pytest.mark.parametrize("name", METHODS)
def test_a_fresh_adapter_leaves_the_base_as_it_is(name: str) -> None:
    batch = tokens(2, 8)
    with torch.no_grad():
        base, fresh = shared(None).model(batch), build(name, seed=None).model(batch)
    if not config(name).adapters["p_adapter"].layers:
        assert torch.equal(fresh, base)  # lora_B and the prompt's gate are zero
        return
    assert (fresh - base).abs().max() < 1e-5  # the parallel adapter starts at 1e-4 of Xavier's
    base, fresh = copy.deepcopy(shared(None).model), build(name, seed=None).model
    with torch.no_grad(), float64(base), float64(fresh):
        assert 0 < (fresh(batch) - base(batch)).abs().max() < 1e-5


def test_initial_values() -> None:
    """The distributions of SPEC's table: nn.Linear's, Xavier's times 1e-4, the standard normal, zero."""
    model = build("soft_moa", seed=None).model
    block, dim, size = model.layers[2], PARAMS["dim"], 8
    prompt = block.attention.adapters["prompt"]
    assert not prompt.gate.any() and abs(prompt.prompt.mean()) < 0.2 and abs(prompt.prompt.std() - 1) < 0.2
    lora = model.layers[0].feed_forward.adapters["lora_FFN_DOWN"]
    assert not lora.lora_B.any() and uniform_within(lora.lora_A, 1 / math.sqrt(224))
    adapter = block.adapters["p_adapter"]
    xavier = 1e-4 * math.sqrt(6 / (dim + size))
    assert uniform_within(adapter.down_proj, xavier) and uniform_within(adapter.up_proj, xavier)
    assert not adapter.down_proj_bias.any() and not adapter.up_proj_bias.any()
    proj = model.layers[1].router.proj
    for linear in (proj.w1, proj.w2, proj.w3):
        assert uniform_within(linear.weight, 1 / math.sqrt(linear.weight.shape[1])) and not linear.bias.any()


def uniform_within(tensor: Tensor, bound: float) -> bool:
    """Whether a tensor fills (-bound, bound) evenly, as far as its size tells."""
    rough = 4 / math.sqrt(tensor.numel())
    even = abs(tensor.mean()) < bound * rough and abs(tensor.std() - bound / math.sqrt(3)) < bound * rough
    return bool(even and 0.8 * bound < tensor.abs().max() <= bound)
