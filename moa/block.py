"""The adapters of a transformer block, composed from the configuration, and how they are applied."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from moa.adapter import AdapterModule, Target
from moa.bias_norm import BIASED_TARGETS, TrainableBias
from moa.config import AdapterConfig, Slot
from moa.expert_routers import RouterStats
from moa.methods import ADAPTERS, BLOCK_ROUTERS, META_NAMES, import_class
from moa.routers import Gates


@dataclass
class Routing:
    """The gates of a block's adapters in one forward pass, (N, 1) by slot; an ungated adapter has no entry.

    stats: filled by the routers of experts on the way.
    """

    gates: Gates
    stats: list[RouterStats] = field(default_factory=list)


def layer_name(target: str) -> str:
    """What `AdapterDict.apply` calls a target: "Q" -> "wq", "attention" -> "attention"."""
    return META_NAMES.get(target, target).rpartition(".")[2]


class AdapterDict(nn.ModuleDict):
    """Adapters at some targets of a block, by slot name. targets: by name of the base layer ("wq", ...), or
    "attention" (the heads' output before wo), or "block" (the block's output)."""

    def __init__(self, config: AdapterConfig | None, slots: list[Slot], targets: dict[str, Target]):
        super().__init__()
        self.targets = targets
        self.slots_at: dict[str, list[str]] = {name: [] for name in targets}
        for slot in slots:
            name = layer_name(slot.target)
            if name in targets:
                self[slot.name] = import_class(ADAPTERS[slot.type].module)(targets[name], config)
                self.slots_at[name].append(slot.name)
        if config is not None and config.train_bias_norm:
            for target in BIASED_TARGETS:
                name = layer_name(target)
                if name in targets:
                    self[f"bias_{target}"] = TrainableBias(targets[name])
                    self.slots_at[name].append(f"bias_{target}")

    def at(self, *names: str) -> list[AdapterModule]:
        """The adapters at these targets."""
        return [self[slot] for name in names for slot in self.slots_at[name]]

    def apply(self, name: str, output: Tensor, x: Tensor, routing: Routing, *inputs: Tensor) -> Tensor:
        """`output` of target `name` for input x (N, in), with what its adapters add.

        Each is weighed by its gate times the weights of its experts, (N, E). inputs: what else adapters there read.
        """
        for slot in self.slots_at[name]:
            adapter, gate = self[slot], routing.gates.get(slot)
            if adapter.expert_router is not None:
                weights, stats = adapter.expert_router(x)
                gate = weights if gate is None else gate * weights
                if stats is not None:
                    routing.stats.append(stats)
            output = adapter(x, output, gate, *inputs)
        return output


def build_router(config: AdapterConfig | None, slots: list[Slot], dim: int) -> AdapterModule | None:
    """The router of a block with these adapters; None where the method has none or the block nothing to route."""
    if config is None or not slots or config.block_router == "none":
        return None
    return import_class(BLOCK_ROUTERS[config.block_router].module)(slots, dim, config)
