"""Adapters on disk: ours, saved and loaded; the authors'; and files that do not fit, named in one sentence."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import moa.files
from llama import Llama
from moa import authors
from moa.adapter_file import load_adapter
from moa.config import AdapterConfig
from moa.files import read_json, write_file
from moa.state import adapter_parameters, count
from tiny import ARGS, BASE, GOLDEN, METHODS, PARAMS, save, shared, tokens, unfilled


@pytest.mark.parametrize("name", METHODS)
def test_saved_and_loaded_under_another_seed(name: str, tmp_path: Path) -> None:
    llm, batch = shared(name), tokens(2, 7)
    path = save(llm, tmp_path / "out")
    assert sorted(file.name for file in path.parent.iterdir()) == ["adapter.pth", "adapter_params.json"]
    other = Llama.build(BASE, path, device="cpu", seed=99)
    assert other.model.config == llm.model.config
    assert torch.equal(other.model(batch), llm.model(batch))
    by_folder = Llama.build(BASE, path.parent, device="cpu", seed=99)
    assert torch.equal(by_folder.model(batch), llm.model(batch))
    size, parameters = path.stat().st_size, count(llm.model)["total"]
    # per tensor: its name, its place in the file, padding to 64 bytes
    assert 4 * parameters < size < 4 * parameters + 500 * len(adapter_parameters(llm.model)) + 2000


def test_adapter_params_tell_everything(tmp_path: Path) -> None:
    params = json.loads(save(shared("sparse_moa"), tmp_path).with_name("adapter_params.json").read_text())
    assert params.pop("base") == asdict(ARGS)
    assert AdapterConfig.from_flat(params, ARGS.n_layers) == shared("sparse_moa").model.config
    assert params["method"] == "sparse_moa" and params["max_threshold"] == 0.8 and params["lora_layers"] == "0-2"
    assert set(params) == set(shared("sparse_moa").model.config.flat())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(shared("soft_moa"), tmp_path / "out")


def refused(path: Path, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        Llama.build(BASE, path, device="cpu")
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message


KEY = "layers.1.attention.adapters.prompt.P"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s: s.pop(KEY), ["missing adapter tensor", KEY]),
        (lambda s: s.update({"norm.weight": torch.zeros(64)}), ["unexpected adapter tensor norm.weight"]),
        (lambda s: s.update({KEY: s[KEY][:, :-1].clone()}), [KEY, "shape (5, 63)", "(5, 64)"]),
        (lambda s: s.update({KEY: s[KEY].long()}), [KEY, "floating-point"]),
        (lambda s: s.update({KEY: s[KEY] * torch.inf}), [KEY, "not finite"]),
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
        ({"method": None}, "method None"),
        ({"method": ["lora"]}, r"method \['lora'\] is none of"),
        ({"lora_rnk": 8}, r"unknown adapter setting lora_rnk \(did you mean lora_rank"),
        ({"lora_rank": "8"}, "lora_rank must be of type int, not '8'"),
        ({"lora_layers": 3}, "lora_layers must be of type str, not 3"),
        ({"const_threshold": 1}, "const_threshold must be of type bool, not 1"),
        ({"base": {"dim": 128}}, "the adapter was trained on a base with dim 128, this one has 64"),
        ({"base": [1]}, "base must be an object"),
    ],
)
def test_bad_adapter_params_are_named(change: dict, words: str, saved: Path) -> None:
    file = saved.with_name("adapter_params.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"adapter_params.json: {words}") as error:
        load_adapter(saved, PARAMS)
    assert "\n" not in str(error.value)


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
    refused(saved, "adapter.pth", "cannot be read")
    saved.unlink()
    refused(saved, "adapter.pth", "no such file")


def test_files_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "a.json"
    write_file(file, b'{"a": 1}')

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(moa.files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_file(file, b'{"a": 2}')
    assert read_json(file) == {"a": 1} and list(tmp_path.iterdir()) == [file]


# The authors' format


AUTHORS = sorted(f.name for f in GOLDEN.iterdir() if (f / "adapter.pth").is_file() and f.name != "no_adapter")


@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_keys_there_and_back(name: str) -> None:
    theirs = torch.load(GOLDEN / name / "adapter.pth", weights_only=True)
    assert theirs
    for key in theirs:
        assert authors.their_key(authors.our_key(key)) == key
    config, state = load_adapter(GOLDEN / name / "adapter.pth", PARAMS)
    assert config.method == name.removesuffix("_linear_router").removesuffix("_const_threshold")
    assert state.keys() == adapter_parameters(unfilled(ARGS, config.flat())).keys()


def test_every_linear_site_has_a_name_of_theirs() -> None:
    for key in adapter_parameters(unfilled(ARGS, METHODS["soft_moa"])):
        assert authors.our_key(authors.their_key(key)) == key


@pytest.mark.parametrize(
    "key",
    ["llama.layers.0.attention.lora_X.lora_A.weight", "layers.0.p_adapter.up_proj.bias", "llama.norm.weight"],
)
def test_unknown_keys_of_theirs_are_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"unknown tensor {key}"):
        authors.our_key(key)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"w_bias": True}, "w_bias"),
        ({"expert_num": 4}, "expert_num 4"),
        ({"lora_layers": "0-4"}, "lora_layers: '0-4' goes beyond the model's 3 layers"),
        ({"lora_layers": "0-0"}, "selects no layer"),
        ({"lora_rank": None}, "lora_rank must be of type int"),
    ],
)
def test_what_their_flags_say_and_we_cannot_do_is_named(change: dict, words: str, tmp_path: Path) -> None:
    for name in ("adapter.pth", "adapter_params.json"):
        (tmp_path / name).write_bytes((GOLDEN / "lora" / name).read_bytes())
    file = tmp_path / "adapter_params.json"
    params = json.loads(file.read_text())
    file.write_text(json.dumps(params | change))
    refused(tmp_path / "adapter.pth", "adapter_params.json", words)
    del params["lora_alpha"]
    file.write_text(json.dumps(params))
    refused(tmp_path / "adapter.pth", "adapter_params.json", "missing setting 'lora_alpha'")
