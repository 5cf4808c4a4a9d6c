"""Adapters as parameters: which they are, what they cost, how they start and how they train."""

import resource
import statistics

import pytest
import torch
from torch import Tensor

from benchmarks.common import LLAMA_3_1
from llama import ModelArgs
from llama.checkpoint import shard_specs
from moa.state import (
    adapter_parameters,
    adapter_state_dict,
    count_parameters,
    load_adapter_state_dict,
    optimizer_groups,
    reset_adapters,
)
from tiny import (
    ARGS,
    BASE,
    BASELINES,
    METHODS,
    build,
    gradients,
    random_state,
    relative,
    require_identical,
    shared,
    tokens,
    unfilled,
)

# Which parameters


@pytest.mark.parametrize("name", [None, *METHODS, *BASELINES])
def test_base_and_adapter_share_nothing_and_are_everything(name: str | None) -> None:
    model = shared(name).model
    everything, base = dict(model.named_parameters()), set(shard_specs(model))
    adapters = set(adapter_parameters(model, untrained=True))
    assert base | adapters == set(everything) == set(model.state_dict())
    assert not base & adapters
    assert base == set(torch.load(BASE / "consolidated.00.pth", weights_only=True))  # Meta's names
    assert {key for key, parameter in everything.items() if parameter.requires_grad} == set(adapter_parameters(model))
    assert bool(adapters) == (name is not None)
    assert all(everything[key].dtype == torch.float32 for key in adapters)


@pytest.mark.parametrize("name", [*METHODS, *BASELINES])
def test_adapters_stay_float32_beside_a_bf16_base(name: str) -> None:
    llm, batch = build(name, bf16=True), tokens(2, 6)
    for key, parameter in llm.model.named_parameters():
        assert parameter.dtype == (torch.float32 if "adapters" in key or "router" in key else torch.bfloat16), key
    llm.model.loss(batch, batch).backward()
    grads, model = gradients(llm.model), shared(name).model
    assert all(grad.dtype == torch.float32 and torch.isfinite(grad).all() for grad in grads.values())
    assert len(llm.generate([[256, 5, 6]], max_gen_len=4)[0]) == 4
    # Whoever picks some adapters or experts picks others after rounding
    config = model.config
    chooses = config.adapters["mixlora"].layers or config.adapters["flylora"].layers
    if config.block_router != "sparse" and config.expert_router == "soft" and not chooses:
        model.loss(batch, batch).backward()
        off = [relative(grads[key], grad) for key, grad in gradients(model).items()]
        # Small rests of large sums are far off; PiSSA's update is one
        assert max(off) < 0.5 and statistics.median(off) < (0.2 if name == "pissa" else 0.15)


LLAMA_8B = ModelArgs(**LLAMA_3_1["8B"])


@pytest.mark.parametrize(
    "flat, total",
    [
        ({"method": "soft_moa"}, 24_520_288),
        ({"method": "soft_moa", "swi_x": 0}, 18_089_696),
        ({"method": "sparse_moa"}, 22_289_120),
        ({"method": "soft_moa_instance"}, 24_520_288),
        ({"method": "unipeft"}, 17_565_280),
        ({"method": "lora"}, 23_068_672),
        ({"method": "molora"}, 100_139_008),
        ({"method": "hydralora"}, 45_088_768),
        ({"method": "topk_moelora"}, 100_140_288),
        ({"method": "adamole"}, 101_123_488),
        ({"method": "prompt"}, 1_311_744),
        ({"method": "parallel_adapter"}, 4_325_888),
    ],
)
def test_published_counts_at_8b(flat: dict, total: int) -> None:
    """Without weights: the base takes no memory, so a model of 32 GB can be described on any machine."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = unfilled(LLAMA_8B, flat)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    counts = count_parameters(model)
    assert counts["total"] == total == sum(n for slot, n in counts.items() if slot != "total")
    base = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert all(parameter.is_meta for parameter in base)
    assert sum(parameter.numel() for parameter in base) == 8_030_261_248
    assert grown < 1_000_000


def test_counts_by_slot() -> None:
    counts = count_parameters(unfilled(LLAMA_8B, {"method": "soft_moa", "lora_targets": "O,Q", "lora_layers": "0-4"}))
    assert counts["lora_Q"] == counts["lora_O"] == 4 * 8 * (4096 + 4096)
    assert counts["prompt"] == 1_311_744 and counts["p_adapter"] == 4_325_888
    router = {n: 2 * (4096 + 1) * 4 * n + (4 * n + 1) * n for n in (2, 4)}  # n slots, 4 n hidden units
    assert counts["router"] == 4 * router[4] + 28 * router[2]


def test_optimizer_groups() -> None:
    model = shared("soft_moa").model
    decayed, others = optimizer_groups(model, weight_decay=0.02)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.02, 0.0)
    names = {id(parameter): key for key, (parameter, *_) in adapter_parameters(model).items()}
    keys = [[names[id(p)] for p in group["params"]] for group in (decayed, others)]
    assert sorted(keys[0] + keys[1]) == sorted(names.values())  # each once
    last = [{key.split(".")[-1] for key in group} for group in keys]
    assert last[0] == {"lora_A", "lora_B", "prompt", "down_proj", "up_proj", "weight"}
    assert last[1] == {"gate", "bias", "down_proj_bias", "up_proj_bias"}


# Training


@pytest.mark.parametrize("name", [*METHODS, *BASELINES])
def test_three_steps_move_every_adapter_tensor_and_no_base_tensor(name: str) -> None:
    model, batch = build(name, seed=None).model, tokens(3, 8)
    with torch.no_grad():  # the start of the parallel adapter is too near to zero for SGD; move it
        for key, (parameter, *_) in adapter_parameters(model).items():
            if "p_adapter" in key:
                parameter.copy_(random_state(model)[key])
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    lr = 0.05 if name == "pissa" else 0.5  # it starts where its gradients are large
    optimizer = torch.optim.SGD(optimizer_groups(model, weight_decay=0.0), lr=lr)
    losses, still = [], []
    for _ in range(3):
        loss = model.loss(batch, batch)
        optimizer.zero_grad()
        loss.backward()
        still.append({key for key, (p, *_) in adapter_parameters(model).items() if not p.grad.any()})
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    # In the first step B = 0 keeps A where it is, z = 0 keeps P, and both keep the gates; after it nothing stays
    waiting = (".lora_A", ".lora_A1", ".lora_A2", ".lora_A3", ".prompt", ".cores", ".core_router", ".lambda_d")
    assert all(key.endswith(waiting) or "router." in key for key in still[0])
    assert bool(still[0]) == (name not in ("parallel_adapter", "parallel_adapter_moe", "ia3", "pissa", "flylora"))
    assert not still[1] and not still[2]
    adapters = adapter_parameters(model)
    for key, parameter in model.named_parameters():
        assert torch.equal(parameter, before[key]) == (key not in adapters), key


# Starting


def test_starts_follow_the_seed_and_the_key_alone() -> None:
    def start(flat: dict, seed: int) -> dict[str, Tensor]:
        model = unfilled(ARGS, flat)
        reset_adapters(model, seed)
        return adapter_state_dict(model)

    moa, other, alone = start(METHODS["soft_moa"], 3), start(METHODS["soft_moa"], 4), start(METHODS["lora"], 3)
    require_identical(start(METHODS["soft_moa"], 3), moa)
    in_both = moa.keys() & alone.keys()
    require_identical({key: alone[key] for key in in_both}, {key: moa[key] for key in in_both})
    for key, tensor in moa.items():
        assert torch.equal(tensor, other[key]) == (not tensor.any()), key  # zeros are zeros
    firsts = [tuple(tensor.flatten()[:4].tolist()) for tensor in moa.values() if tensor.any()]
    assert len(set(firsts)) == len(firsts)  # no two tensors start alike


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    model = unfilled(ARGS, METHODS["soft_moa"])
    reset_adapters(model, 0)
    before = adapter_state_dict(model)
    key = list(before)[-1]
    with pytest.raises(ValueError, match=f"origin: {key}"):
        load_adapter_state_dict(model, random_state(model) | {key: torch.zeros(1)}, "origin")
    require_identical(adapter_state_dict(model), before)
