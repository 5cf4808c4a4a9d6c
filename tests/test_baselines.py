"""Adapters beyond the paper's, each against its formula, token by token in float64: values and every gradient."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama.parallel_layers import ColumnParallelLinear
from moa.adapter import AdapterModule, Target
from moa.config import AdapterConfig
from moa.methods import ADAPTERS, import_class
from moa.state import optimizer_groups
from moa.vera import shared_matrix
from tiny import relative

D, F, N, E = 6, 10, 5, 3


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


def frozen(n_in: int, n_out: int) -> nn.Module:
    layer = ColumnParallelLinear(n_in, n_out)
    layer.weight = nn.Parameter(drawn(n_out, n_in), requires_grad=False)
    return layer


def build(flat: dict, name: str, target: Target, layer: int = 0) -> AdapterModule:
    """An adapter of a model of four layers, with random numbers in all its parameters."""
    config = AdapterConfig.from_dict({"method": "custom", f"{name}_layers": "all"} | flat, 4).at_layer(layer)
    adapter = import_class(ADAPTERS[name].module)(target, config).double()
    with torch.no_grad():
        for i, (_, parameter) in enumerate(adapter.named_parameters()):
            parameter.copy_(drawn(*parameter.shape, seed=i))
    return adapter


def require_equal(adapter: AdapterModule, by_formula, *inputs: Tensor) -> None:
    """Values and gradients of adapter(*inputs) and of by_formula(its parameters, one token's inputs)."""
    inputs = [t.clone().requires_grad_() if t.requires_grad else t for t in inputs]
    w = dict(adapter.named_parameters())
    trained = [t for t in (*w.values(), *inputs) if t.requires_grad]
    results = []
    for output in (adapter(*inputs), torch.stack([by_formula(w, *token) for token in zip(*inputs, strict=True)])):
        results.append(
            (output, torch.autograd.grad((output * drawn(N, output.shape[1])).sum(), trained, materialize_grads=True))
        )
    (actual, grads), (expected, expected_grads) = results
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert relative(grad, expected_grad) < 1e-10


def dora(w, weight, scale):
    def formula(w, x, wx, g):
        whole = weight + scale * w["lora_B"] @ w["lora_A"]
        norms = whole.detach().norm(dim=1)
        adapted = w["magnitude"] * (wx + scale * (w["lora_B"] @ (w["lora_A"] @ x))) / norms
        return wx + g * (adapted - wx)

    return formula


def softmax(x: Tensor) -> Tensor:
    return x.exp() / x.exp().sum()


def comol(w, weight, scale):
    def formula(w, x, wx, g):
        a = w["lora_A"] @ x
        p = softmax(w["core_router"] @ a)
        return wx + scale * g * w["lora_B"] @ sum(p[e] * w["cores"][e].T @ a for e in range(E))

    return formula


def vera(w, weight, scale):
    def formula(w, x, wx, g):
        a, b = (
            shared_matrix(14 + i, *shape, 1, 0, x.device).double() for i, shape in enumerate([(D, 4, D), (F, 4, 4)])
        )
        return wx + g * w["lambda_b"] * (b @ (w["lambda_d"] * (a.T @ x)))

    return formula


def ia3(w, weight, scale):
    return lambda w, x, wx, g: wx + g * (w["factor"] * wx - wx)


def flylora(w, weight, scale):
    def formula(w, x, wx, g):
        a = w["lora_A"] @ x
        chosen = best_ranks(a + w["rank_bias"], 2)
        return wx + scale * g * sum(w["lora_B"][:, i] * a[i] for i in chosen)

    return formula


def best_ranks(scores: Tensor, k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: -abs(scores[i].item()))[:k]


def rslora(w, weight, scale):
    return lambda w, x, wx, g: wx + g * scale * w["lora_B"] @ (w["lora_A"] @ x)


@pytest.mark.parametrize(
    ("formula", "name", "flat", "scale"),
    [
        (dora, "dora", {"dora_rank": 4, "dora_alpha": 6.0}, 1.5),
        (comol, "comol", {"comol_rank": 4, "comol_alpha": 6.0, "comol_cores": E}, 1.5),
        (vera, "vera", {"vera_rank": 4, "vera_seed": 7}, 1),
        (ia3, "ia3", {}, 1),
        (flylora, "flylora", {"flylora_rank": 4, "flylora_alpha": 6.0, "flylora_top_k": 2}, 1.5),
        (rslora, "lora", {"lora_rank": 4, "lora_alpha": 6.0, "lora_rslora": True}, 3),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_equals_its_formula(formula, name, flat, scale, gated) -> None:
    layer = frozen(D, F)
    adapter = build(flat, name, Target(D, F, "column", 1, [layer]))
    x = drawn(N, D).requires_grad_()
    output, gate = layer(x).detach().requires_grad_(), drawn(N, 1).sigmoid().requires_grad_()
    by_formula = formula(None, layer.weight, scale)
    if gated:
        require_equal(adapter, by_formula, x, output, gate)
    else:
        ungated = [(x, output, torch.ones(N, 1, dtype=torch.float64))]
        expected = torch.stack(
            [by_formula(dict(adapter.named_parameters()), *t) for t in zip(*ungated[0], strict=True)]
        )
        torch.testing.assert_close(adapter(x, output, None), expected, rtol=1e-12, atol=1e-12)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def test_mixlora_equals_its_formula() -> None:
    w1, w3, w2 = frozen(D, F), frozen(D, F), frozen(F, D)
    w2.in_features = F
    flat = {"mixlora_rank": 4, "mixlora_alpha": 6.0, "mixlora_experts": E, "mixlora_top_k": 2}
    adapter = build(flat, "mixlora", Target(D, D, None, 1, [w2]))
    x = drawn(N, D).requires_grad_()

    def experts(w, x, out, g, w1_x, w3_x):
        def updated(layer: str, frozen_output: Tensor, inputs: Tensor, e: int) -> Tensor:
            a, b = w[f"lora_A{layer}"][4 * e : 4 * e + 4], w[f"lora_B{layer}"][:, 4 * e : 4 * e + 4]
            return frozen_output + 1.5 * b @ (a @ inputs)

        total = out - g.sum() * w2.weight @ (silu(w1_x) * w3_x)
        for e in range(E):
            hidden = silu(updated("1", w1_x, x, e)) * updated("3", w3_x, x, e)
            total = total + g[e] * updated("2", w2.weight @ hidden, hidden, e)
        return total

    weights, stats = adapter.expert_router(x)
    logits = x @ adapter.expert_router.proj.weight.T
    for token, row in enumerate(logits.softmax(1)):
        best = sorted(range(E), key=lambda e: -row[e])[:2]
        expected = torch.stack([row[e] / row[best].sum() if e in best else row[e] * 0 for e in range(E)])
        torch.testing.assert_close(weights[token], expected, rtol=1e-6, atol=1e-6)
    assert stats.tokens_per_expert.sum() == 2 * N
    gate = (0.5 * weights).double().detach().requires_grad_()  # as under a router of the block
    up, down = w1(x).detach().requires_grad_(), w3(x).detach().requires_grad_()
    output = (w2(torch.nn.functional.silu(up) * down) + drawn(N, D)).detach().requires_grad_()  # with a LoRA's part
    w = {k: p for k, p in adapter.named_parameters() if not k.startswith("expert_router")}
    adapter.expert_router = None
    assert set(w) == set(dict(adapter.named_parameters()))
    require_equal(adapter, experts, x, output, gate, up, down)


def test_dora_starts_from_the_frozen_layer_and_never_forms_its_update() -> None:
    layer = frozen(D, F)
    adapter = build({"dora_rank": 4, "dora_alpha": 6.0}, "dora", Target(D, F, "column", 1, [layer]))
    whole = layer.weight + 1.5 * adapter.lora_B @ adapter.lora_A
    torch.testing.assert_close(adapter.row_norms(), whole.norm(dim=1), rtol=1e-12, atol=1e-12)
    start = adapter.specs["magnitude"].init((F,), torch.Generator())
    torch.testing.assert_close(start, layer.weight.norm(dim=1).float())


def test_pissa_starts_from_the_principal_part_of_its_matrix() -> None:
    layer, options = frozen(D, F), {"pissa_rank": 4, "pissa_alpha": 6.0}
    adapter = build(options, "pissa", Target(D, F, "column", 1, [layer]))
    a, b = adapter.principal_factors()
    u, s, v = torch.linalg.svd(layer.weight)
    torch.testing.assert_close((1.5 * b @ a).double(), u[:, :4] * s[:4] @ v[:4], rtol=1e-4, atol=1e-5)
    x = drawn(N, D)
    change = adapter.lora_B @ adapter.lora_A - adapter.start_B @ adapter.start_A
    torch.testing.assert_close(adapter(x, layer(x), None), x @ (layer.weight + 1.5 * change).T)
    with pytest.raises(ValueError, match=r"pissa_rank 9 is more than a matrix of shape \(16, 8\) has"):
        build({"pissa_rank": 9}, "pissa", Target(8, 16, "column", 1, [layer]))


def test_the_shared_matrices_of_vera_follow_from_the_seed_and_are_shared() -> None:
    cpu = torch.device("cpu")
    first = shared_matrix(3, D, 4, D, 1, 0, cpu)
    assert shared_matrix(3, D, 4, D, 1, 0, torch.device("cpu")) is first and first.abs().max() <= math.sqrt(6 / D)
    assert not torch.equal(shared_matrix(4, D, 4, D, 1, 0, cpu), first)
    assert torch.equal(shared_matrix(3, 4 * D, 4, D, 1, 0, cpu)[:D], first)
    target = Target(D, F, "column", 1)
    first_layer, second_layer = (build({"vera_rank": 4}, "vera", target) for _ in range(2))
    assert first_layer.matrix_a is second_layer.matrix_a and first_layer.matrix_b is second_layer.matrix_b
    assert first_layer.state_dict().keys() == {"lambda_d", "lambda_b"}


def test_flylora_starts_from_a_sparse_projection() -> None:
    adapter = build({"flylora_rank": 8, "flylora_top_k": 3}, "flylora", Target(1000, F, "column", 1))
    start = adapter.specs["lora_A"].init((8, 1000), torch.Generator().manual_seed(0))
    assert (start != 0).sum(1).tolist() == [375] * 8 and len({tuple(row.tolist()) for row in start != 0}) == 8
    assert start[start != 0].std().item() == pytest.approx(1 / 8, rel=0.05) and abs(start.sum(1)).max() < 10
    with pytest.raises(ValueError, match="flylora_top_k 9 is more than flylora_rank 8"):
        AdapterConfig.from_dict({"method": "flylora", "flylora_rank": 8, "flylora_top_k": 9}, 4)


@pytest.mark.parametrize("recompute", [False, True])
def test_flylora_balances_its_ranks_once_a_step(recompute: bool) -> None:
    layer = frozen(D, F)
    adapter = build({"flylora_rank": 4, "flylora_top_k": 2}, "flylora", Target(D, F, "column", 1, [layer]))
    x, before, counts = drawn(8, D), adapter.rank_bias.clone(), [0] * 4
    for token in x:
        for rank in best_ranks(adapter.lora_A @ token + before, 2):
            counts[rank] += 1
    for part in x.split(5):  # micro-batches
        output = layer(part)
        with torch.no_grad():
            adapter(part, output, None)
        adapter.eval()(part, output, None).sum().backward()
        adapter.train()
        if recompute:
            checkpoint(adapter, part, output, None, use_reentrant=False).sum().backward()
        else:
            adapter(part, output, None).sum().backward()
    assert adapter.token_counts.tolist() == counts and torch.equal(adapter.rank_bias, before)
    adapter.balance()
    steps = [0.001 * ((4 > count) - (4 < count)) for count in counts]  # the mean is 8 * 2 / 4
    assert any(steps)
    torch.testing.assert_close(adapter.rank_bias - before, torch.tensor(steps, dtype=torch.float64))


def test_experts_by_depth() -> None:
    config = AdapterConfig.from_dict({"method": "mola"}, 8)
    assert [config.at_layer(layer).expert_num for layer in range(8)] == [2, 2, 4, 4, 6, 6, 8, 8]
    with pytest.raises(ValueError, match="layer_experts: '2,x' is no list such as 2,4,6,8"):
        AdapterConfig.from_dict({"method": "mola", "layer_experts": "2,x"}, 8)
    with pytest.raises(ValueError, match="top_k 2 is more than the 1 experts|top_k 3 is more than the 2 experts"):
        AdapterConfig.from_dict({"method": "mola", "top_k": 3}, 8)


def test_lora_plus_gives_b_its_own_learning_rate() -> None:
    adapter = build({"lora_rank": 4, "lora_lr_ratio": 16.0}, "lora", Target(D, F, "column", 1, [frozen(D, F)]))
    by_scale = {group["lr_scale"]: group["params"] for group in optimizer_groups(adapter, 0.1) if group["params"]}
    assert [p is adapter.lora_A for p in by_scale[1.0]] == [True]
    assert [p is adapter.lora_B for p in by_scale[16.0]] == [True]
