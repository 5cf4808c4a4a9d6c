"""The format of the adapters that the paper's authors published: their flags and key names, to ours.

Their `adapter_params.json` holds the flags of their training script and no method; which method it was follows from
the flags and the tensors.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

PREFIX = "llama."
_TARGETS = {
    **{t: ("attention", t) for t in ("Q", "K", "V", "O")},
    **{f"FFN_{t}": ("feed_forward", t) for t in ("UP", "GATE", "DOWN")},
}
_ROUTER = ("weight", "bias", *(f"{w}.{p}" for w in ("w1", "w2", "w3") for p in ("weight", "bias")))
# Our key within a layer -> theirs.
_NAMES = (
    {
        f"{part}.adapters.lora_{target}.{ab}": f"{part}.lora_{short}.lora_{ab}.weight"
        for target, (part, short) in _TARGETS.items()
        for ab in "AB"
    }
    | {"attention.adapters.prompt.P": "attention.prompt.weight", "attention.adapters.prompt.z": "attention.prompt_gate"}
    | {
        f"adapters.p_adapter.{way}{ours}": f"p_adapter.{way}_proj.{theirs}"
        for way in ("down", "up")
        for ours, theirs in (("", "weight"), ("_bias", "bias"))
    }
    | {f"router.router.{name}": f"adapter_type_router.{name}" for name in _ROUTER}
    | {f"router.threshold.{name}": f"adapter_threshold_fn.{name}" for name in ("weight", "bias")}
)
_OURS = {theirs: ours for ours, theirs in _NAMES.items()}


def is_authors(params: Mapping[str, Any]) -> bool:
    """Whether an `adapter_params.json` is the authors' (ours names its method)."""
    return "method" not in params and "lora_layers" in params


def settings(params: Mapping[str, Any], keys: list[str]) -> dict[str, Any]:
    """Our flat configuration for the authors' flags and tensor names. ValueError for what is not supported."""
    if params.get("w_bias"):
        raise ValueError("an adapter with w_bias (trained biases and norms) is not supported")
    if int(params.get("expert_num", 1)) > 1:
        raise ValueError(f"an adapter with expert_num {params['expert_num']} is not supported")
    routed = any("adapter_type_router" in key for key in keys)
    if any(".lora_gate." in key for key in keys):
        raise ValueError("a UniPEFT adapter is not supported")
    flat = {name: params[name] for name in ("lora_layers", "p_adapter_layers", "prompt_layers")}
    flat |= {name: params[name] for name in ("lora_targets", "lora_rank", "p_adapter_size", "prompt_len")}
    flat["lora_alpha"] = float(params["lora_alpha"])
    if routed and "max_threshold" in params:
        flat |= {"method": "sparse_moa", "max_threshold": float(params["max_threshold"])}
        flat |= {"const_threshold": bool(params.get("const_threshold", False)), "swi_x": params["swi_x"]}
        return flat
    if routed:
        return flat | {"method": "soft_moa", "swi_x": params["swi_x"]}
    for method, layers in (
        ("lora", "lora_layers"),
        ("prompt", "prompt_layers"),
        ("parallel_adapter", "p_adapter_layers"),
    ):
        first, _, last = str(params[layers]).partition("-")
        if first != last:
            return flat | {"method": method}
    raise ValueError("adapter_params.json selects no layer for any adapter")


def our_key(key: str) -> str:
    """Their key -> ours. ValueError for one that is unknown."""
    match = re.fullmatch(r"llama\.layers\.(\d+)\.(.+)", key)
    if not match or match[2] not in _OURS:
        raise ValueError(f"unknown tensor {key}")
    return f"layers.{match[1]}.{_OURS[match[2]]}"


def their_key(key: str) -> str:
    """Inverse of `our_key`."""
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", key)
    assert match, key
    return f"{PREFIX}layers.{match[1]}.{_NAMES[match[2]]}"


def our_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors under our keys, in our shapes: the prompt's scale (1, H, 1, 1) becomes (H,)."""
    ours = {our_key(key): tensor for key, tensor in state.items()}
    return {key: t.flatten() if key.endswith("prompt.z") else t for key, t in ours.items()}
