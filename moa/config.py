"""The configuration of a model's adapters: which stand where, and which router weighs them. Needs no torch.

A method is a preset of options (`moa.methods.METHODS`), nothing else. The flat dictionary of all flags
(`AdapterConfig.to_dict`) is what `adapter_params.json` holds.
"""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from moa.methods import (
    ADAPTERS,
    BLOCK_ROUTERS,
    EXPERT_ROUTERS,
    METHODS,
    SECTIONS,
    TARGETS,
    BiasNormConfig,
    ExpertConfig,
    RouterConfig,
    config_fields,
)
from moa.reading import safe_name, short_repr

MAX_LAYERS = 10_000
MAX_SIZE = 2**16  # of a rank, width or length: more is a slip of the hand
MAX_NUMBER = 2**53  # of anything: beyond it not every whole number is a float


@dataclass(frozen=True)
class Slot:
    """One adapter of one block: its name, its type and the target where it stands."""

    name: str
    type: str
    target: str


@dataclass(frozen=True)
class AdapterConfig:
    """All adapters of a model and how they are mixed, for a model of `n_layers` layers.

    Built by `from_dict`, which checks everything; raises ValueError naming the flag.
    """

    method: str
    n_layers: int
    adapters: Mapping[str, Any]  # kind -> its options
    router: RouterConfig = RouterConfig()
    experts: ExpertConfig = ExpertConfig()
    bias_norm: BiasNormConfig = BiasNormConfig()

    @classmethod
    def from_dict(cls, flat: Mapping[str, Any], n_layers: int) -> "AdapterConfig":
        """Configuration of `flat["method"]` with the flat dictionary's other entries on top of its preset."""
        flat = dict(flat)
        method = flat.pop("method", None)
        if not isinstance(method, str) or method not in METHODS:
            raise ValueError(f"method {short_repr(method)} is none of {', '.join(METHODS)}")
        if type(n_layers) is not int or not 1 <= n_layers <= MAX_LAYERS:
            raise ValueError(f"n_layers must be a whole number from 1 to {MAX_LAYERS}, not {short_repr(n_layers)}")
        known = config_fields()
        for name in flat:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                hint = f" (did you mean {near[0]}?)" if near else ""
                raise ValueError(f"unknown adapter setting {safe_name(name)}{hint}")
        values = METHODS[method] | flat
        if values.get("block_router") == "kinds":  # of earlier revisions
            values["block_router"] = "unipelt"
        for name, value in values.items():
            if known[name].type is float and type(value) is int:  # as JSON may have it
                values[name] = float(value) if abs(value) <= MAX_NUMBER else math.inf
            if name.endswith("_targets") and isinstance(value, str):
                values[name] = ",".join(target.strip() for target in value.split(","))
        adapters = {}
        for kind in ADAPTERS.values():
            own = {
                f.name: values[f"{kind.name}_{f.name}"]
                for f in fields(kind.options)
                if f"{kind.name}_{f.name}" in values
            }
            adapters[kind.name] = kind.options(**own)
        sections = {
            section: options(**{f.name: values[f.name] for f in fields(options) if f.name in values})
            for section, options in SECTIONS.items()
        }
        config = cls(method, n_layers, adapters, **sections)
        for name, value in config.to_dict().items():
            if name != "method":
                _check_type(name, value, known[name])
        for kind, options in adapters.items():
            adapters[kind] = replace(options, layers=_ranges(parse_layers(f"{kind}_layers", options.layers, n_layers)))
        config._check()
        return config

    def to_dict(self) -> dict[str, Any]:
        """All settings by flag name: the content of `adapter_params.json`."""
        flat = {"method": self.method}
        for name, options in self.adapters.items():
            flat |= {f"{name}_{f.name}": getattr(options, f.name) for f in fields(options)}
        for section in SECTIONS:
            flat |= asdict(getattr(self, section))
        return flat

    def _check(self) -> None:
        for name, options in self.adapters.items():
            for f in fields(options):
                value = getattr(options, f.name)
                if isinstance(value, (int, float)) and not isinstance(value, bool) and value <= 0:
                    raise ValueError(f"{name}_{f.name} must be above 0, not {value}")
                if isinstance(value, int) and value > MAX_SIZE:
                    raise ValueError(f"{name}_{f.name} must be at most {MAX_SIZE}, not {value}")
            self._targets(name)
        if not 0 <= self.router.swi_x <= MAX_SIZE:
            raise ValueError(f"swi_x must be from 0 to {MAX_SIZE}, not {self.router.swi_x}")
        if not 0 < self.router.max_threshold <= 1:
            raise ValueError(f"max_threshold must be above 0 and at most 1, not {self.router.max_threshold}")
        if not (self.bias_norm.train_bias_norm or any(self.slots(layer) for layer in range(self.n_layers))):
            raise ValueError(f"method {self.method} with these layers has no adapter: nothing would be trained")
        experts = self.experts
        if not 1 <= experts.expert_num <= MAX_SIZE:
            raise ValueError(f"expert_num must be from 1 to {MAX_SIZE}, not {experts.expert_num}")
        if experts.expert_router == "topk" and experts.expert_num > 1 and experts.top_k > experts.expert_num:
            raise ValueError(f"top_k {experts.top_k} is more than the {experts.expert_num} experts (expert_num)")
        if experts.expert_num == 1 < METHODS[self.method].get("expert_num", 1):
            raise ValueError(f"expert_num 1: method {self.method} is a mixture of experts, it needs two or more")
        if experts.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {experts.top_k}")
        if experts.lb_loss_coeff < 0:
            raise ValueError(f"lb_loss_coeff must be 0 or more, not {experts.lb_loss_coeff}")

    def active_fields(self) -> set[str]:
        """The settings that this configuration reads, by flag name; the others change nothing."""
        kinds = [name for name, options in self.adapters.items() if options.layers]
        names = {"train_bias_norm"} | {f"{name}_layers" for name in self.adapters}
        names |= {f"{name}_{f.name}" for name in kinds for f in fields(self.adapters[name])}
        if kinds:
            names |= {"block_router", "expert_num"} | set(BLOCK_ROUTERS[self.router.block_router].uses)
        if self.router.const_threshold:
            names.discard("threshold_gradient")
        if kinds and self.experts.expert_num > 1:
            return names | {"expert_router"} | set(EXPERT_ROUTERS[self.experts.expert_router].uses)
        return names - {f"{name}_hydra" for name in kinds}

    def unused_flag_message(self, given: set[str]) -> str | None:
        """A sentence about the first flag in `given` that this configuration does not use, else None."""
        unused = sorted(given & (config_fields().keys() - self.active_fields()))
        if not unused:
            return None
        name, absent = unused[0], [kind for kind, options in self.adapters.items() if not options.layers]
        for kind in absent:
            if name.startswith(f"{kind}_"):
                return f"--{name} has no effect: method {self.method} has no such adapter (--{kind}_layers adds it)"
        if len(absent) == len(self.adapters):
            return f"--{name} has no effect: there is no adapter in any layer"
        if name in asdict(self.router):
            what = f"--block_router {self.router.block_router}"
        elif self.experts.expert_num > 1:
            what = f"--expert_router {self.experts.expert_router}"
        else:
            what = "--expert_num 1"
        return f"--{name} has no effect with {what} (method {self.method})"

    def _targets(self, kind: str) -> list[str]:
        options, allowed = self.adapters[kind], ADAPTERS[kind].targets
        if not hasattr(options, "targets"):
            return list(allowed)
        wanted = options.targets.split(",")
        for target in wanted:
            if target not in allowed:
                raise ValueError(f"{kind}_targets: {short_repr(target)} is none of {', '.join(allowed)}")
        if len(set(wanted)) < len(wanted):
            raise ValueError(f"{kind}_targets: {short_repr(options.targets)} names a target twice")
        return [target for target in allowed if target in wanted]

    @cached_property
    def _layers(self) -> dict[str, set[int]]:
        return {n: set(parse_layers(f"{n}_layers", k.layers, self.n_layers)) for n, k in self.adapters.items()}

    def slots(self, layer: int) -> list[Slot]:
        """The adapters of one block, in the order of its router's outputs."""
        slots = [
            Slot(ADAPTERS[kind].slot(target), kind, target)
            for kind in self.adapters
            if layer in self._layers[kind]
            for target in self._targets(kind)
        ]
        return sorted(slots, key=lambda slot: TARGETS.index(slot.target))


def _check_type(name: str, value: Any, spec: Any) -> None:
    wanted = (int, float) if spec.type is float else spec.type
    if not isinstance(value, wanted) or (isinstance(value, bool) and spec.type is not bool):
        raise ValueError(f"{name} must be of type {spec.type.__name__}, not {short_repr(value)}")
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise ValueError(f"{name} is too large: {short_repr(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, not {value}")
    choices = spec.metadata.get("choices")
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {short_repr(value)}")


def parse_layers(name: str, text: str, n_layers: int) -> list[int]:
    """Layer numbers of "all", "" or ranges such as "0-8,24-32" (end excluded, "0-0" is empty)."""
    if text == "all":
        return list(range(n_layers))
    layers: set[int] = set()
    for part in text.split(",") if text else []:
        begin, _, end = part.strip().partition("-")
        if not all(re.fullmatch("[0-9]{1,9}", number) for number in (begin, end)):
            raise ValueError(f"{name}: {short_repr(part)} is not a range such as 0-8 (end excluded)")
        first, last = int(begin), int(end)
        if first > last:
            raise ValueError(f"{name}: {short_repr(part)} ends before it begins")
        if last > n_layers:
            raise ValueError(f"{name}: {short_repr(part)} goes beyond the model's {n_layers} layers (0-{n_layers})")
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
