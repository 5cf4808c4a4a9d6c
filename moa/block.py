"""The adapters of a transformer block, composed from the configuration."""

from importlib import import_module

from torch import Tensor, nn

from moa.adapter import AdapterModule, Site
from moa.config import ADAPTERS, BLOCK_ROUTERS, AdapterConfig, Slot
from moa.routers import Gates


def _load(name: str) -> type[AdapterModule]:
    """The class behind a registered "package.module:Class"."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


class Adapters(nn.ModuleDict):
    """Those of a block's adapters that stand at some of its sites, by slot name."""

    def __init__(self, config: AdapterConfig | None, slots: list[Slot], sites: dict[str, Site]):
        super().__init__()
        self.slots_at: dict[str, list[str]] = {name: [] for name in sites}
        for slot in slots:
            if slot.site in sites:
                self[slot.name] = _load(ADAPTERS[slot.kind].module)(sites[slot.site], config)
                self.slots_at[slot.site].append(slot.name)

    def add(self, site: str, output: Tensor, gates: Gates, *inputs) -> Tensor:
        """`output` plus what the adapters at `site` make of `inputs`, each weighed by its gate (ungated: no entry)."""
        for slot in self.slots_at[site]:
            output = output + self[slot](*inputs, gates.get(slot))
        return output


def build_router(config: AdapterConfig | None, slots: list[Slot], dim: int) -> AdapterModule | None:
    """The router of a block with these adapters; None where the method has none, or the block nothing to route."""
    if config is None or not slots or config.router.block_router == "none":
        return None
    return _load(BLOCK_ROUTERS[config.router.block_router])([slot.name for slot in slots], dim, config)
