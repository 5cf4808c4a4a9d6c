"""Adapters on disk: ours, saved and loaded; the authors'; and files that do not fit, named in one sentence."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from llama import Llama, ModelArgs
from moa.adapter_file import adapter_params, load_adapter, save_adapter, save_reference_adapter
from moa.config import AdapterConfig
from moa.state import adapter_parameters, adapter_state_dict
from tiny import (
    ARGS,
    BASE,
    BASELINES,
    GOLDEN,
    METHODS,
    PARAMS,
    authors_can_say,
    random_state,
    save,
    shared,
    tokens,
    unfilled,
)


@pytest.mark.parametrize("name", [*METHODS, *BASELINES])
def test_saved_and_loaded_under_another_seed(name: str, tmp_path: Path) -> None:
    llm, batch = shared(name), tokens(2, 7)
    path = save(llm, tmp_path / "out")
    assert sorted(file.name for file in path.parent.iterdir()) == ["adapter.pth", "adapter_params.json"]
    other = Llama.build(BASE, path, device="cpu", seed=99)
    assert other.model.config == llm.model.config
    assert torch.equal(other.model(batch), llm.model(batch))
    by_folder = Llama.build(BASE, path.parent, device="cpu", seed=99)
    assert torch.equal(by_folder.model(batch), llm.model(batch))
    tensors = adapter_state_dict(llm.model)
    size, numbers = path.stat().st_size, sum(tensor.numel() for tensor in tensors.values())
    # per tensor: its name, its place in the file, padding to 64 bytes
    assert 4 * numbers < size < 4 * numbers + 500 * len(tensors) + 2000


def test_adapter_params_tell_everything(tmp_path: Path) -> None:
    params = json.loads(save(shared("sparse_moa"), tmp_path).with_name("adapter_params.json").read_text())
    assert params.pop("base") == asdict(ARGS)
    assert AdapterConfig.from_dict(params, ARGS.n_layers) == shared("sparse_moa").model.config
    assert params["method"] == "sparse_moa" and params["max_threshold"] == 0.8 and params["lora_layers"] == "0-2"
    assert set(params) == set(shared("sparse_moa").model.config.to_dict())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(shared("soft_moa"), tmp_path / "out")


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        Llama.build(BASE, path, device="cpu")
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


KEY = "layers.1.attention.adapters.prompt.prompt"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop(KEY), ["missing adapter tensor", KEY]),
        (lambda s: s.update({"norm.weight": torch.zeros(64)}), ["unexpected adapter tensor norm.weight"]),
        (lambda s: s.update({KEY: s[KEY][:, :-1].clone()}), [KEY, "shape (5, 63)", "(5, 64)"]),
        (lambda s: s.update({KEY: s[KEY].long()}), [KEY, "floating-point"]),
        (lambda s: s.update({KEY: s[KEY] * torch.inf}), [KEY, "not finite"]),
        (lambda s: s.update({KEY: s[KEY].double() * 1e300}), [KEY, "not finite"]),  # as the model holds them
        (lambda s: s.update({KEY: s[KEY].to_sparse()}), [KEY, "not a plain tensor"]),
        (lambda s: s.update({KEY: [1.0]}), ["dictionary of tensors", KEY]),
    ],
)
def test_bad_adapter_tensors_are_named(change, words: list[str], saved: Path) -> None:
    state = torch.load(saved, weights_only=True)
    change(state)
    torch.save(state, saved)
    refused(saved, "adapter.pth", *words)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"method": "sft_moa"}, "method 'sft_moa' is none of soft_moa"),
        ({"method": ["lora"]}, r"method \['lora'\] is none of"),
        ({"lora_rnk": 8}, r"unknown adapter setting lora_rnk \(did you mean lora_rank"),
        ({"lora_rank": "8"}, "lora_rank must be of type int, not '8'"),
        ({"base": PARAMS | {"dim": 128}}, "the adapter was trained on a base with dim 128, this one has 64"),
        ({"base": {"dim": 64}}, "base: missing keys n_layers, n_heads"),
        ({"base": [1]}, "base: expected a JSON object, found list"),
        ({"lora_alpha": 10**400}, "lora_alpha must be from 1e-09 to 1e.09, not 1000"),
        ({"a\nb" * 1000: 1}, r"unknown adapter setting 'a\\nb"),
    ],
)
def test_bad_adapter_params_are_named(change: dict, words: str, saved: Path) -> None:
    file = saved.with_name("adapter_params.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"adapter_params.json: {words}") as error:
        load_adapter(saved, ARGS)
    assert "\n" not in str(error.value)


SPELLINGS = [  # of a base, and how it differs (None: not at all)
    ({"multiple_of": 16}, None),
    ({"multiple_of": 224, "ffn_dim_multiplier": None}, None),
    ({"rope_scaling_factor": 32.0}, None),  # without use_scaled_rope it does not count
    ({"multiple_of": 1}, "ffn_dim 224, this one has 221"),
    ({"use_scaled_rope": True}, "use_scaled_rope False, this one has True"),
    ({"rope_theta": 5e5}, "rope_theta 10000.0, this one has 500000.0"),
    ({"n_kv_heads": 4}, "n_kv_heads 2, this one has 4"),
]


@pytest.mark.parametrize("change, difference", SPELLINGS)
def test_whether_an_adapter_fits_is_asked_of_the_model(change: dict, difference: str | None, saved: Path) -> None:
    base = ModelArgs(**(PARAMS | change))
    if difference is None:
        assert load_adapter(saved, base)[0].method == "soft_moa"
    else:
        with pytest.raises(ValueError, match=f"the adapter was trained on a base with {difference}"):
            load_adapter(saved, base)


def test_settings_that_claim_a_base_of_any_depth_are_refused(tmp_path: Path) -> None:
    model = shared("lora").model
    for base in ({"n_layers": 10**12}, {"n_layers": "3"}, {"n_layers": 3, "dim": float("nan")}, {}, []):
        params = adapter_params(model.config, {}) | {"base": base}
        with pytest.raises(ValueError, match="the adapter's settings are damaged"):
            save_adapter(tmp_path / "out", adapter_state_dict(model), params)
    assert not list(tmp_path.iterdir())


def test_missing_and_malformed_adapter_files(saved: Path) -> None:
    params = saved.with_name("adapter_params.json")
    content = params.read_text()
    params.unlink()
    refused(saved, "adapter_params.json", "no such file")
    for text in ("{", "[]"):
        params.write_text(text)
        refused(saved, "adapter_params.json")
    params.write_text(content)
    saved.write_bytes(saved.read_bytes()[:-100])
    refused(saved, "adapter.pth", "damaged, cut short")
    saved.unlink()
    for path in (saved, saved.parent):
        refused(path, "adapter.pth: no such file; extract_adapter.py takes an adapter out of a run's checkpoint")


# The authors' format


AUTHORS = sorted(f.name for f in GOLDEN.iterdir() if (f / "adapter.pth").is_file() and f.name != "no_adapter")


@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_keys_there_and_back(name: str, tmp_path: Path) -> None:
    theirs = torch.load(GOLDEN / name / "adapter.pth", weights_only=True)
    assert theirs
    config, state = load_adapter(GOLDEN / name / "adapter.pth", ARGS)
    assert config.method == METHOD_OF.get(name, name)
    assert state.keys() == adapter_parameters(unfilled(ARGS, config.to_dict())).keys()
    written = save_reference_adapter(tmp_path, state, config)
    again = torch.load(written, weights_only=True)
    assert again.keys() == theirs.keys() and all(torch.equal(again[key], tensor) for key, tensor in theirs.items())
    params = json.loads((GOLDEN / name / "adapter_params.json").read_text())
    ours = json.loads((tmp_path / "adapter_params.json").read_text())
    # What says nothing about the adapter may differ: how it was trained, and the sizes of a kind that it has not
    kinds = [kind for kind, options in config.adapters.items() if options.layers]
    differing = {k for k, v in ours.items() if params.get(k, v) != v}
    assert "max_seq_len" in differing and not [k for k in differing if k.startswith(tuple(kinds))]
    assert all(k.startswith(("max_seq_len", "lora_", "p_adapter_", "prompt_")) for k in differing)
    assert ours.keys() - params.keys() <= {"hydra_moe"} and params.keys() - ours.keys() <= {"hydra_moe"}


METHOD_OF = {
    **{"soft_moa_linear_router": "soft_moa", "sparse_moa_const_threshold": "sparse_moa"},
    **{"soft_moa_experts": "soft_moa", "lora_bias_norm": "lora"},
    "soft_moa_instance": "soft_moa",  # their files do not tell the two apart
}


@pytest.mark.parametrize("name", [name for name in METHODS if authors_can_say(name)])
def test_ours_in_the_authors_format_and_back(name: str, tmp_path: Path) -> None:
    llm, batch = shared(name), tokens(2, 7)
    path = save_reference_adapter(tmp_path, adapter_state_dict(llm.model), llm.model.config)
    method = METHODS[name]["method"]
    for given in (None, method) if method != "soft_moa_instance" else (method,):
        other = Llama.build(BASE, path, method=given, device="cpu")
        assert torch.equal(other.model(batch), llm.model(batch))
        mine, theirs = llm.model.config.to_dict(), other.model.config.to_dict()
        # Settings without effect here, and how it trains, are not theirs to tell
        assert {k for k in mine if mine[k] != theirs[k]} <= {"lb_loss_coeff", "swi_x", "top_k", "threshold_gradient"}


ODD = {
    "int for float": {"method": "lora", "lora_alpha": 8},
    "without LoRA": {"method": "prompt", "lora_alpha": 8},
    "unipeft of prompts": {"method": "unipeft", "lora_layers": "", "p_adapter_layers": ""},
    "biases and norms alone": {"method": "custom", "train_bias_norm": True},
    "sparse with prompts": {"method": "sparse_moa", "prompt_layers": "1-3", "prompt_len": 5},
    "sparse with prompts, const": {"method": "sparse_moa", "prompt_layers": "all", "const_threshold": True, "swi_x": 0},
    "targets with spaces": {"method": "molora", "lora_targets": "O, Q", "lora_layers": "0-1,2-3"},
}


@pytest.mark.parametrize("case", ODD)
def test_odd_ones_in_the_authors_format_and_back(case: str, tmp_path: Path) -> None:
    model = unfilled(ARGS, ODD[case])
    state = random_state(model)
    path = save_reference_adapter(tmp_path, state, model.config)
    assert " " not in json.loads(path.with_name("adapter_params.json").read_text())["lora_targets"]
    config, again = load_adapter(path, ARGS)
    assert config.method == ODD[case]["method"] and again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


def test_the_authors_keys_of_a_sparse_mixture_with_prompts(tmp_path: Path) -> None:
    """The router has one more output, between those of V and O; the threshold's network is as without prompts."""
    model = unfilled(ARGS, {"method": "sparse_moa", "prompt_layers": "1-3", "swi_x": 2})
    state = random_state(model)
    path = save_reference_adapter(tmp_path, state, model.config)
    theirs = torch.load(path, weights_only=True)
    prompts = {"attention.prompt.weight": (10, 64), "attention.prompt_gate": (1, 4, 1, 1)}
    shapes = {
        "adapter_type_router.w2.weight": (7, 14),
        "adapter_type_router.w3.weight": (14, 64),
        "adapter_threshold_fn.weight": (1, 64),
    }
    for key, shape in (shapes | prompts).items():
        assert theirs[f"llama.layers.1.{key}"].shape == shape, key
    assert theirs["llama.layers.0.adapter_type_router.w2.weight"].shape == (6, 12)
    assert not any(f"llama.layers.0.{key}" in theirs for key in prompts)
    assert torch.equal(theirs["llama.layers.1.adapter_type_router.w2.bias"], state["layers.1.router.proj.w2.bias"])
    assert json.loads((tmp_path / "adapter_params.json").read_text())["prompt_layers"] == "1-3"
    other = Llama.build(BASE, path, device="cpu")
    assert other.model.config.slots(1)[3].name == "prompt" and other.model.config.block_router == "sparse"


def test_flags_of_theirs_as_text_and_of_kinds_that_are_not_there(tmp_path: Path) -> None:
    params = json.loads((GOLDEN / "prompt" / "adapter_params.json").read_text())
    del params["p_adapter_size"]
    params |= {"w_bias": "False", "lora_layers": "0-0, 1-1", "lora_rank": 0, "lora_targets": ""}
    (tmp_path / "adapter_params.json").write_text(json.dumps(params))
    (tmp_path / "adapter.pth").write_bytes((GOLDEN / "prompt" / "adapter.pth").read_bytes())
    assert load_adapter(tmp_path, ARGS)[0].method == "prompt"


@pytest.mark.parametrize("missing", ["method", "lora_alpha", "lora_rank", "block_router", "max_threshold"])
def test_a_setting_that_is_missing_in_ours_is_named(missing: str, tmp_path: Path) -> None:
    path = save(shared("sparse_moa"), tmp_path)
    file = path.with_name("adapter_params.json")
    params = json.loads(file.read_text())
    del params[missing], params["prompt_len"]  # what has no effect may be missing
    file.write_text(json.dumps(params))
    refused(path, "adapter_params.json", "missing setting", missing)


@pytest.mark.parametrize(
    "flat, words",
    [
        (METHODS["custom"], "p_adapter_activation gelu, gate_activation softmax"),
        ({"method": "soft_moa", "gate_activation": "softmax"}, "gate_activation softmax"),
        ({"method": "parallel_adapter", "p_adapter_activation": "relu"}, "p_adapter_activation relu"),
        ({"method": "sparse_moa", "expert_num": 2}, "expert_num 2"),
        ({"method": "topk_moelora", "lora_hydra": True}, "expert_router topk"),
    ],
)
def test_what_their_format_cannot_say_is_named(flat: dict, words: str, tmp_path: Path) -> None:
    config = AdapterConfig.from_dict(flat, ARGS.n_layers)
    with pytest.raises(ValueError, match=words):
        save_reference_adapter(tmp_path / "out", {}, config)
    assert not list(tmp_path.iterdir())


def test_tensors_that_one_of_the_formats_does_not_know_are_named(tmp_path: Path) -> None:
    config, state = load_adapter(GOLDEN / "lora", ARGS)
    with pytest.raises(ValueError, match="the authors' format: unexpected tensor layers.0.magnitude"):
        save_reference_adapter(tmp_path / "out", state | {"layers.0.magnitude": torch.ones(4)}, config)
    assert not list(tmp_path.iterdir())
    save_reference_adapter(tmp_path, state, config)
    theirs = torch.load(tmp_path / "adapter.pth", weights_only=True)
    torch.save(theirs | {"llama.layers.0.attention.lora_Q.magnitude": torch.ones(4)}, tmp_path / "adapter.pth")
    refused(tmp_path, "adapter.pth", "unexpected tensor llama.layers.0.attention.lora_Q.magnitude")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"lora_dora": True}, "lora_dora is True, a setting that is not known of the authors' format"),
        ({"w_bias": "yes"}, "w_bias must be true or false, not 'yes'"),
        ({"expert_num": 1.5}, "expert_num must be of type int, not 1.5"),
        ({"w_bias": True}, "missing tensors llama.layers.0.attention.wo.bias"),
        ({"expert_num": 4}, "lora_A_l.0.weight"),
        ({"lora_layers": "0-4"}, "lora_layers: '0-4' goes beyond the model's 3 layers"),
        ({"lora_layers": "0-0"}, "no layer is selected"),
    ],
)
def test_what_their_flags_say_and_we_cannot_do_is_named(change: dict, words: str, tmp_path: Path) -> None:
    for name in ("adapter.pth", "adapter_params.json"):
        (tmp_path / name).write_bytes((GOLDEN / "lora" / name).read_bytes())
    file = tmp_path / "adapter_params.json"
    params = json.loads(file.read_text())
    file.write_text(json.dumps(params | change))
    refused(tmp_path / "adapter.pth", str(tmp_path), words)
    del params["lora_alpha"]
    file.write_text(json.dumps(params))
    refused(tmp_path / "adapter.pth", "adapter_params.json", "missing setting 'lora_alpha'")
