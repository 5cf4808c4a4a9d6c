"""The adapters of a transformer block, composed from the configuration."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from moa.adapter import AdapterModule, Deriving, Target, narrow_type, project_in, reads_of, shared_out, stacked
from moa.bias_norm import BIASED_TARGETS, TrainableBias
from moa.config import AdapterConfig, Slot
from moa.expert_routers import RouterStats
from moa.load import load_class
from moa.methods import ADAPTERS, BLOCK_ROUTERS
from moa.routers import Gates


@dataclass
class Mixing:
    """How a block's adapters are weighed in one forward pass. gates: of the block's router, (N, 1) by slot; ungated
    adapters have no entry. balance: what the load-balancing losses of the routers of experts are made of."""

    gates: Gates
    balance: list[RouterStats] = field(default_factory=list)


class Read(NamedTuple):
    """An input u (N, in) of some sites, and what those that stand there read of it (`AdapterModule.reads`); no u where
    they all want no more than that."""

    u: Tensor | None
    products: dict[AdapterModule, tuple[Tensor, ...]]

    def by(self, module: AdapterModule) -> tuple[Tensor, ...]:
        return self.products.get(module) or (self.u,)


class AdapterDict(nn.ModuleDict, Deriving):
    """Those of a block's adapters that stand at some of its sites, by slot name."""

    def __init__(self, config: AdapterConfig | None, slots: list[Slot], sites: dict[str, Target]):
        super().__init__()
        self.sites = sites
        self.slots_at: dict[str, list[str]] = {name: [] for name in sites}
        if config is not None and config.base.train_bias_norm:
            for name in (name for name in sites if name in BIASED_TARGETS):
                self[f"bias_{name}"] = TrainableBias(sites[name])
                self.slots_at[name].append(f"bias_{name}")
        for slot in slots:
            if slot.site in sites:
                self[slot.name] = load_class(ADAPTERS[slot.kind].module)(sites[slot.site], config)
                self.slots_at[slot.site].append(slot.name)

    def at(self, *sites: str) -> list[AdapterModule]:
        """What stands there: adapters and their routers of experts."""
        standing = [self[slot] for site in sites for slot in self.slots_at[site]]
        return [module for adapter in standing for module in (adapter, adapter.expert_router) if module is not None]

    def read(self, u: Tensor, *sites: str, others: Sequence[AdapterModule] = ()) -> Read:
        """What all that stands at `sites`, which share the input u (N, in), reads of it, and `others` of another
        `Adapters` beside them: one product of their weights, one above the other."""
        readers = [*self.at(*sites), *others]
        weights = reads_of(readers)
        if not weights:
            return Read(u, {})
        dtype = narrow_type(self, u)
        stack = self.derived((sites, dtype), lambda: stacked(weights, dtype))
        return Read(u, shared_out(project_in(self.sites[sites[0]], u.to(dtype), stack), readers))

    def add(self, site: str, output: Tensor, mixing: Mixing, read: Read, *inputs) -> Tensor:
        """`output` with what the adapters at `site` add to it, each weighed by its gate times the weights of its
        experts, (N, E); it may be changed in its place. read: of the site's input; inputs: what else there is."""
        for slot in self.slots_at[site]:
            adapter, gate = self[slot], mixing.gates.get(slot)
            if adapter.expert_router is not None:
                weights, balance = adapter.expert_router(*read.by(adapter.expert_router))
                gate = weights if gate is None else gate * weights
                if balance is not None:
                    mixing.balance.append(balance)
            output = adapter(output, *read.by(adapter), *inputs, gate)
        return output


def build_router(config: AdapterConfig | None, slots: list[Slot], dim: int) -> AdapterModule | None:
    """The router of a block with these adapters; None where the method has none, or the block nothing to route."""
    if config is None or not slots or config.router.block_router == "none":
        return None
    return load_class(BLOCK_ROUTERS[config.router.block_router].module)(slots, dim, config)
