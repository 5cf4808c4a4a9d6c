"""The configuration of a model's adapters: which stand where, and which router weighs them. Needs no torch.

A method is a preset of options (`moa.methods.METHODS`), nothing else. The flat dictionary of all flags
(`AdapterConfig.to_dict`) is what `adapter_params.json` holds.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from moa.methods import (
    ADAPTERS,
    BLOCK_ROUTERS,
    EXPERT_ROUTERS,
    METHODS,
    TARGETS,
    MixtureConfig,
    config_fields,
)
from moa.reading import safe_name, short_repr

MAX_LAYERS = 10_000


@dataclass(frozen=True)
class Slot:
    """One adapter of one block: its name, its type and the target where it stands."""

    name: str
    type: str
    target: str


@dataclass(frozen=True, kw_only=True)
class AdapterConfig(MixtureConfig):
    """All adapters of a model and how they are mixed, for a model of `n_layers` layers. Built by `from_dict`.

    adapters: the options of each type of adapter, by its name.
    """

    method: str
    n_layers: int
    adapters: Mapping[str, Any]

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any], n_layers: int) -> "AdapterConfig":
        """Configuration of `flat["method"]`: its preset, with the other entries of `flat` on top.

        Raises ValueError naming the setting that is unknown, of the wrong type or out of range.
        """
        method, known = flat.get("method"), config_fields()
        if not isinstance(method, str) or method not in METHODS:
            raise ValueError(f"method {short_repr(method)} is none of {', '.join(METHODS)}")
        if type(n_layers) is not int or not 1 <= n_layers <= MAX_LAYERS:
            raise ValueError(f"n_layers must be a whole number from 1 to {MAX_LAYERS}, not {short_repr(n_layers)}")
        for name in flat.keys() - known.keys() - {"method"}:
            near = difflib.get_close_matches(name, known, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"unknown adapter setting {safe_name(name)}{hint}")
        values = {name: f.default for name, f in known.items()} | METHODS[method] | dict(flat)
        if values["block_router"] == "kinds":  # the name until revision 79f64d3
            values["block_router"] = "unipelt"
        for name, f in known.items():
            check_value(name, values[name], f)
            values[name] = f.type(values[name])  # a whole number may stand for a float
            if name.endswith("_targets"):
                values[name] = values[name].replace(" ", "")
            elif name.endswith("_layers"):
                values[name] = format_layers(parse_layers(name, values[name], n_layers))

        def chosen(options: type, prefix: str = "") -> dict[str, Any]:
            return {f.name: values[prefix + f.name] for f in fields(options)}

        adapters = {name: kind.options(**chosen(kind.options, f"{name}_")) for name, kind in ADAPTERS.items()}
        config = cls(method=method, n_layers=n_layers, adapters=adapters, **chosen(MixtureConfig))
        config._check()
        return config

    def to_dict(self) -> dict[str, Any]:
        """All settings by flag name: the content of `adapter_params.json`."""
        flat = {"method": self.method}
        for name, options in self.adapters.items():
            flat |= {f"{name}_{key}": value for key, value in asdict(options).items()}
        return flat | {f.name: getattr(self, f.name) for f in fields(MixtureConfig)}

    def at_layer(self, layer: int) -> "AdapterConfig":
        """This configuration as one layer has it: `layer_experts` gives its number of experts."""
        if not self.layer_experts:
            return self
        by_depth = self.layer_experts.split(",")
        return replace(self, expert_num=int(by_depth[layer * len(by_depth) // self.n_layers]))

    def slots(self, layer: int) -> list[Slot]:
        """The adapters of one block, in the order of its router's outputs."""
        slots = [
            Slot(f"{name}_{target}" if len(ADAPTERS[name].targets) > 1 else name, name, target)
            for name in self.adapters
            if layer in self._layers[name]
            for target in self._targets(name)
        ]
        return sorted(slots, key=lambda slot: TARGETS.index(slot.target))

    @cached_property
    def _layers(self) -> dict[str, set[int]]:
        return {name: parse_layers(name, options.layers, self.n_layers) for name, options in self.adapters.items()}

    def _targets(self, name: str) -> list[str]:
        allowed = ADAPTERS[name].targets
        chosen = getattr(self.adapters[name], "targets", ",".join(allowed)).split(",")
        for target in chosen:
            if target not in allowed:
                raise ValueError(f"{name}_targets: {short_repr(target)} is none of {', '.join(allowed)}")
            if chosen.count(target) > 1:
                raise ValueError(f"{name}_targets: {short_repr(target)} occurs twice")
        return chosen

    def _check(self) -> None:
        """Check what concerns several settings."""
        for name in self.adapters:
            self._targets(name)
        if not (self.train_bias_norm or any(self._layers.values())):
            raise ValueError(f"method {self.method} with these layers has no adapter: nothing would be trained")
        if self.layer_experts and not re.fullmatch(r"[1-9]\d{0,3}(,[1-9]\d{0,3})*", self.layer_experts):
            raise ValueError(f"layer_experts: {short_repr(self.layer_experts)} is no list such as 2,4,6,8")
        fewest = min([self.expert_num, *map(int, filter(None, self.layer_experts.split(",")))])
        if self.expert_router == "topk" and 1 < fewest < self.top_k:
            raise ValueError(f"top_k {self.top_k} is more than the {fewest} experts of an adapter")
        flylora = self.adapters["flylora"]
        if flylora.layers and flylora.top_k > flylora.rank:
            raise ValueError(f"flylora_top_k {flylora.top_k} is more than flylora_rank {flylora.rank}")
        if self.expert_num == 1 < METHODS[self.method].get("expert_num", 1):
            raise ValueError(f"expert_num 1: method {self.method} is a mixture of experts, it needs two or more")

    def active_fields(self) -> set[str]:
        """The settings that this configuration reads, by flag name; the others change nothing."""
        active, present = {"train_bias_norm"}, [name for name in self.adapters if self.adapters[name].layers]
        for name in present:
            active |= {f"{name}_{f.name}" for f in fields(self.adapters[name])} | set(ADAPTERS[name].uses)
        if present:
            active |= {"block_router", "expert_num", *BLOCK_ROUTERS[self.block_router].uses}
        if self.const_threshold:
            active.discard("threshold_gradient")
        if present and self.expert_num > 1:
            return active | {"expert_router", "layer_experts", *EXPERT_ROUTERS[self.expert_router].uses}
        return active - {f"{name}_hydra" for name in present}

    def unused_flag_message(self, given: set[str]) -> str | None:
        """A sentence about the first flag in `given` that this configuration does not use, else None."""
        layers = {f"{name}_layers" for name in self.adapters}  # which may say that there are none
        unused = sorted(given & (config_fields().keys() - self.active_fields() - layers))
        if not unused:
            return None
        for name, options in self.adapters.items():
            if unused[0].startswith(f"{name}_") and not options.layers:
                missing = f"method {self.method} has no such adapter (--{name}_layers adds it)"
                return f"--{unused[0]} has no effect: {missing}"
        settings = f"--block_router {self.block_router}, --expert_num {self.expert_num}"
        settings += f", --expert_router {self.expert_router}" if self.expert_num > 1 else ""
        return f"--{unused[0]} has no effect with method {self.method} ({settings})"


def check_value(name: str, value: Any, option: Field) -> None:
    """Raise ValueError unless an option's type, choices and bounds allow `value`."""
    expected, choices, bounds = option.type, option.metadata["choices"], option.metadata["bounds"]
    if type(value) is not expected and not (expected is float and type(value) is int):
        raise ValueError(f"{name} must be of type {expected.__name__}, not {short_repr(value)}")
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {short_repr(value)}")
    if bounds and not bounds[0] <= value <= bounds[1]:  # not a number is in no range
        raise ValueError(f"{name} must be from {bounds[0]:g} to {bounds[1]:g}, not {short_repr(value)}")


def parse_layers(name: str, text: str, n_layers: int) -> set[int]:
    """Layer numbers of "all", "" or ranges such as "0-8,24-32" (end excluded, "0-0" is empty)."""
    if text == "all":
        return set(range(n_layers))
    layers: set[int] = set()
    for part in text.split(",") if text else []:
        match = re.fullmatch("([0-9]{1,9})-([0-9]{1,9})", part.strip())
        if not match:
            raise ValueError(f"{name}: {short_repr(part)} is not a range such as 0-8 (end excluded)")
        first, end = int(match[1]), int(match[2])
        if first > end:
            raise ValueError(f"{name}: {short_repr(part)} ends before it begins")
        if end > n_layers:
            raise ValueError(f"{name}: {short_repr(part)} goes beyond the model's {n_layers} layers (0-{n_layers})")
        layers |= set(range(first, end))
    return layers


def format_layers(layers: set[int]) -> str:
    """Inverse of `parse_layers`: {0, 1, 2, 5} -> "0-3,5-6"."""
    firsts = sorted(layer for layer in layers if layer - 1 not in layers)
    ends = sorted(layer + 1 for layer in layers if layer + 1 not in layers)
    return ",".join(f"{first}-{end}" for first, end in zip(firsts, ends, strict=True))
