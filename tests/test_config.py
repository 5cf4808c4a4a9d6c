"""The adapter configuration: presets, layer ranges, and what is refused by the flag's name."""

import math

import pytest

from moa.config import AdapterConfig, parse_layers
from moa.methods import METHODS, config_fields

N = 32


def config(method: str = "soft_moa", n_layers: int = N, **flat) -> AdapterConfig:
    return AdapterConfig.from_dict({"method": method, **flat}, n_layers)


def names(config: AdapterConfig, layer: int = 0) -> list[str]:
    return [slot.name for slot in config.slots(layer)]


LORA_5 = ["lora_Q", "lora_K", "lora_V", "lora_O", "lora_FFN_DOWN"]
ALL_7 = ["lora_Q", "lora_K", "lora_V", "prompt", "lora_O", "lora_FFN_DOWN", "p_adapter"]


@pytest.mark.parametrize(
    "method, slots, router",
    [
        ("soft_moa", ALL_7, "soft"),
        ("sparse_moa", [*LORA_5, "p_adapter"], "sparse"),
        ("lora", LORA_5, "none"),
        ("prompt", ["prompt"], "none"),
        ("parallel_adapter", ["p_adapter"], "none"),
        ("soft_moa_instance", ALL_7, "instance"),
        ("unipeft", ALL_7, "unipelt"),
        ("molora", LORA_5, "none"),
        ("hydralora", LORA_5, "none"),
        ("topk_moelora", LORA_5, "none"),
        ("adamole", LORA_5, "none"),
        ("parallel_adapter_moe", ["p_adapter"], "none"),
        ("prompt_moe", ["prompt"], "none"),
    ],
)
def test_presets(method: str, slots: list[str], router: str) -> None:
    preset = config(method)
    assert all(names(preset, layer) == slots for layer in range(N))
    assert preset.block_router == router
    flat = preset.to_dict()
    assert (flat["lora_rank"], flat["lora_alpha"]) == ((16, 16.0) if method == "lora" else (8, 8.0))
    assert (flat["p_adapter_size"], flat["prompt_len"], flat["max_threshold"]) == (16, 10, 0.5)
    several = method in ("molora", "hydralora", "topk_moelora", "adamole", "parallel_adapter_moe", "prompt_moe")
    assert (flat["expert_num"], flat["top_k"], flat["lora_hydra"]) == (8 if several else 1, 2, method == "hydralora")
    assert (flat["lb_loss_coeff"], flat["p_adapter_hydra"]) == (0, method == "parallel_adapter_moe")
    assert not flat["train_bias_norm"] and not flat["noisy_router"]
    assert AdapterConfig.from_dict(flat, N) == preset


@pytest.mark.parametrize(
    "method, slots, flat",
    [
        ("rslora", LORA_5, {"lora_rank": 16, "lora_rslora": True}),
        ("lora_plus", LORA_5, {"lora_rank": 16, "lora_lr_ratio": 16.0}),
        ("dora", [slot.replace("lora", "dora") for slot in LORA_5], {"dora_rank": 16, "dora_alpha": 16.0}),
        ("pissa", [slot.replace("lora", "pissa") for slot in LORA_5], {"pissa_rank": 16, "pissa_alpha": 16.0}),
        ("vera", [slot.replace("lora", "vera") for slot in LORA_5], {"vera_rank": 256}),
        ("ia3", ["ia3_K", "ia3_V", "ia3_FFN_UP"], {}),
        ("comol", [slot.replace("lora", "comol") for slot in LORA_5], {"comol_rank": 16, "comol_cores": 8}),
        ("flylora", [slot.replace("lora", "flylora") for slot in LORA_5], {"flylora_rank": 32, "flylora_top_k": 8}),
        ("mola", [*LORA_5[:4], "lora_FFN_UP", "lora_FFN_GATE", "lora_FFN_DOWN"], {"layer_experts": "2,4,6,8"}),
        ("mixlora", [*LORA_5[:4], "mixlora"], {"mixlora_experts": 8, "mixlora_top_k": 2, "lb_loss_coeff": 0.01}),
    ],
)
def test_presets_beyond_the_paper(method: str, slots: list[str], flat: dict) -> None:
    preset = config(method)
    assert all(names(preset, layer) == slots for layer in range(N))
    assert preset.block_router == "none" and preset.to_dict().items() >= flat.items()
    assert AdapterConfig.from_dict(preset.to_dict(), N) == preset


def test_every_method_has_a_test_here() -> None:
    marks = [*test_presets.pytestmark, *test_presets_beyond_the_paper.pytestmark]
    assert set(METHODS) == {method for mark in marks for method, *_ in mark.args[1]} | {"custom"}


def test_targets_may_come_in_any_order_and_with_spaces() -> None:
    mixed = config("soft_moa", lora_targets="FFN_DOWN, FFN_GATE,Q,FFN_UP,O", lora_layers="3-5,0-1", p_adapter_layers="")
    assert names(mixed, 0) == ["lora_Q", "prompt", "lora_O", "lora_FFN_UP", "lora_FFN_GATE", "lora_FFN_DOWN"]
    assert names(mixed, 1) == ["prompt"] == names(mixed, 5)
    assert mixed.to_dict()["lora_layers"] == "0-1,3-5"


@pytest.mark.parametrize(
    "text, layers",
    [
        ("", []),
        ("0-0", []),
        ("all", list(range(N))),
        ("0-32", list(range(N))),
        ("0-3", [0, 1, 2]),
        ("30-32,0-2", [0, 1, 30, 31]),
        ("0-8, 24-32", [*range(8), *range(24, 32)]),
        ("0-4,2-6,3-4", [0, 1, 2, 3, 4, 5]),
        ("007-008", [7]),
    ],
)
def test_layer_ranges(text: str, layers: list[int]) -> None:
    assert parse_layers("lora_layers", text, N) == set(layers)
    with_prompts = config("prompt", lora_layers=text)  # so that some adapter is left
    assert [layer for layer in range(N) if "lora_Q" in names(with_prompts, layer)] == layers
    assert parse_layers("lora_layers", with_prompts.to_dict()["lora_layers"], N) == set(layers)


@pytest.mark.parametrize(
    "text", ["3", "0:3", "-3", "3-", "a-b", "0-3,", ",", "0-3;5-6", "-1-3", "1-2-3", "0 - 3", "ALL", "0-3.0", "٠-٣"]
)
def test_what_is_no_layer_range(text: str) -> None:
    with pytest.raises(ValueError, match="lora_layers: .* is not a range such as 0-8"):
        config(lora_layers=text)


@pytest.mark.parametrize(
    "flat, words",
    [
        ({"method": "loar"}, "method 'loar' is none of soft_moa, sparse_moa, .*lora"),
        ({"lora_layers": "0-33"}, "lora_layers: '0-33' goes beyond the model's 32 layers"),
        ({"prompt_layers": "5-3"}, "prompt_layers: '5-3' ends before it begins"),
        ({"lora_targets": "Q,W"}, "lora_targets: 'W' is none of Q, K, V, O, FFN_UP, FFN_GATE, FFN_DOWN"),
        ({"lora_targets": "Q,K,Q"}, "lora_targets: 'Q' occurs twice"),
        ({"lora_rank": 0}, "lora_rank must be from 1 to 65536, not 0"),
        ({"lora_alpha": -1.0}, "lora_alpha must be from 1e-09 to 1e.09, not -1.0"),
        ({"lora_alpha": math.nan}, "lora_alpha must be from 1e-09 to 1e.09, not nan"),
        ({"lora_rank": 8.0}, "lora_rank must be of type int, not 8.0"),
        ({"lora_targets": ["Q"]}, r"lora_targets must be of type str, not \['Q'\]"),
        ({"const_threshold": "False"}, "const_threshold must be of type bool, not 'False'"),
        ({"swi_x": -1}, "swi_x must be from 0 to 65536, not -1"),
        ({"max_threshold": 0.0}, "max_threshold must be from 1e-09 to 1, not 0.0"),
        ({"threshold_gradient": "ste"}, "threshold_gradient must be one of straight_through, none, not 'ste'"),
        ({"block_router": "hard"}, "block_router must be one of none, soft, sparse, instance, unipelt, not 'hard'"),
        ({"lora_ranks": 8}, r"unknown adapter setting lora_ranks \(did you mean lora_rank\?\)"),
        ({"method": "prompt", "prompt_layers": "4-4"}, "method prompt with these layers has no adapter"),
        ({"method": "custom"}, "method custom with these layers has no adapter"),
        ({"method": "topk_moelora", "expert_num": 2, "top_k": 3}, r"top_k 3 is more than the 2 experts"),
        ({"method": "hydralora", "expert_num": 1}, "expert_num 1: method hydralora is a mixture of experts"),
    ],
)
def test_bad_settings_are_named(flat: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as error:
        config(**flat)
    assert "\n" not in str(error.value)


def test_whole_numbers_may_stand_for_floats() -> None:
    assert config(lora_alpha=16).to_dict()["lora_alpha"] == 16


def test_every_setting_says_what_it_is() -> None:
    flat = config().to_dict()
    assert set(config_fields()) == set(flat) - {"method"}
    for name, field in config_fields().items():
        assert field.metadata["help"], name
        assert isinstance(field.default, field.type), name


@pytest.mark.parametrize(
    "flat, given, words",
    [
        ({"method": "prompt"}, {"lora_rank"}, "--lora_rank has no effect: method prompt has no such adapter"),
        ({"method": "lora"}, {"swi_x"}, "--swi_x has no effect with method lora (--block_router none, --expert_num 1)"),
        (
            {"method": "sparse_moa", "const_threshold": True},
            {"threshold_gradient"},
            "--threshold_gradient has no effect",
        ),
        ({"method": "soft_moa"}, {"swi_x", "lora_rank", "prompt_len", "p_adapter_size", "lora_layers"}, None),
        ({"method": "prompt", "lora_layers": "0-1"}, {"lora_rank", "lora_layers"}, None),
        ({"method": "unipeft"}, {"swi_x"}, "--swi_x has no effect with method unipeft (--block_router unipelt"),
        ({"method": "lora"}, {"lora_hydra"}, "--lora_hydra has no effect with method lora"),
        ({"method": "custom", "train_bias_norm": True}, {"block_router", "train_bias_norm"}, "--block_router has no"),
        (
            {"method": "molora"},
            {"top_k"},
            "--top_k has no effect with method molora (--block_router none, --expert_num 8, --expert_router soft)",
        ),
        ({"method": "topk_moelora"}, {"top_k", "noisy_router", "lb_loss_coeff", "expert_num", "lora_hydra"}, None),
        ({"method": "soft_moa", "expert_num": 2}, {"p_adapter_hydra", "expert_num", "gate_activation"}, None),
    ],
)
def test_settings_without_effect_are_named(flat: dict, given: set[str], words: str | None) -> None:
    message = config(**flat).unused_flag_message(given)
    assert message is None if words is None else words in message
