"""Routers of experts where the model's formulas do not reach: noise, ties, balance."""

import pytest
import torch
from torch import Tensor

from moa.adapter import AdapterModule, Target
from moa.config import AdapterConfig
from moa.expert_routers import RouterStats, build_expert_router
from moa.state import reset_adapters
from tiny import build, tokens

N, D, E = 40, 6, 4


def build_router(kind: str, softmax_bias: bool = False, **flat) -> AdapterModule | None:
    settings = {"method": "custom", "lora_layers": "all", "expert_num": E, "expert_router": kind}
    config = AdapterConfig.from_dict(settings | flat, 1)
    return build_expert_router(Target(D, D, None, 1), config, softmax_bias=softmax_bias)


def router(kind: str, **flat) -> AdapterModule:
    built = build_router(kind, **flat)
    reset_adapters(built, seed=2)
    return built.eval()


def inputs(seed: int = 0) -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed)) * 3


def test_noise_only_while_training_and_by_the_formula(monkeypatch) -> None:
    noisy, plain, u = router("topk", noisy_router=True), router("topk"), inputs()
    assert plain.noise is None
    plain.proj.load_state_dict(noisy.proj.state_dict())
    expected, _ = plain(u)
    assert torch.equal(noisy(u)[0], expected)
    noisy.train()
    assert not torch.equal(noisy(u)[0], expected)
    normal = torch.randn(N, E, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(torch, "randn_like", lambda x: normal.clone())
    logits = plain.proj(u) + normal * torch.log1p(torch.exp(noisy.noise(u)))
    weights, _ = noisy(u)
    best = logits.sort(-1, descending=True).indices[:, :2]
    torch.testing.assert_close(weights.gather(1, best), logits.gather(1, best).softmax(-1))
    assert (weights > 0).sum() == 2 * N
    (weights * inputs(3)[:, :E]).sum().backward()
    assert noisy.noise.weight.grad.norm() > 0 and noisy.noise.bias.grad.norm() > 0


def test_generation_is_without_noise_also_for_a_model_in_training() -> None:
    llm, prompt = build("noisy"), [256, *tokens(6).tolist()]
    expected = llm.generate([prompt], max_gen_len=8)
    llm.model.train()
    assert llm.generate([prompt] * 3, max_gen_len=8) == expected * 3
    assert llm.model.training


@pytest.mark.parametrize("k", [1, 3, 4])
def test_topk_keeps_k_experts_that_sum_to_one(k: int) -> None:
    weights, _ = router("topk", top_k=k)(inputs())
    assert ((weights > 0).sum(-1) == k).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(N))


def test_adamole_is_safe_where_no_expert_is_left() -> None:
    adamole = router("adamole")
    counts = (adamole(inputs())[0] > 0).sum(-1)
    assert counts.min() >= 1 and counts.min() < counts.max()
    with torch.no_grad():  # all experts alike, and exactly at the threshold: d = 0 for each
        for parameter in adamole.parameters():
            parameter.zero_()
        adamole.threshold.bias.fill_(100.0)
    weights, _ = adamole(inputs())
    weights.sum().backward()
    assert not weights.any() and all(torch.isfinite(p.grad).all() for p in adamole.parameters())


def test_the_balance_loss_is_least_where_all_experts_are_used_alike() -> None:
    even, uneven = torch.full((E,), 1 / E), torch.eye(E)[0]

    def loss(fraction: Tensor, mean_prob: Tensor) -> float:
        stats = RouterStats(N * fraction, N * E * mean_prob)
        return stats.load_balancing_loss(stats.tokens_per_expert / N).item() / N

    assert loss(even, even) == pytest.approx(1.0)
    assert loss(uneven, uneven) == pytest.approx(E)
    assert loss(*[torch.stack([even, uneven])] * 2) == pytest.approx(1.0 + E)


@pytest.mark.parametrize("kind", ["topk", "adamole"])
def test_the_balance_is_of_what_is_chosen_and_of_what_would_be(kind: str) -> None:
    choosing, u = router(kind), inputs()
    weights, stats = choosing(u)
    p, fraction = choosing.proj(u).softmax(-1), (weights > 0).float().mean(0)
    if kind == "adamole":
        p = p - torch.sigmoid(choosing.threshold(u)) / E
    torch.testing.assert_close(stats.tokens_per_expert / N, fraction)
    torch.testing.assert_close(stats.scaled_probs / (N * E), p.mean(0))
    (expected,) = torch.autograd.grad(E * (fraction * p.mean(0)).sum(), choosing.proj.weight)
    (grad,) = torch.autograd.grad(stats.load_balancing_loss(fraction) / N, choosing.proj.weight)
    torch.testing.assert_close(grad, expected)


def test_a_soft_router_has_a_bias_where_it_needs_one_and_a_single_expert_no_router() -> None:
    without, with_bias = (build_router("soft", softmax_bias=bias) for bias in (False, True))
    assert without.proj.bias is None and with_bias.proj.bias is not None
    assert build_router("soft", expert_num=1) is None
