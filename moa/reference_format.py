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

# Our settings that their format can express, and the values that it has for each (None: all).
EXPRESSIBLE: dict[str, Collection | None] = {
    **dict.fromkeys(("lora_layers", "lora_targets", "lora_rank", "lora_alpha", "lora_hydra")),
    **dict.fromkeys(("p_adapter_layers", "p_adapter_size", "p_adapter_hydra")),
    **dict.fromkeys(("prompt_layers", "prompt_len", "train_bias_norm", "expert_num")),
    **dict.fromkeys(("swi_x", "max_threshold", "const_threshold", "top_k", "noisy_router", "lb_loss_coeff")),
    "p_adapter_activation": ("silu",),
    "block_router": ("none", "soft", "sparse", "instance", "unipelt"),
    "gate_activation": ("sigmoid",),
    "threshold_gradient": None,  # left out of their file: it changes training alone
    "expert_router": ("soft", "topk", "adamole"),
}
# Their flags. The last six do not change what a trained adapter computes.
KNOWN_FLAGS = {
    *("lora_layers", "lora_targets", "lora_rank", "lora_alpha", "hydra_moe"),
    *("p_adapter_layers", "p_adapter_size", "p_adapter_hydra", "prompt_layers", "prompt_len", "w_bias", "swi_x"),
    *("max_threshold", "const_threshold", "expert_num", "adamole", "top_k", "noisy_router", "lb_loss_coeff"),
    *("bf16", "max_seq_len", "flash_attention2", "expert_weight", "bool_weights", "adapter_noisy"),
}


def unsupported_settings(config: AdapterConfig, expressible: Mapping[str, Collection | None]) -> list[str]:
    """List, as "name value", the settings in use that are not in `expressible` with that value. An adapter type that
    stands in no layer is not in use."""
    absent = {f"{adapter_type}_layers" for adapter_type, options in config.adapters.items() if not options.layers}
    active = config.active_fields() - absent
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
    flat = {name: params[name] for name in ("lora_layers", "p_adapter_layers", "prompt_layers")}
    flat |= {"train_bias_norm": _flag(params, "w_bias"), "expert_num": params.get("expert_num", 1)}
    used = [name for name, layers in flat.items() if name.endswith("_layers") and not _is_empty(layers)]
    if "lora_layers" in used:
        flat |= {name: params[name] for name in ("lora_targets", "lora_rank", "lora_alpha")}
        flat["lora_hydra"] = _flag(params, "hydra_moe")
    if "p_adapter_layers" in used:
        flat |= {"p_adapter_size": params["p_adapter_size"], "p_adapter_hydra": _flag(params, "p_adapter_hydra")}
    if "prompt_layers" in used:
        flat["prompt_len"] = params["prompt_len"]
    # A unipeft gate has a weight; the scale of the prompt's heads is `attention.prompt_gate`, without one.
    if any(key.endswith((".lora_gate.weight", ".prompt_gate.weight", ".p_adapter_gate.weight")) for key in keys):
        return flat | {"method": "unipeft"}
    if any("adapter_type_router" in key for key in keys):
        flat["swi_x"] = params["swi_x"]
        if "max_threshold" not in params:
            return flat | {"method": "soft_moa"}
        const = _flag(params, "const_threshold")
        return flat | {"method": "sparse_moa", "max_threshold": params["max_threshold"], "const_threshold": const}
    several = flat["expert_num"] != 1
    if "top_k" in params and used == ["lora_layers"] and several:
        flat["lb_loss_coeff"] = params.get("lb_loss_coeff", 0.0)
        if _flag(params, "adamole"):
            return flat | {"method": "adamole"}
        noisy = _flag(params, "noisy_router")
        return flat | {"method": "topk_moelora", "top_k": params["top_k"], "noisy_router": noisy}
    if not used and not flat["train_bias_norm"]:
        raise ValueError("no layer is selected for any adapter")
    if len(used) != 1:
        return flat | {"method": "custom"}
    single, mixture = {
        "lora_layers": ("lora", "hydralora" if flat.get("lora_hydra") else "molora"),
        "p_adapter_layers": ("parallel_adapter", "parallel_adapter_moe"),
        "prompt_layers": ("prompt", "prompt_moe"),
    }[used[0]]
    return flat | {"method": mixture if several else single}


def _flag(params: Mapping[str, Any], name: str) -> bool:
    """One of their yes-or-no flags; left out is no. ValueError naming it where it is neither."""
    value = params.get(name, False)
    if value not in (False, True, "False", "True"):
        raise ValueError(f"{name} must be true or false, not {short_repr(value)}")
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
    lora, p_adapter, prompt = (config.adapters[name] for name in ("lora", "p_adapter", "prompt"))
    router, experts = config.router, config.experts
    has_expert_router = experts.expert_num > 1 and experts.expert_router != "soft"
    if has_expert_router and (p_adapter.layers or prompt.layers or router.block_router != "none" or lora.hydra):
        raise ValueError(f"expert_router {experts.expert_router}: the authors' has it for LoRA alone, without hydra")
    if router.block_router == "sparse" and experts.expert_num > 1:
        raise ValueError(f"expert_num {experts.expert_num}: the authors' sparse_moa has one")
    params = {
        **{"bf16": False, "max_seq_len": 300, "flash_attention2": False, "w_bias": config.bias_norm.train_bias_norm},
        **{"lora_layers": lora.layers or "0-0", "lora_rank": lora.rank, "lora_targets": lora.targets},
        **{"lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha},
        **{"p_adapter_layers": p_adapter.layers or "0-0", "p_adapter_size": p_adapter.size},
        **{"p_adapter_hydra": p_adapter.hydra, "prompt_layers": prompt.layers or "0-0", "prompt_len": prompt.len},
    }
    if router.block_router != "none":
        params["swi_x"] = 0 if router.block_router == "unipelt" else router.swi_x
    if router.block_router == "sparse":
        sparse = {"max_threshold": router.max_threshold, "const_threshold": router.const_threshold}
        return params | sparse | {"bool_weights": False, "adapter_noisy": False}
    params |= {"expert_num": experts.expert_num, "expert_weight": False}
    if not has_expert_router:
        return params | {"hydra_moe": lora.hydra}
    adamole = experts.expert_router == "adamole"
    params |= {"top_k": 1 if adamole else experts.top_k, "adamole": adamole}
    return params | {"noisy_router": experts.noisy_router and not adamole, "lb_loss_coeff": experts.lb_loss_coeff}


class _Name(NamedTuple):
    """Their names of one of our tensors, which holds theirs side by side along `dim`. shape: of each of theirs, where
    it is not ours (-1: the rest)."""

    theirs: list[str]
    dim: int = 0
    shape: tuple[int, ...] | None = None


def from_reference_state(state: Mapping[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """Return their tensors under our keys, in our shapes. ValueError naming what is missing, left over or of shapes
    that do not fit together."""
    names = _names(config)
    expected = [key for name in names.values() for key in name.theirs]
    require_same_keys(expected, state, "tensors of the authors' format", "tensor")
    ours = {}
    for key, (keys, dim, shape) in names.items():
        parts = [state[k] for k in keys]
        if key.endswith(".up_proj_bias"):  # one row per expert
            parts = [part[None] for part in parts]
        elif shape is not None:
            parts = [part.flatten() for part in parts]
        try:
            ours[key] = torch.cat(parts, dim)
        except (RuntimeError, IndexError):
            shapes = [tuple(part.shape) for part in parts]
            raise ValueError(f"{keys[0]} and its fellow experts have the shapes {shapes}") from None
    return ours


def to_reference_state(state: Mapping[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """Invert `from_reference_state`. ValueError naming a tensor that has no place in their format."""
    names, theirs = _names(config), {}
    require_same_keys(names, state, "the authors' format", "tensor")
    for key, (keys, dim, shape) in names.items():
        for their_key, part in zip(keys, state[key].chunk(len(keys), dim), strict=True):
            theirs[their_key] = (part if shape is None else part.reshape(shape)).clone()
    return theirs


def _names(config: AdapterConfig) -> dict[str, _Name]:
    """Our key -> their names, for all tensors of the configuration."""
    names = {}
    for layer in range(config.n_layers):
        for key, (theirs, dim, shape) in _block_names(config, layer).items():
            names[f"layers.{layer}.{key}"] = _Name([f"{PREFIX}layers.{layer}.{t}" for t in theirs], dim, shape)
    if config.bias_norm.train_bias_norm:
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
            names["attention.adapters.prompt.gate"] = _Name(["attention.prompt_gate"], shape=(1, -1, 1, 1))
            names |= _expert_router_names(config, "attention.adapters.prompt", "attention.prompt_router")
        elif slot.type == "p_adapter":
            names |= _parallel_adapter_names(config)
    if slots and config.router.block_router == "unipelt":
        for adapter_type in dict.fromkeys(slot.type for slot in slots):
            names |= _linear(f"router.{adapter_type}", f"{adapter_type}_gate")
    elif slots and config.router.block_router != "none":
        for layer_name in (".w1", ".w2", ".w3") if config.router.swi_x else ("",):
            names |= _linear(f"router.proj{layer_name}", f"adapter_type_router{layer_name}")
        if config.router.block_router == "sparse" and not config.router.const_threshold:
            names |= _linear("router.threshold", "adapter_threshold_fn")
    if config.bias_norm.train_bias_norm:
        for target in BIASED_TARGETS:
            part = META_NAMES[target].partition(".")[0]
            names[f"{part}.adapters.bias_{target}.bias"] = _Name([f"{META_NAMES[target]}.bias"])
        names |= {f"{norm}.adapters.norm.weight": _Name([f"{norm}.weight"]) for norm in ("attention_norm", "ffn_norm")}
    return names


def _linear(ours: str, theirs: str) -> dict[str, _Name]:
    return {f"{ours}.{name}": _Name([f"{theirs}.{name}"]) for name in ("weight", "bias")}


def _lora_names(config: AdapterConfig, ours: str, theirs: str) -> dict[str, _Name]:
    experts = range(config.experts.expert_num)
    if len(experts) == 1:
        return {f"{ours}.lora_{ab}": _Name([f"{theirs}.lora_{ab}.weight"]) for ab in "AB"}
    if config.experts.expert_router == "soft":
        a, b = ([f"{theirs}.lora_{ab}_l.{e}.weight" for e in experts] for ab in "AB")
    else:
        a, b = ([f"{theirs}.experts.{e}.lora_{ab}.weight" for e in experts] for ab in "AB")
    if config.adapters["lora"].hydra:
        a = [f"{theirs}.lora_A.weight"]
    names = {f"{ours}.lora_A": _Name(a), f"{ours}.lora_B": _Name(b, 1)}
    return names | _expert_router_names(config, ours, f"{theirs}.router")


def _parallel_adapter_names(config: AdapterConfig) -> dict[str, _Name]:
    experts, ours = config.experts.expert_num, "adapters.p_adapter"
    up = [f"p_adapter.up_proj_l.{e}" for e in range(experts)] if experts > 1 else ["p_adapter.up_proj"]
    hydra = config.adapters["p_adapter"].hydra
    down = ["p_adapter.down_proj"] if hydra else [layer.replace("up", "down") for layer in up]
    names = {
        f"{ours}.down_proj": _Name([f"{layer}.weight" for layer in down]),
        f"{ours}.down_proj_bias": _Name([f"{layer}.bias" for layer in down]),
        f"{ours}.up_proj": _Name([f"{layer}.weight" for layer in up], 1),
        f"{ours}.up_proj_bias": _Name([f"{layer}.bias" for layer in up], shape=(-1,)),
    }
    return names | _expert_router_names(config, ours, "p_adapter.router")


def _expert_router_names(config: AdapterConfig, ours: str, theirs: str) -> dict[str, _Name]:
    ours, router = f"{ours}.expert_router", config.experts.expert_router
    if config.experts.expert_num == 1:
        return {}
    if router == "soft" and ".lora_" in theirs:
        return {f"{ours}.proj.weight": _Name([f"{theirs}.weight"])}  # without a bias
    if router == "topk":
        names = _linear(f"{ours}.proj", f"{theirs}.topkroute_linear")
        return names | (_linear(f"{ours}.noise", f"{theirs}.noise_linear") if config.experts.noisy_router else {})
    names = _linear(f"{ours}.proj", theirs)
    if router == "adamole":
        names |= _linear(f"{ours}.threshold", theirs.replace(".router", ".threshold_fn"))
    return names
