"""The format of the adapters that the paper's authors published: their flags and tensor names, to ours and back.

Their `adapter_params.json` holds the flags of their training script and no method; which method it was follows from
the flags and the tensors. Where our tensors hold all experts of an adapter, theirs are one per expert.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moa.bias_norm import BIASED_TARGETS
from moa.config import AdapterConfig
from moa.methods import META_NAMES
from moa.reading import safe_name, short_repr
from moa.state import require_same_keys

PREFIX = "llama."

LAYERS = ("lora_layers", "p_adapter_layers", "prompt_layers")
# The settings of ours that each type of adapter has in their file, and each method beside them.
OPTIONS = {
    "lora_layers": ("lora_targets", "lora_rank", "lora_alpha", "lora_hydra"),
    "p_adapter_layers": ("p_adapter_size", "p_adapter_hydra"),
    "prompt_layers": ("prompt_len",),
    "soft_moa": ("swi_x",),
    "sparse_moa": ("swi_x", "max_threshold", "const_threshold"),
    "topk_moelora": ("top_k", "noisy_router", "lb_loss_coeff"),
    "adamole": ("lb_loss_coeff",),
}
THEIR_NAMES = {"lora_hydra": "hydra_moe", "train_bias_norm": "w_bias"}
YES_NO = ("lora_hydra", "p_adapter_hydra", "train_bias_norm", "const_threshold", "noisy_router", "adamole")
DEFAULTS = {"expert_num": 1, "lb_loss_coeff": 0.0, **dict.fromkeys(YES_NO, False)}
SETTINGS = {*LAYERS, *(name for names in OPTIONS.values() for name in names), "expert_num", "train_bias_norm"}

# Our settings that their format can express, and the values that it has for each (None: all).
EXPRESSIBLE: dict[str, Collection | None] = {
    **dict.fromkeys(SETTINGS),
    "p_adapter_activation": ("silu",),
    "block_router": ("none", "soft", "sparse", "instance", "unipelt"),
    "gate_activation": ("sigmoid",),
    "threshold_gradient": None,  # left out of their file, as the next: they change training alone
    "lora_lr_ratio": None,
    "lora_rslora": (False,),
    "layer_experts": ("",),
    "expert_router": ("soft", "topk", "adamole"),
}
# Their flags. The last six do not change what a trained adapter computes.
KNOWN_FLAGS = {
    *(THEIR_NAMES.get(name, name) for name in SETTINGS),
    *("adamole", "bf16", "max_seq_len", "flash_attention2", "expert_weight", "bool_weights", "adapter_noisy"),
}


def unsupported_settings(config: AdapterConfig, expressible: Mapping[str, Collection | None]) -> list[str]:
    """List, as "name value", the settings in use that are not in `expressible` with that value."""
    active = config.active_fields()
    return [
        f"{name} {value}"
        for name, value in config.to_dict().items()
        if name in active and (name not in expressible or value not in (expressible[name] or [value]))
    ]


def is_reference(params: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether flags and tensor names are the authors' (our flags name the method)."""
    return "method" not in params and all(key.startswith(PREFIX) for key in keys)


def from_reference_params(params: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Return our flat configuration for the authors' flags and tensor names. ValueError for what is not supported.

    An adapter of soft_moa_instance looks like one of soft_moa; the caller has to know, and change "method".
    """
    for name in params.keys() - KNOWN_FLAGS:
        if params[name]:
            value = short_repr(params[name])
            raise ValueError(f"{safe_name(name)} is {value}, a setting that is not known of the authors' format")
    used = [name for name in LAYERS if not _is_empty(params[name])]
    method = _method(params, keys, used)
    names = [*LAYERS, "train_bias_norm", "expert_num"]
    for name in (*used, method):
        names += OPTIONS.get(name, ())
    return {"method": method, **{name: _setting(params, name) for name in names}}


def _method(params: Mapping[str, Any], keys: Collection[str], used: list[str]) -> str:
    # A unipeft gate has a weight; the scale of the prompt's heads is `attention.prompt_gate`, without one.
    if any(key.endswith((".lora_gate.weight", ".prompt_gate.weight", ".p_adapter_gate.weight")) for key in keys):
        return "unipeft"
    if any("adapter_type_router" in key for key in keys):
        return "sparse_moa" if "max_threshold" in params else "soft_moa"
    if not used and not _setting(params, "train_bias_norm"):
        raise ValueError("no layer is selected for any adapter")
    if len(used) != 1:
        return "custom"
    if _setting(params, "expert_num") == 1:
        return {"lora_layers": "lora", "p_adapter_layers": "parallel_adapter", "prompt_layers": "prompt"}[used[0]]
    if used == ["lora_layers"] and "top_k" in params:
        return "adamole" if _setting(params, "adamole") else "topk_moelora"
    molora = "hydralora" if _setting(params, "lora_hydra") else "molora"
    return {"lora_layers": molora, "p_adapter_layers": "parallel_adapter_moe", "prompt_layers": "prompt_moe"}[used[0]]


def _setting(params: Mapping[str, Any], name: str) -> Any:
    """A setting of ours by its name. KeyError where it is missing, ValueError where it should be a yes or a no."""
    theirs = THEIR_NAMES.get(name, name)
    value = params.get(theirs, DEFAULTS[name]) if name in DEFAULTS else params[theirs]
    if name not in YES_NO:
        return value
    if value not in (False, True, "False", "True"):
        raise ValueError(f"{theirs} must be true or false, not {short_repr(value)}")
    return value in (True, "True")


def _is_empty(layers: Any) -> bool:
    ranges = [part.strip().partition("-") for part in str(layers).split(",")]
    return all(first == last for first, _, last in ranges)


def to_reference_params(config: AdapterConfig) -> dict[str, Any]:
    """Return their `adapter_params.json` for a configuration of ours. ValueError naming the setting that their format
    cannot express."""
    unsupported = unsupported_settings(config, EXPRESSIBLE)
    if unsupported:
        raise ValueError(f"the authors' format cannot express {', '.join(unsupported)}")
    flat = config.to_dict()
    soft = config.expert_num == 1 or config.expert_router == "soft"
    beside = [flat["p_adapter_layers"], flat["prompt_layers"], flat["lora_hydra"], config.block_router != "none"]
    if not soft and any(beside):
        raise ValueError(f"expert_router {config.expert_router}: the authors' has it for LoRA alone, without hydra")
    if config.block_router == "sparse" and config.expert_num > 1:
        raise ValueError(f"expert_num {config.expert_num}: the authors' sparse_moa has one")
    flat |= {name: flat[name] or "0-0" for name in LAYERS}
    flat["lora_alpha"] = int(flat["lora_alpha"]) if flat["lora_alpha"].is_integer() else flat["lora_alpha"]
    names = ["train_bias_norm", *LAYERS, *(option for name in LAYERS for option in OPTIONS[name])]
    params = {"bf16": False, "max_seq_len": 300, "flash_attention2": False}
    if config.block_router == "unipelt":
        params["swi_x"] = 0
    elif config.block_router != "none":
        names += OPTIONS["sparse_moa" if config.block_router == "sparse" else "soft_moa"]
    if config.block_router == "sparse":
        params |= {"bool_weights": False, "adapter_noisy": False}
    else:
        params |= {"expert_num": config.expert_num, "expert_weight": False}
    if not soft:
        params["adamole"] = config.expert_router == "adamole"
        flat |= {"top_k": 1, "noisy_router": False} if params["adamole"] else {}
        names += OPTIONS["topk_moelora"]
    if not soft or config.block_router == "sparse":
        names.remove("lora_hydra")
    return params | {THEIR_NAMES.get(name, name): flat[name] for name in names}


class _Name(NamedTuple):
    """Their names of one of our tensors, which holds theirs side by side along `dim`; and the shape of each as they
    have it and as we do, where those differ (-1: the rest)."""

    theirs: list[str]
    dim: int = 0
    their_shape: tuple[int, ...] | None = None
    our_shape: tuple[int, ...] | None = None


def from_reference_state(state: Mapping[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """Return their tensors under our keys, in our shapes. ValueError naming what is missing, left over or of shapes
    that do not fit together."""
    names, ours = _names(config), {}
    expected = [key for name in names.values() for key in name.theirs]
    require_same_keys(expected, state, "tensors of the authors' format", "tensor")
    for key, name in names.items():
        parts = [state[k] for k in name.theirs]
        try:
            ours[key] = torch.cat([p if name.our_shape is None else p.reshape(name.our_shape) for p in parts], name.dim)
        except (RuntimeError, IndexError):
            shapes = [tuple(part.shape) for part in parts]
            raise ValueError(f"{name.theirs[0]} and its fellow experts have the shapes {shapes}") from None
    return ours


def to_reference_state(state: Mapping[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """Invert `from_reference_state`. ValueError naming a tensor that has no place in their format."""
    names, theirs = _names(config), {}
    require_same_keys(names, state, "the authors' format", "tensor")
    for key, name in names.items():
        for their_key, part in zip(name.theirs, state[key].chunk(len(name.theirs), name.dim), strict=True):
            theirs[their_key] = (part if name.their_shape is None else part.reshape(name.their_shape)).clone()
    return theirs


def _names(config: AdapterConfig) -> dict[str, _Name]:
    """Our key -> their names, for all tensors of the configuration."""
    names = {}
    for layer in range(config.n_layers):
        for key, name in _block_names(config, layer).items():
            names[f"layers.{layer}.{key}"] = name._replace(theirs=[f"{PREFIX}layers.{layer}.{t}" for t in name.theirs])
    if config.train_bias_norm:
        names["norm.adapters.norm.weight"] = _Name([f"{PREFIX}norm.weight"])
    return names


def _block_names(config: AdapterConfig, layer: int) -> dict[str, _Name]:
    slots, names = config.slots(layer), {}
    for slot in slots:
        if slot.type == "lora":
            part = META_NAMES[slot.target].partition(".")[0]
            theirs = f"{part}.lora_{slot.target.removeprefix('FFN_')}"
            names |= _lora_names(config, f"{part}.adapters.{slot.name}", theirs)
        elif slot.type == "prompt":
            names["attention.adapters.prompt.prompt"] = _Name(["attention.prompt.weight"])
            names["attention.adapters.prompt.gate"] = _Name(["attention.prompt_gate"], 0, (1, -1, 1, 1), (-1,))
            names |= _expert_router_names(config, "attention.adapters.prompt", "attention.prompt_router")
        elif slot.type == "p_adapter":
            names |= _parallel_adapter_names(config)
    if slots and config.block_router == "unipelt":
        for adapter_type in dict.fromkeys(slot.type for slot in slots):
            names |= _linear(f"router.{adapter_type}", f"{adapter_type}_gate")
    elif slots and config.block_router != "none":
        for layer_name in (".w1", ".w2", ".w3") if config.swi_x else ("",):
            names |= _linear(f"router.proj{layer_name}", f"adapter_type_router{layer_name}")
        if config.block_router == "sparse" and not config.const_threshold:
            names |= _linear("router.threshold", "adapter_threshold_fn")
    if config.train_bias_norm:
        for target in BIASED_TARGETS:
            part = META_NAMES[target].partition(".")[0]
            names[f"{part}.adapters.bias_{target}.bias"] = _Name([f"{META_NAMES[target]}.bias"])
        names |= {f"{norm}.adapters.norm.weight": _Name([f"{norm}.weight"]) for norm in ("attention_norm", "ffn_norm")}
    return names


def _linear(ours: str, theirs: str) -> dict[str, _Name]:
    return {f"{ours}.{name}": _Name([f"{theirs}.{name}"]) for name in ("weight", "bias")}


def _lora_names(config: AdapterConfig, ours: str, theirs: str) -> dict[str, _Name]:
    experts = range(config.expert_num)
    if len(experts) == 1:
        return {f"{ours}.lora_{ab}": _Name([f"{theirs}.lora_{ab}.weight"]) for ab in "AB"}
    if config.expert_router == "soft":
        a, b = ([f"{theirs}.lora_{ab}_l.{e}.weight" for e in experts] for ab in "AB")
    else:
        a, b = ([f"{theirs}.experts.{e}.lora_{ab}.weight" for e in experts] for ab in "AB")
    if config.adapters["lora"].hydra:
        a = [f"{theirs}.lora_A.weight"]
    names = {f"{ours}.lora_A": _Name(a), f"{ours}.lora_B": _Name(b, 1)}
    return names | _expert_router_names(config, ours, f"{theirs}.router")


def _parallel_adapter_names(config: AdapterConfig) -> dict[str, _Name]:
    experts, ours = config.expert_num, "adapters.p_adapter"
    up = [f"p_adapter.up_proj_l.{e}" for e in range(experts)] if experts > 1 else ["p_adapter.up_proj"]
    hydra = config.adapters["p_adapter"].hydra
    down = ["p_adapter.down_proj"] if hydra else [layer.replace("up", "down") for layer in up]
    names = {
        f"{ours}.down_proj": _Name([f"{layer}.weight" for layer in down]),
        f"{ours}.down_proj_bias": _Name([f"{layer}.bias" for layer in down]),
        f"{ours}.up_proj": _Name([f"{layer}.weight" for layer in up], 1),
        f"{ours}.up_proj_bias": _Name([f"{layer}.bias" for layer in up], 0, (-1,), (1, -1)),
    }
    return names | _expert_router_names(config, ours, "p_adapter.router")


def _expert_router_names(config: AdapterConfig, ours: str, theirs: str) -> dict[str, _Name]:
    ours, router = f"{ours}.expert_router", config.expert_router
    if config.expert_num == 1:
        return {}
    if router == "soft" and ".lora_" in theirs:
        return {f"{ours}.proj.weight": _Name([f"{theirs}.weight"])}  # without a bias
    if router == "topk":
        names = _linear(f"{ours}.proj", f"{theirs}.topkroute_linear")
        return names | (_linear(f"{ours}.noise", f"{theirs}.noise_linear") if config.noisy_router else {})
    names = _linear(f"{ours}.proj", theirs)
    if router == "adamole":
        names |= _linear(f"{ours}.threshold", theirs.replace(".router", ".threshold_fn"))
    return names
