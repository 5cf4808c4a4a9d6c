"""The tiny model of the tests: the golden base (3 layers, width 64, 4 heads, 2 key/value heads, vocabulary 512) with
every method beside it, adapters filled at random so that each of them matters."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from llama import Llama, ModelArgs, Transformer
from llama.distributed import init_distributed
from moa.adapter_file import adapter_params, save_adapter
from moa.config import AdapterConfig
from moa.methods import LINEAR_TARGETS
from moa.state import adapter_parameters, adapter_state_dict, load_adapter_state_dict

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
BASE = GOLDEN / "base"
PARAMS: dict[str, Any] = json.loads((BASE / "params.json").read_text())
ARGS = ModelArgs(**PARAMS)

_LORA = {"lora_rank": 4, "lora_alpha": 6.0, "lora_targets": ",".join(LINEAR_TARGETS)}
_PROMPT = {"prompt_len": 5}
_P_ADAPTER = {"p_adapter_size": 8}
# Layer ranges differ, so that blocks have different slots; every linear layer has a LoRA.
_RANGES = {"lora_layers": "0-2", "p_adapter_layers": "0-1,2-3"}
_SOFT = {"method": "soft_moa", **_LORA, **_PROMPT, **_P_ADAPTER, **_RANGES, "prompt_layers": "1-3"}
_LATER = {"lora_layers": "1-3"}
_SPARSE = {"method": "sparse_moa", **_LORA, **_P_ADAPTER, **_RANGES}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", **_LORA},
    "prompt": {"method": "prompt", **_PROMPT},
    "parallel_adapter": {"method": "parallel_adapter", **_P_ADAPTER},
    "soft_moa": {**_SOFT, "swi_x": 2},
    "soft_moa_linear_router": {**_SOFT, "swi_x": 0},
    # Thresholds about 0.4 and 0.5, so that a good part of the adapters are off
    "sparse_moa": {**_SPARSE, "swi_x": 2, "max_threshold": 0.8},
    # ... and in one block no adapter at all
    "sparse_moa_const_threshold": {
        **{**_SPARSE, "swi_x": 0, "const_threshold": True},
        **{"lora_layers": "0-1", "p_adapter_layers": "2-3"},
    },
    "soft_moa_instance": {**_SOFT, "method": "soft_moa_instance", "swi_x": 2},
    "unipeft": {**_SOFT, "method": "unipeft"},
    "molora": {"method": "molora", **_LORA, "expert_num": 4},
    "hydralora": {"method": "hydralora", **_LORA, "expert_num": 3},
    "topk_moelora": {"method": "topk_moelora", **_LORA, "expert_num": 4, "lb_loss_coeff": 0.01},
    "adamole": {"method": "adamole", **_LORA, "expert_num": 4, "lb_loss_coeff": 0.1},
    "parallel_adapter_moe": {**_P_ADAPTER, "method": "parallel_adapter_moe", "expert_num": 3, "p_adapter_hydra": False},
    "prompt_moe": {"method": "prompt_moe", **_PROMPT, "expert_num": 3},
    "soft_moa_experts": {**_SOFT, "swi_x": 1, "expert_num": 2, "lora_hydra": True, "p_adapter_hydra": True},
    "lora_bias_norm": {"method": "lora", **_LORA, **_LATER, "train_bias_norm": True},
    # Everything at once: what no method of the paper combines
    "custom": {
        **_SOFT,
        **{"method": "custom", "block_router": "instance", "gate_activation": "softmax", "swi_x": 1},
        **{"expert_num": 3, "expert_router": "topk", "lb_loss_coeff": 0.3, "p_adapter_activation": "gelu"},
        "train_bias_norm": True,
    },
}


# Methods beyond the paper's (their formulas: test_baselines.py), and all their adapters under one router
_SMALL_LORA = {"lora_rank": 4, "lora_alpha": 6.0}
_MIXLORA = {"mixlora_rank": 3, "mixlora_alpha": 6.0, "mixlora_experts": 3}
BASELINES: dict[str, dict[str, Any]] = {
    "rslora": {"method": "rslora", **_SMALL_LORA},
    "lora_plus": {"method": "lora_plus", **_SMALL_LORA},
    "dora": {"method": "dora", "dora_rank": 4},
    "pissa": {"method": "pissa", "pissa_rank": 4},
    "vera": {"method": "vera", "vera_rank": 8},
    "ia3": {"method": "ia3"},
    "comol": {"method": "comol", "comol_rank": 4, "comol_cores": 3},
    "flylora": {"method": "flylora", "flylora_rank": 8, "flylora_alpha": 16.0, "flylora_top_k": 3},
    "mola": {"method": "mola", **_SMALL_LORA, "layer_experts": "2,3,4", "expert_num": 4, "lb_loss_coeff": 0.1},
    "mixlora": {"method": "mixlora", **_SMALL_LORA, **_MIXLORA, "lb_loss_coeff": 0.1},
    "all_kinds": {
        **{"method": "custom", "block_router": "soft", "swi_x": 1, "p_adapter_layers": "0-1", "p_adapter_size": 8},
        **{"dora_layers": "0-3", "dora_rank": 4, "ia3_layers": "0-3", "vera_layers": "0-3", "vera_rank": 8},
        **{"comol_layers": "0-2", "comol_rank": 4, "comol_cores": 3, "pissa_layers": "1-3", "pissa_rank": 4},
        **{"flylora_layers": "0-2", "flylora_rank": 8, "flylora_top_k": 3, "flylora_targets": "Q,V,O,FFN_UP"},
        **{"mixlora_layers": "1-2", **_MIXLORA, "lb_loss_coeff": 0.1},
    },
}

# Beside them, one whose forward pass is random while it trains, and one whose adapter `dora.registered` makes known
OTHERS = {
    "noisy": {**METHODS["topk_moelora"], "noisy_router": True},
    "my_dora": {
        "method": "custom",
        "my_dora_layers": "all",
        "p_adapter_layers": "1-3",
        "block_router": "soft",
        "swi_x": 1,
    },
}


def config(name: str | None) -> AdapterConfig | None:
    """Configuration of one of METHODS, BASELINES or OTHERS; None (no adapters) for None."""
    return None if name is None else AdapterConfig.from_dict((METHODS | BASELINES | OTHERS)[name], ARGS.n_layers)


def authors_can_say(name: str) -> bool:
    """Whether the authors' code has what a method is made of."""
    if name in BASELINES:
        return name == "lora_plus"  # which differs while training alone
    adapters = config(name).adapters
    theirs = {name for name in adapters if adapters[name].layers} <= {"lora", "prompt", "p_adapter"}
    return theirs and METHODS[name]["method"] != "custom"


# random_state draws by the keys of earlier revisions, so that the bounds of tests hold for the same numbers.
_SEED_NAMES = (
    ("expert_router.proj.", "expert_router.linear."),
    (".router.proj.", ".router.router."),
    (".lora_A", ".A"),
    (".lora_B", ".B"),
    ("prompt.prompt", "prompt.P"),
    ("prompt.gate", "prompt.z"),
    ("down_proj", "down"),
    ("up_proj", "up"),
)


def _seed_name(key: str) -> str:
    for new, old in _SEED_NAMES:
        key = key.replace(new, old)
    return key


def random_state(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    """Whole adapter tensors of `model`, all random, the same whatever the model-parallel size."""
    state = {}
    for key, (_, spec, _) in adapter_parameters(model, untrained=True).items():
        digest = hashlib.sha256(f"test/{seed}/{_seed_name(key)}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        scale, middle = (
            1.0 if "adapters.prompt.prompt" in key or "adapters.prompt.gate" in key else 0.2,
            "adapters.norm" in key,
        )
        state[key] = torch.randn(spec.shape, generator=generator) * scale + float(middle)
    return state


def build(name: str | None, *, seed: int | None = 1, ckpt_dir: Path = BASE, **kwargs: Any) -> Llama:
    """A fresh model on the golden base with a method's adapters, random from `seed` (None: as they start)."""
    llm = Llama.build(ckpt_dir, config=config(name), device="cpu", **({"max_seq_len": 64} | kwargs))
    if seed is not None:
        load_adapter_state_dict(llm.model, random_state(llm.model, seed), "random")
    return llm


@cache
def shared(name: str | None) -> Llama:
    """`build(name)`, once for all tests that change nothing in it."""
    return build(name)


def unfilled(args: ModelArgs, flat: Mapping[str, Any]) -> Transformer:
    """A model without weights."""
    init_distributed(torch.device("cpu"))
    return Transformer(args, AdapterConfig.from_dict(flat, args.n_layers))


def save(llm: Llama, folder: Path) -> Path:
    """The adapter of `llm` as the project writes it; path of adapter.pth."""
    return save_adapter(folder, adapter_state_dict(llm.model), adapter_params(llm.model.config, asdict(llm.model.args)))


def tokens(*shape: int, seed: int = 0) -> Tensor:
    """Random token ids of the golden base's 256 bytes."""
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed))


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random numbers, the same for a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradient of every adapter tensor (zeros where there is none); then they are cleared."""
    grads = {}
    for key, (parameter, *_) in adapter_parameters(model).items():
        grads[key] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        parameter.grad = None
    return grads


def relative(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, and |actual| where nothing is expected."""
    size = expected.norm().item()
    return ((actual - expected).norm() / (size or 1)).item()


def require_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float) -> None:
    """The same keys, and every tensor within `bound` of the expected one."""
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert relative(actual[key], tensor) <= bound, key


def require_identical(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same keys, and every tensor equal to the bit, of the same type."""
    assert actual.keys() == expected.keys() and expected
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype and torch.equal(actual[key], tensor), key


@contextmanager
def float64(model: Transformer) -> Iterator[Transformer]:
    """All in float64, also what the code takes to float32 on the way: then sums in another order differ by far less
    than any mistake would make them."""
    model.double()
    model.freqs_cis = model.freqs_cis[:0]  # computed again
    with mock.patch.object(Tensor, "float", Tensor.double):
        yield model


def write_base(folder: Path, params: Mapping[str, Any], state: Mapping[str, Tensor], shards: int = 1) -> Path:
    """A checkpoint folder in Meta's layout with the golden tokenizer; `state` is cut as LLaMA-3's writers do."""
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(dict(params)))
    (folder / "tokenizer.model").write_bytes((BASE / "tokenizer.model").read_bytes())
    for i in range(shards):
        torch.save({key: cut(key, t, shards)[i] for key, t in state.items()}, folder / f"consolidated.{i:02d}.pth")
    return folder


def cut(key: str, whole: Tensor, shards: int) -> list[Tensor]:
    """A base tensor as LLaMA-3's shards hold it: outputs cut, or inputs (wo, w2), or (norms) everywhere whole."""
    if "norm" in key:
        return [whole] * shards
    return [t.clone() for t in whole.chunk(shards, 1 if key.split(".")[-2] in ("wo", "w2") else 0)]


def golden_state() -> dict[str, Tensor]:
    return torch.load(BASE / "consolidated.00.pth", weights_only=True)


ALL = [None, *METHODS]


def prompts(*lengths: int, seed: int = 0) -> list[list[int]]:
    """BOS and random bytes, one prompt of each length."""
    return [[256, *tokens(n - 1, seed=seed + i).tolist()] for i, n in enumerate(lengths)]


@contextmanager
def changed(llm: Llama, **changes: int) -> Iterator[None]:
    """A shared model with another max_batch_size, max_seq_len or cuda_graphs for a while."""
    before = {name: getattr(llm, name) for name in changes}
    for name, value in changes.items():
        setattr(llm, name, value)
    yield
    for name, value in before.items():
        setattr(llm, name, value)
