"""What a method is: which adapters stand where, and which router weighs them. Needs no torch.

A method is a preset of knobs (`METHODS`), nothing else. Every knob is declared once, here, as a field of a knobs class;
its command-line flag is `<adapter>_<field>` for an adapter's knob (`lora_rank`, `prompt_len`) and `<field>` for the
rest (`swi_x`). The flat dictionary of all flags (`AdapterConfig.flat`) is what `adapter_params.json` holds.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

# The places of a block where an adapter can stand, in the order of the router's outputs. Those named like a linear
# layer are beside it; "attention" adds to the heads' output before W_o, "block" to the block's output.
SITES = ("Q", "K", "V", "attention", "O", "FFN_UP", "FFN_GATE", "FFN_DOWN", "block")
MAX_SIZE = 2**16  # of a rank, width or length: more is a slip of the hand

LINEAR_SITES = tuple(s for s in SITES if s not in ("attention", "block"))


def knob(default: Any, help: str, choices: tuple | None = None) -> Any:
    """A dataclass field with the metadata that the command line shows."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class LoRAKnobs:
    """Low-rank updates beside linear layers."""

    layers: str = knob("", "layers with LoRA: all, or ranges with the end excluded, as 0-8,24-32")
    targets: str = knob("Q,K,V,O,FFN_DOWN", f"linear layers with LoRA, of {','.join(LINEAR_SITES)}")
    rank: int = knob(8, "rank of each LoRA")
    alpha: float = knob(8.0, "LoRA's scale is alpha / rank")


@dataclass(frozen=True)
class ParallelAdapterKnobs:
    """A bottleneck network beside the feed-forward block."""

    layers: str = knob("", "layers with a parallel adapter, as for --lora_layers")
    size: int = knob(16, "hidden width of each parallel adapter")


@dataclass(frozen=True)
class PromptKnobs:
    """Trained vectors that each layer's queries attend to."""

    layers: str = knob("", "layers with a prompt, as for --lora_layers")
    len: int = knob(10, "prompt vectors per layer")


@dataclass(frozen=True)
class AdapterKind:
    """A kind of adapter: `module` ("package.module:Class") is built at each chosen site of each chosen layer."""

    name: str
    knobs: type
    module: str
    sites: tuple[str, ...]

    def slot(self, site: str) -> str:
        """Name of this adapter at a site: what gates, keys and statistics call it."""
        return f"{self.name}_{site}" if len(self.sites) > 1 else self.name


ADAPTERS: dict[str, AdapterKind] = {}


def register_adapter(name: str, knobs: type, module: str, sites: tuple[str, ...]) -> None:
    """Make a kind of adapter known. `knobs` is a frozen dataclass with at least `layers` (and `targets` where the
    kind can stand at several sites); its fields become the flags `<name>_<field>`."""
    ADAPTERS[name] = AdapterKind(name, knobs, module, sites)


register_adapter("lora", LoRAKnobs, "moa.lora:LoRA", LINEAR_SITES)
register_adapter("prompt", PromptKnobs, "moa.prompt:Prompt", ("attention",))
register_adapter("p_adapter", ParallelAdapterKnobs, "moa.parallel_adapter:ParallelAdapter", ("block",))

# Routers that weigh the adapters of a block against each other, by the value of --block_router.
BLOCK_ROUTERS: dict[str, str] = {
    "none": "",
    "soft": "moa.routers:SoftRouter",
    "sparse": "moa.routers:SparseRouter",
}


@dataclass(frozen=True)
class RouterKnobs:
    """The block's router and its gates."""

    block_router: str = knob("none", "router of a block's adapters (a method sets it)", tuple(BLOCK_ROUTERS))
    swi_x: int = knob(4, "SwiGLU router with swi_x hidden units per adapter; 0: a linear router")
    max_threshold: float = knob(0.5, "sparse router: the largest threshold, G_max")
    const_threshold: bool = knob(False, "sparse router: every threshold is G_max instead of learned")
    threshold_gradient: str = knob(
        "straight_through", "sparse router: how the threshold learns (none: not at all)", ("straight_through", "none")
    )


# The methods: each a set of knobs on top of the defaults. Published sizes; "all" means every layer of the model.
_LORA = {"lora_layers": "all"}
_PROMPT = {"prompt_layers": "all"}
_P_ADAPTER = {"p_adapter_layers": "all"}
METHODS: dict[str, dict[str, Any]] = {
    "soft_moa": {**_LORA, **_PROMPT, **_P_ADAPTER, "block_router": "soft"},
    "sparse_moa": {**_LORA, **_P_ADAPTER, "block_router": "sparse"},
    "lora": {**_LORA, "lora_rank": 16, "lora_alpha": 16.0},
    "prompt": _PROMPT,
    "parallel_adapter": _P_ADAPTER,
}


@dataclass(frozen=True)
class Slot:
    """One adapter of one block: its name, its kind and the site where it stands."""

    name: str
    kind: str
    site: str


@dataclass(frozen=True)
class AdapterConfig:
    """All adapters of a model and how they are mixed, for a model of `n_layers` layers.

    Built by `from_flat`, which checks everything; raises ValueError naming the flag.
    """

    method: str
    n_layers: int
    adapters: Mapping[str, Any]  # kind -> its knobs
    router: RouterKnobs = RouterKnobs()

    @classmethod
    def from_flat(cls, flat: Mapping[str, Any], n_layers: int) -> "AdapterConfig":
        """Configuration of `flat["method"]` with the flat dictionary's other entries on top of its preset."""
        flat = dict(flat)
        method = flat.pop("method", None)
        if not isinstance(method, str) or method not in METHODS:
            raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
        known = knob_fields()
        for name in flat:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ValueError(f"unknown adapter setting {name}" + (f" (did you mean {near[0]}?)" if near else ""))
        values = METHODS[method] | flat
        adapters = {}
        for kind in ADAPTERS.values():
            own = {
                f.name: values[f"{kind.name}_{f.name}"] for f in fields(kind.knobs) if f"{kind.name}_{f.name}" in values
            }
            adapters[kind.name] = kind.knobs(**own)
        router = RouterKnobs(**{f.name: values[f.name] for f in fields(RouterKnobs) if f.name in values})
        for name, value in cls(method, n_layers, adapters, router).flat().items():
            if name != "method":
                _check_type(name, value, known[name])
        adapters = {
            name: replace(knobs, layers=_ranges(parse_layers(f"{name}_layers", knobs.layers, n_layers)))
            for name, knobs in adapters.items()
        }
        config = cls(method, n_layers, adapters, router)
        config._check()
        return config

    def flat(self) -> dict[str, Any]:
        """All settings by flag name: the content of `adapter_params.json`."""
        flat = {"method": self.method}
        for name, knobs in self.adapters.items():
            flat |= {f"{name}_{f.name}": getattr(knobs, f.name) for f in fields(knobs)}
        return flat | {f.name: getattr(self.router, f.name) for f in fields(RouterKnobs)}

    def _check(self) -> None:
        for name, knobs in self.adapters.items():
            for f in fields(knobs):
                value = getattr(knobs, f.name)
                if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
                    raise ValueError(f"{name}_{f.name} must be above 0, not {value}")
                if isinstance(value, int) and value > MAX_SIZE:
                    raise ValueError(f"{name}_{f.name} must be at most {MAX_SIZE}, not {value}")
            self._sites(name)
        if not 0 <= self.router.swi_x <= MAX_SIZE:
            raise ValueError(f"swi_x must be from 0 to {MAX_SIZE}, not {self.router.swi_x}")
        if not 0 < self.router.max_threshold <= 1:
            raise ValueError(f"max_threshold must be above 0 and at most 1, not {self.router.max_threshold}")
        if not any(self.slots(layer) for layer in range(self.n_layers)):
            raise ValueError(f"method {self.method} with these layers has no adapter: nothing would be trained")
        if self.router.block_router == "sparse" and self.adapters["prompt"].layers:
            raise ValueError("prompt_layers: a sparse router cannot switch a prompt off per token; leave prompts out")

    def without_effect(self, given: set[str]) -> str | None:
        """A sentence about the first flag in `given` that this configuration does not use, else None."""
        for name, knobs in self.adapters.items():
            for f in fields(knobs):
                if f"{name}_{f.name}" in given and f.name != "layers" and not knobs.layers:
                    hint = f"method {self.method} has no such adapter (--{name}_layers adds it)"
                    return f"--{name}_{f.name} has no effect: {hint}"
        router = self.router.block_router
        if "swi_x" in given and router == "none":
            return f"--swi_x has no effect: method {self.method} has no router"
        for name in ("max_threshold", "const_threshold", "threshold_gradient"):
            if name in given and router != "sparse":
                return f"--{name} has no effect: only the sparse router has a threshold"
        if "threshold_gradient" in given and self.router.const_threshold:
            return "--threshold_gradient has no effect: with --const_threshold nothing is learned"
        return None

    def _sites(self, kind: str) -> list[str]:
        knobs, allowed = self.adapters[kind], ADAPTERS[kind].sites
        if not hasattr(knobs, "targets"):
            return list(allowed)
        wanted = [t.strip() for t in knobs.targets.split(",")]
        for target in wanted:
            if target not in allowed:
                raise ValueError(f"{kind}_targets: {target!r} is none of {', '.join(allowed)}")
        if len(set(wanted)) < len(wanted):
            raise ValueError(f"{kind}_targets: {knobs.targets!r} names a target twice")
        return [site for site in allowed if site in wanted]

    @cached_property
    def _layers(self) -> dict[str, set[int]]:
        return {n: set(parse_layers(f"{n}_layers", k.layers, self.n_layers)) for n, k in self.adapters.items()}

    def slots(self, layer: int) -> list[Slot]:
        """The adapters of one block, in the order of its router's outputs."""
        found = [
            Slot(ADAPTERS[kind].slot(site), kind, site)
            for kind in self.adapters
            if layer in self._layers[kind]
            for site in self._sites(kind)
        ]
        return sorted(found, key=lambda slot: SITES.index(slot.site))


def knob_fields() -> dict[str, Any]:
    """Every flag of the adapter configuration -> its dataclass field (type, default, help, choices)."""
    flags = {f"{kind.name}_{f.name}": f for kind in ADAPTERS.values() for f in fields(kind.knobs)}
    return flags | {f.name: f for f in fields(RouterKnobs)}


def _check_type(name: str, value: Any, spec: Any) -> None:
    wanted = (int, float) if spec.type is float else spec.type
    if not isinstance(value, wanted) or (isinstance(value, bool) and spec.type is not bool):
        raise ValueError(f"{name} must be of type {spec.type.__name__}, not {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
    choices = spec.metadata.get("choices")
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def parse_layers(name: str, text: str, n_layers: int) -> list[int]:
    """Layer numbers of "all", "" or ranges such as "0-8,24-32" (end excluded, "0-0" is empty)."""
    if text == "all":
        return list(range(n_layers))
    layers: set[int] = set()
    for part in text.split(",") if text else []:
        begin, dash, end = part.strip().partition("-")
        # isdecimal alone would let other scripts' digits through
        if not (dash and begin.isascii() and end.isascii() and begin.isdecimal() and end.isdecimal()):
            raise ValueError(f"{name}: {part!r} is not a range such as 0-8 (end excluded)")
        first, last = int(begin), int(end)
        if first > last:
            raise ValueError(f"{name}: {part!r} ends before it begins")
        if last > n_layers:
            raise ValueError(f"{name}: {part!r} goes beyond the model's {n_layers} layers (0-{n_layers})")
        layers |= set(range(first, last))
    return sorted(layers)


def _ranges(layers: list[int]) -> str:
    """Inverse of `parse_layers`: [0, 1, 2, 5] -> "0-3,5-6"."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and parts[-1][1] == layer:
            parts[-1][1] = layer + 1
        else:
            parts.append([layer, layer + 1])
    return ",".join(f"{a}-{b}" for a, b in parts)
