"""The adapters of a transformer block, composed from the configuration."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from moa.adapter import AdapterModule, Site
from moa.base import BIASED_SITES, Bias
from moa.config import AdapterConfig, Slot
from moa.knobs import ADAPTERS, BLOCK_ROUTERS
from moa.load import load_class
from moa.routers import Gates


@dataclass
class Mixing:
    """How a block's adapters are weighed in one forward pass. gates: of the block's router, (N, 1) by slot; ungated
    adapters have no entry. balance: where the load-balancing losses of the routers of experts gather."""

    gates: Gates
    balance: list[Tensor] = field(default_factory=list)


class Adapters(nn.ModuleDict):
    """Those of a block's adapters that stand at some of its sites, by slot name."""

    def __init__(self, config: AdapterConfig | None, slots: list[Slot], sites: dict[str, Site]):
        super().__init__()
        self.slots_at: dict[str, list[str]] = {name: [] for name in sites}
        if config is not None and config.base.train_bias_norm:
            for name in (name for name in sites if name in BIASED_SITES):
                self[f"bias_{name}"] = Bias(sites[name])
                self.slots_at[name].append(f"bias_{name}")
        for slot in slots:
            if slot.site in sites:
                self[slot.name] = load_class(ADAPTERS[slot.kind].module)(sites[slot.site], config)
                self.slots_at[slot.site].append(slot.name)

    def add(self, site: str, output: Tensor, mixing: Mixing, *inputs) -> Tensor:
        """`output` plus what the adapters at `site` make of `inputs`, each weighed by its gate times the weights of its
        experts, (N, E). The first of the inputs is what the routers of experts look at."""
        for slot in self.slots_at[site]:
            adapter, gate = self[slot], mixing.gates.get(slot)
            if adapter.expert_router is not None:
                weights, balance = adapter.expert_router(inputs[0])
                gate = weights if gate is None else gate * weights
                if balance is not None:
                    mixing.balance.append(balance)
            output = output + adapter(*inputs, gate)
        return output


def build_router(config: AdapterConfig | None, slots: list[Slot], dim: int) -> AdapterModule | None:
    """The router of a block with these adapters; None where the method has none, or the block nothing to route."""
    if config is None or not slots or config.router.block_router == "none":
        return None
    return load_class(BLOCK_ROUTERS[config.router.block_router].module)(slots, dim, config)
