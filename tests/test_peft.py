"""LoRA, DoRA, IA3 and VeRA to PEFT and from it: the same logits there and back, or a refusal by name."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import qwen3
from convert import hf
from convert.__main__ import main
from convert.peft import from_peft, to_peft
from convert_samples import close, write_hf
from llama import Llama, ModelArgs
from moa.adapter_file import load_adapter
from moa.config import AdapterConfig
from moa.methods import LINEAR_TARGETS
from moa.state import load_adapter_state_dict
from tiny import BASE, GOLDEN, random_state, require_identical, save, tokens

# Of transformers, for a word that PEFT uses
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

ALL = ",".join(LINEAR_TARGETS)


Pair = tuple[Any, Path]  # a random model of transformers, and its checkpoint in Meta's layout


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A LLaMA: 2 layers, 6 heads, 2 key/value heads."""
    root = tmp_path_factory.mktemp("pair")
    model = write_hf(root / "hf", "llama3")
    hf.convert(root / "hf", root / "meta", dtype="fp32")
    return model, root / "meta"


@pytest.fixture(scope="module")
def pair_of_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("qwen3")
    model = qwen3.write(root / "hf", "wide heads")
    hf.convert(root / "hf", root / "meta", dtype="fp32")
    return model, root / "meta"


def random_lora(ckpt_dir: Path, folder: Path, **flat: Any) -> tuple[Llama, Path]:
    """A model with random LoRAs, or adapters of another method, and their file."""
    n_layers = ModelArgs.from_file(ckpt_dir / "params.json").n_layers
    config = AdapterConfig.from_dict({"method": "lora", **flat}, n_layers)
    llm = Llama.build(ckpt_dir, config=config)
    load_adapter_state_dict(llm.model, random_state(llm.model), "random")
    return llm, save(llm, folder)


SUBSETS = {
    "all": {"lora_targets": ALL, "lora_rank": 3, "lora_alpha": 6.0},
    "some": {"lora_targets": "K,FFN_DOWN,O", "lora_layers": "1-2", "lora_rank": 4, "lora_alpha": 2.5},
    "custom": {"method": "custom", "lora_targets": "Q,FFN_UP", "lora_layers": "0-1", "lora_hydra": True},
    "dora": {"method": "dora", "dora_targets": ALL, "dora_rank": 3, "dora_alpha": 6.0},
    "dora in one layer": {"method": "dora", "dora_layers": "1-2", "dora_rank": 4},
    "ia3": {"method": "ia3"},
    "ia3 everywhere": {"method": "ia3", "ia3_targets": ALL},
    "ia3 in one layer": {"method": "ia3", "ia3_layers": "1-2", "ia3_targets": "Q,K,FFN_UP"},
}


def peft_logits(pair: Pair, path: Path, llm: Llama, least: float = 0.1) -> None:
    """Check that PEFT computes our logits with what `to_peft` writes of an adapter."""
    to_peft(path, path.parent.parent / "peft")
    theirs = PeftModel.from_pretrained(copy.deepcopy(pair[0]), path.parent.parent / "peft").eval()
    batch = tokens(2, 70)
    close(theirs(batch).logits, llm.model(batch), pair[0](batch).logits, least)


@torch.no_grad()
@pytest.mark.parametrize("subset", [*SUBSETS, *(f"{name}, Qwen3" for name in ("all", "dora", "ia3"))])
def test_peft_computes_the_same_logits_there_and_back(
    subset: str, pair: Pair, pair_of_qwen3: Pair, tmp_path: Path
) -> None:
    name, _, of_qwen3 = subset.partition(", ")
    model = pair_of_qwen3 if of_qwen3 else pair
    llm, path = random_lora(model[1], tmp_path / "ours", **SUBSETS[name])
    peft_logits(model, path, llm)
    flags = ["--input", str(tmp_path / "peft"), "--ckpt_dir", str(model[1]), "--output_dir", str(tmp_path / "back")]
    main(["from_peft", *flags])
    (config, state), (back_config, back) = (load_adapter(p, llm.model.args) for p in (path, tmp_path / "back"))
    require_identical(back, state)
    kind = next(kind for kind, options in config.adapters.items() if options.layers)
    ours, again = config.adapters[kind], back_config.adapters[kind]
    assert set(ours.targets.split(",")) == set(again.targets.split(","))
    assert replace(ours, targets=again.targets, **({"hydra": False} if kind == "lora" else {})) == again


@torch.no_grad()
@pytest.mark.parametrize("targets", [ALL, "Q,K", "V,O,FFN_DOWN"])
def test_vera_is_written_as_the_lora_that_it_is(targets: str, pair: Pair, tmp_path: Path) -> None:
    flat = {"method": "vera", "vera_rank": 8, "vera_seed": 3, "vera_targets": targets, "vera_layers": "1-2"}
    llm, path = random_lora(pair[1], tmp_path / "ours", **flat)
    peft_logits(pair, path, llm, least=0.01)


def test_what_the_folder_says(pair: Pair, tmp_path: Path) -> None:
    _, path = random_lora(pair[1], tmp_path / "ours", **SUBSETS["some"])
    main(["peft", "--adapter_path", str(path), "--output_dir", str(tmp_path / "peft"), "--base_model", "meta/base"])
    assert sorted(p.name for p in (tmp_path / "peft").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "r": 4, "lora_alpha": 2.5, "target_modules": ["down_proj", "k_proj", "o_proj"]}
    assert expected.items() <= config.items()
    assert (config["base_model_name_or_path"], config["layers_to_transform"]) == ("meta/base", [1])
    with safe_open(tmp_path / "peft" / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        actual = {name: file.get_tensor(name) for name in file.keys()}
    block = "base_model.model.model.layers.1."
    names = ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")
    assert actual.keys() == {f"{block}{name}.lora_{ab}.weight" for name in names for ab in "AB"}
    assert {t.dtype for t in actual.values()} == {torch.float32}
    assert actual[f"{block}mlp.down_proj.lora_A.weight"].shape == (4, 160)


def test_an_adapter_of_the_authors_needs_the_bases_shape(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter_params.json: does not tell the shape.*--ckpt_dir"):
        to_peft(GOLDEN / "lora" / "adapter.pth", tmp_path / "peft")
    to_peft(GOLDEN / "lora", tmp_path / "peft", ckpt_dir=BASE)
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["layers_to_transform"] is None


def make_by_peft(settings: LoraConfig | IA3Config, base: Any, folder: Path) -> Any:
    """A random adapter as PEFT itself builds and writes it; returns its model."""
    torch.manual_seed(0)
    model = get_peft_model(copy.deepcopy(base), settings).eval()
    for name, parameter in model.named_parameters():
        if any(word in name for word in ("magnitude", "ia3", "lambda")):
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return model


DORA = {"r": 3, "lora_alpha": 5, "use_dora": True, "init_lora_weights": False}
SOME = ["q_proj", "k_proj", "up_proj", "down_proj"]
OF_PEFT = {
    "lora": LoraConfig(r=3, lora_alpha=5, target_modules=SOME, init_lora_weights=False, task_type="CAUSAL_LM"),
    "dora": LoraConfig(**DORA, target_modules=SOME, task_type="CAUSAL_LM"),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": VeraConfig(r=5, target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]),
    "ia3 of outputs": IA3Config(target_modules=["q_proj", "up_proj", "down_proj"], feedforward_modules=[]),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", OF_PEFT)
def test_an_adapter_made_by_peft(kind: str, pair: Pair, tmp_path: Path) -> None:
    theirs = make_by_peft(OF_PEFT[kind], pair[0], tmp_path / "made")
    from_peft(tmp_path / "made", pair[1], tmp_path / "ours")
    batch = tokens(2, 40)
    actual = Llama.build(pair[1], tmp_path / "ours").model(batch)
    close(actual, theirs(batch).logits, pair[0](batch).logits, least=0.01)


UP_AND_DOWN = ["up_proj", "down_proj"]
REFUSED_OF_PEFT = {
    "input of another": (
        IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"]),
        "layers.0.mlp.up_proj.ia3_l scales an input",
    ),
    "twice": (
        IA3Config(target_modules=UP_AND_DOWN, feedforward_modules=["down_proj"]),
        "layer 0: up_proj's outputs and down_proj's inputs are both scaled",
    ),
    "scale": (LoraConfig(**DORA, use_rslora=True, target_modules=UP_AND_DOWN), "use_rslora with use_dora"),
    "no matrices": (VeraConfig(target_modules=UP_AND_DOWN, save_projection=False), "save_projection is false"),
}


LAMBDA = "base_model.model.model.layers.1.mlp.down_proj.vera_lambda_b"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (LAMBDA, lambda t: t[:-1], r"lora_FFN_DOWN.lora_B has shape \(47, 4\)"),
        (LAMBDA, lambda t: t[None], "down_proj.vera_lambda_d and vera_lambda_b, vera_A and vera_B do not fit"),
        (LAMBDA, None, "do not fit"),
        ("base_model.vera_A", lambda t: t[:, :-1], "do not fit"),
        ("base_model.vera_B", lambda t: t[:, :-1], "do not fit"),
        ("base_model.vera_B", None, "do not fit"),
        ("base_model.vera_A", lambda t: t[0], "do not fit"),
        ("base_model.vera_A", None, "do not fit"),
    ],
)
def test_a_bad_vera_of_peft(name: str, change: Any, message: str, pair: Pair, tmp_path: Path) -> None:
    make_by_peft(VeraConfig(r=4, target_modules=["down_proj"]), pair[0], tmp_path / "made")
    state = load_file(tmp_path / "made" / "adapter_model.safetensors")
    tensor = state.pop(name)
    if change:
        state[name] = change(tensor).contiguous()
    save_file(state, tmp_path / "made" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        from_peft(tmp_path / "made", pair[1], tmp_path / "out")


@pytest.mark.parametrize("case", REFUSED_OF_PEFT)
def test_other_adapters_of_peft_without_a_counterpart(case: str, pair: Pair, tmp_path: Path) -> None:
    settings, message = REFUSED_OF_PEFT[case]
    make_by_peft(settings, pair[0], tmp_path / "made")
    with pytest.raises(ValueError, match=message):
        from_peft(tmp_path / "made", pair[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def settings(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        state = load_file(folder / "adapter_model.safetensors")
        change(state)
        save_file(state, folder / "adapter_model.safetensors")

    return damage


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
BAD_PEFT = {
    "other kind": (settings(peft_type="LOHA"), "adapter_config.json: peft_type is 'LOHA'"),
    "biases": (settings(bias="lora_only"), "adapter_config.json: bias is 'lora_only'"),
    "dora": (settings(use_dora=True), "safetensors: missing tensors .*dora_K.magnitude"),
    "VeRA": (settings(peft_type="VERA"), r"safetensors: tensor \S+lora_A.weight is no part of VeRA"),
    "IA3": (settings(peft_type="IA3"), "safetensors: .*unexpected.*ia3_K.lora_A"),
    "unknown": (settings(use_tomorrow=1), "adapter_config.json: use_tomorrow is 1"),
    "residual base": (settings(init_lora_weights="pissa"), "init_lora_weights 'pissa' changes the base"),
    "rank is text": (settings(r="3"), "made: lora_rank must be of type int, not '3'"),
    "rank": (settings(r=4), r"adapter_model.safetensors: \S+ has shape \(3, 48\), the model's is \(4, 48\)"),
    "no file": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: no such file"),
    "no settings": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json: no such file"),
    "missing": (tensors(lambda t: t.pop(Q)), "adapter_model.safetensors: missing tensor .*lora_Q.lora_B"),
    "elsewhere": (
        tensors(lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.ones(3, 48)})),
        "tensor base_model.model.lm_head.lora_A.weight is no LoRA, DoRA or IA3 at a linear layer",
    ),
    "not finite": (tensors(lambda t: t[Q].fill_(torch.nan)), "lora_Q.lora_B has values that are not finite"),
    "integers": (tensors(lambda t: t.update({Q: t[Q].to(torch.int8)})), "not a plain tensor of floating-point"),
}


@pytest.mark.parametrize("case", BAD_PEFT)
def test_a_bad_peft_folder(case: str, pair: Pair, tmp_path: Path) -> None:
    damage, message = BAD_PEFT[case]
    make_by_peft(OF_PEFT["lora"], pair[0], tmp_path / "made")
    damage(tmp_path / "made")
    with pytest.raises(ValueError, match=message) as caught:
        from_peft(tmp_path / "made", pair[1], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["made"]
