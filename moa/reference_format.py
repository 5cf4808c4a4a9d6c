"""The format of the adapters that the paper's authors published: their flags and key names, to ours and back.

Their `adapter_params.json` holds the flags of their training script and no method; which method it was follows from
the flags and the tensors. Where our tensors hold all experts of an adapter, theirs are one per expert.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moa.bias_norm import BIASED_TARGETS
from moa.config import AdapterConfig
from moa.reading import shown
from moa.state import require_same_keys

PREFIX = "llama."
_PLACES = {  # site -> the part of the block and their name for an adapter there, and the base layer
    **{site: ("attention", site, f"w{site.lower()}") for site in ("Q", "K", "V", "O")},
    "FFN_UP": ("feed_forward", "UP", "w3"),
    "FFN_GATE": ("feed_forward", "GATE", "w1"),
    "FFN_DOWN": ("feed_forward", "DOWN", "w2"),
}


class _Name(NamedTuple):
    """Their keys of one of our tensors, which holds theirs side by side along `dim`. shape: of each of theirs, where it
    is not ours (-1: whatever is left)."""

    theirs: list[str]
    dim: int = 0
    shape: tuple[int, ...] | None = None


def is_reference(params: Mapping[str, Any], keys: Collection[str]) -> bool:
    """Whether flags and tensor names are the authors' (our flags name the method)."""
    return "method" not in params and all(key.startswith(PREFIX) for key in keys)


def settings(params: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Our flat configuration for the authors' flags and tensor names. ValueError for what is not supported.

    An adapter of soft_moa_instance looks like one of soft_moa: "method" is then to be changed by who knows.
    """
    flat = {name: params[name] for name in ("lora_layers", "p_adapter_layers", "prompt_layers")}
    flat |= {"train_bias_norm": _flag(params, "w_bias"), "expert_num": params.get("expert_num", 1)}
    used = [name for name, layers in flat.items() if name.endswith("_layers") and not _empty(layers)]
    if "lora_layers" in used:
        flat |= {name: params[name] for name in ("lora_targets", "lora_rank", "lora_alpha")}
        flat["lora_hydra"] = _flag(params, "hydra_moe")
    if "p_adapter_layers" in used:
        flat |= {"p_adapter_size": params["p_adapter_size"], "p_adapter_hydra": _flag(params, "p_adapter_hydra")}
    if "prompt_layers" in used:
        flat["prompt_len"] = params["prompt_len"]
    # The scale of the prompt's heads is attention.prompt_gate, without .weight
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
        return flat | {
            "method": "topk_moelora",
            "top_k": params["top_k"],
            "noisy_router": _flag(params, "noisy_router"),
        }
    if not used and not flat["train_bias_norm"]:
        raise ValueError("no layer is selected for any adapter")
    if len(used) != 1:
        return flat | {"method": "custom"}
    mixtures = {"lora_layers": "molora", "p_adapter_layers": "parallel_adapter_moe", "prompt_layers": "prompt_moe"}
    singles = {"lora_layers": "lora", "p_adapter_layers": "parallel_adapter", "prompt_layers": "prompt"}
    method = (mixtures if several else singles)[used[0]]
    return flat | {"method": "hydralora" if method == "molora" and flat["lora_hydra"] else method}


def _flag(params: Mapping[str, Any], name: str) -> bool:
    """One of their yes-or-no flags; left out is no. ValueError naming it where it is neither."""
    value = params.get(name, False)
    if value not in (False, True, "False", "True"):
        raise ValueError(f"{name} must be true or false, not {shown(value)}")
    return value in (True, "True")


def _empty(layers: Any) -> bool:
    ends = [part.strip().partition("-") for part in str(layers).split(",")]
    return all(first == last for first, _, last in ends)


def to_reference_params(config: AdapterConfig) -> dict[str, Any]:
    """Their `adapter_params.json` for a configuration of ours. ValueError naming the setting that theirs cannot say."""
    lora, p_adapter, prompt = (config.adapters[kind] for kind in ("lora", "p_adapter", "prompt"))
    router, experts = config.router, config.experts
    chosen = experts.expert_num > 1 and experts.expert_router != "soft"
    if router.block_router not in ("none", "soft", "sparse", "instance", "kinds"):
        raise ValueError(f"block_router {router.block_router}: the authors have none of that kind")
    if chosen and experts.expert_router not in ("topk", "adamole"):
        raise ValueError(f"expert_router {experts.expert_router}: the authors have none of that kind")
    if chosen and (p_adapter.layers or prompt.layers or router.block_router != "none" or lora.hydra):
        raise ValueError(f"expert_router {experts.expert_router}: the authors' has it for LoRA alone, without hydra")
    if router.block_router == "sparse" and experts.expert_num > 1:
        raise ValueError(f"expert_num {experts.expert_num}: the authors' sparse_moa has one")
    if router.block_router in ("soft", "instance") and router.gate_activation != "sigmoid":
        raise ValueError(f"gate_activation {router.gate_activation}: the authors' is sigmoid")
    if p_adapter.layers and p_adapter.activation != "silu":
        raise ValueError(f"p_adapter_activation {p_adapter.activation}: the authors' is silu")
    for kind in set(config.adapters) - {"lora", "p_adapter", "prompt"}:
        if config.adapters[kind].layers:
            raise ValueError(f"{kind}_layers: the authors have no adapter of that kind")
    params = {
        **{"bf16": False, "max_seq_len": 300, "flash_attention2": False, "w_bias": config.base.train_bias_norm},
        **{"lora_layers": lora.layers or "0-0", "lora_rank": lora.rank, "lora_targets": lora.targets},
        **{"lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha},
        **{"p_adapter_layers": p_adapter.layers or "0-0", "p_adapter_size": p_adapter.size},
        **{"p_adapter_hydra": p_adapter.hydra, "prompt_layers": prompt.layers or "0-0", "prompt_len": prompt.len},
    }
    if router.block_router != "sparse":
        params |= {"expert_num": experts.expert_num, "expert_weight": False}
    if router.block_router != "none":
        params["swi_x"] = 0 if router.block_router == "kinds" else router.swi_x
    if router.block_router == "sparse":
        sparse = {"max_threshold": router.max_threshold, "const_threshold": router.const_threshold}
        return params | sparse | {"bool_weights": False, "adapter_noisy": False}
    if chosen:
        adamole = experts.expert_router == "adamole"
        params |= {"top_k": 1 if adamole else experts.top_k, "adamole": adamole}
        return params | {"noisy_router": experts.noisy_router and not adamole, "lb_loss_coeff": experts.lb_loss_coeff}
    return params | {"hydra_moe": lora.hydra}


def from_reference_state(state: Mapping[str, Tensor], config: AdapterConfig) -> dict[str, Tensor]:
    """Their tensors under our keys, in our shapes. ValueError naming what is missing, left over or of odd shapes."""
    names = _names(config)
    theirs = [key for name in names.values() for key in name.theirs]
    require_same_keys(theirs, state, "tensors of the authors' format", "tensor")
    ours = {}
    for key, (keys, dim, shape) in names.items():
        parts = [state[k] for k in keys]
        if key.endswith(".up_bias"):  # one row per expert
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
    """Inverse of `from_reference_state`."""
    theirs = {}
    for key, (keys, dim, shape) in _names(config).items():
        for their_key, part in zip(keys, state[key].chunk(len(keys), dim), strict=True):
            theirs[their_key] = (part if shape is None else part.reshape(shape)).clone()
    return theirs


def _names(config: AdapterConfig) -> dict[str, _Name]:
    """Our key -> their names, for all tensors of the configuration."""
    names = {}
    for layer in range(config.n_layers):
        for key, (theirs, dim, shape) in _layer_names(config, layer).items():
            names[f"layers.{layer}.{key}"] = _Name([f"{PREFIX}layers.{layer}.{t}" for t in theirs], dim, shape)
    if config.base.train_bias_norm:
        names["norm.adapters.norm.weight"] = _Name([f"{PREFIX}norm.weight"])
    return names


def _layer_names(config: AdapterConfig, layer: int) -> dict[str, _Name]:
    slots = config.slots(layer)
    names = {}
    for slot in slots:
        part, short, _ = _PLACES.get(slot.site, ("attention", "", ""))
        if slot.kind == "lora":
            names |= _lora_names(config, f"{part}.adapters.{slot.name}", f"{part}.lora_{short}")
        elif slot.kind == "prompt":
            names["attention.adapters.prompt.P"] = _Name(["attention.prompt.weight"])
            names["attention.adapters.prompt.z"] = _Name(["attention.prompt_gate"], shape=(1, -1, 1, 1))
            names |= _router_names(config, "attention.adapters.prompt", "attention.prompt_router")
        elif slot.kind == "p_adapter":
            names |= _parallel_names(config)
    if slots and config.router.block_router == "kinds":
        for kind in dict.fromkeys(slot.kind for slot in slots):
            names |= {f"router.{kind}.{p}": _Name([f"{kind}_gate.{p}"]) for p in ("weight", "bias")}
    elif slots and config.router.block_router != "none":
        for w in ("w1.", "w2.", "w3.") if config.router.swi_x else ("",):
            names |= {f"router.router.{w}{p}": _Name([f"adapter_type_router.{w}{p}"]) for p in ("weight", "bias")}
        if config.router.block_router == "sparse" and not config.router.const_threshold:
            names |= {f"router.threshold.{p}": _Name([f"adapter_threshold_fn.{p}"]) for p in ("weight", "bias")}
    if config.base.train_bias_norm:
        for site in BIASED_TARGETS:
            part, _, base = _PLACES[site]
            names[f"{part}.adapters.bias_{site}.bias"] = _Name([f"{part}.{base}.bias"])
        names |= {f"{norm}.adapters.norm.weight": _Name([f"{norm}.weight"]) for norm in ("attention_norm", "ffn_norm")}
    return names


def _lora_names(config: AdapterConfig, ours: str, theirs: str) -> dict[str, _Name]:
    experts = range(config.experts.expert_num)
    if len(experts) == 1:
        return {f"{ours}.{ab}": _Name([f"{theirs}.lora_{ab}.weight"]) for ab in "AB"}
    if config.experts.expert_router == "soft":
        a, b = ([f"{theirs}.lora_{ab}_l.{e}.weight" for e in experts] for ab in "AB")
    else:
        a, b = ([f"{theirs}.experts.{e}.lora_{ab}.weight" for e in experts] for ab in "AB")
    if config.adapters["lora"].hydra:
        a = [f"{theirs}.lora_A.weight"]
    return {f"{ours}.A": _Name(a), f"{ours}.B": _Name(b, 1)} | _router_names(config, ours, f"{theirs}.router")


def _parallel_names(config: AdapterConfig) -> dict[str, _Name]:
    experts = range(config.experts.expert_num)
    many = [f"_l.{e}" for e in experts] if len(experts) > 1 else [""]
    down = [""] if config.adapters["p_adapter"].hydra else many
    names = {
        "adapters.p_adapter.down": _Name([f"p_adapter.down_proj{e}.weight" for e in down]),
        "adapters.p_adapter.down_bias": _Name([f"p_adapter.down_proj{e}.bias" for e in down]),
        "adapters.p_adapter.up": _Name([f"p_adapter.up_proj{e}.weight" for e in many], 1),
        "adapters.p_adapter.up_bias": _Name([f"p_adapter.up_proj{e}.bias" for e in many], shape=(-1,)),
    }
    return names | _router_names(config, "adapters.p_adapter", "p_adapter.router")


def _router_names(config: AdapterConfig, ours: str, theirs: str) -> dict[str, _Name]:
    """Of the router of an adapter's experts."""
    ours, kind = f"{ours}.expert_router", config.experts.expert_router
    if config.experts.expert_num == 1:
        return {}
    if kind == "soft" and ".lora_" in theirs:
        return {f"{ours}.linear.weight": _Name([f"{theirs}.weight"])}
    linear, other, their_other = {
        "soft": (theirs, None, None),
        "topk": (f"{theirs}.topkroute_linear", "noise", f"{theirs}.noise_linear"),
        "adamole": (theirs, "threshold", theirs.replace(".router", ".threshold_fn")),
    }[kind]
    names = {f"{ours}.linear.{p}": _Name([f"{linear}.{p}"]) for p in ("weight", "bias")}
    if kind == "adamole" or (kind == "topk" and config.experts.noisy_router):
        names |= {f"{ours}.{other}.{p}": _Name([f"{their_other}.{p}"]) for p in ("weight", "bias")}
    return names
