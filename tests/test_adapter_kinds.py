"""A kind of adapter that the project does not know needs a module and one registration, nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama import Llama
from moa.adapter import AdapterModule, Target, normal
from moa.config import AdapterConfig, Slot
from moa.methods import ADAPTERS, BLOCK_ROUTERS, EXPERT_ROUTERS, RouterType, option, register_adapter
from moa.state import adapter_state_dict, count_parameters, load_adapter_state_dict, optimizer_groups
from tiny import ARGS, BASE, METHODS, gradients, random_state, save, tokens


@dataclass(frozen=True)
class ScaleConfig:
    """A trained factor per component, at linear layers as wide as their input."""

    layers: str = option("", "layers with a scale")
    targets: str = option("Q,O", "linear layers with a scale")
    factor: float = option(1.0, "weight of all scales")


class Scale(AdapterModule):
    """y + g * factor * s * x"""

    def __init__(self, target: Target, config: AdapterConfig):
        super().__init__()
        assert target.in_features == target.out_features
        self.factor = config.adapters["scale"].factor
        self.add_parameter("s", (target.in_features,), normal)

    def forward(self, x: Tensor, output: Tensor, gate: Tensor | None) -> Tensor:
        y = self.factor * self.s.to(x.dtype) * x
        return output + (y if gate is None else y * gate)


@pytest.fixture
def scale(monkeypatch) -> Iterator[None]:
    monkeypatch.setitem(ADAPTERS, "scale", None)  # taken out again at the end of the test
    register_adapter("scale", ScaleConfig, f"{__name__}:Scale", ("Q", "O"))
    yield


@pytest.mark.parametrize("flat", [{"method": "lora", "lora_layers": ""}, METHODS["soft_moa"], METHODS["sparse_moa"]])
def test_a_new_kind_of_adapter_needs_one_registration(flat: dict, scale: None, tmp_path: Path) -> None:
    config = AdapterConfig.from_dict(flat | {"scale_layers": "1-3", "scale_factor": 0.5}, ARGS.n_layers)
    llm, batch = Llama.build(BASE, config=config, device="cpu"), tokens(2, 6)
    model = llm.model
    assert count_parameters(model)["scale_Q"] == count_parameters(model)["scale_O"] == 2 * 64
    slots = [slot.name for slot in config.slots(1)]
    assert {"scale_Q", "scale_O"} <= set(slots)
    if model.layers[1].router is not None:
        assert set(model.layers[1].router(torch.zeros(1, 64))) == set(slots)
    key = "layers.1.attention.adapters.scale_Q.s"
    before = adapter_state_dict(model)[key]
    assert before.any()
    optimizer = torch.optim.SGD(optimizer_groups(model, 0.0), lr=0.5)
    losses = []
    for _ in range(3):
        loss = model.loss(batch, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0] and not torch.equal(adapter_state_dict(model)[key], before)
    other = Llama.build(BASE, save(llm, tmp_path / "out"), device="cpu", seed=8)
    assert torch.equal(other.model(batch), model(batch))
    assert llm.generate([[256, 3, 4]], 4) == other.generate([[256, 3, 4]], 4)


class LastRouter(AdapterModule):
    """All the weight to the last of a block's adapters, times a trained number."""

    def __init__(self, slots: list[Slot], dim: int, config: AdapterConfig):
        super().__init__()
        self.slots = [slot.name for slot in slots]
        self.add_parameter("factor", (1,), normal)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        gates = {slot: torch.zeros(len(x), 1) for slot in self.slots}
        return gates | {self.slots[-1]: self.factor.expand(len(x), 1)}


class FirstExpert(AdapterModule):
    """All the weight to the first expert, times a trained number."""

    def __init__(self, target: Target, config: AdapterConfig, softmax_bias: bool):
        super().__init__()
        self.weight = torch.zeros(config.experts.expert_num)
        self.weight[0] = 1
        self.add_parameter("factor", (1,), normal)

    def forward(self, u: Tensor) -> tuple[Tensor, None]:
        return (self.factor * self.weight).expand(len(u), -1), None


@pytest.mark.parametrize("kind", ["block_router", "expert_router"])
def test_a_new_router_needs_one_registration(kind: str, monkeypatch, tmp_path: Path) -> None:
    if kind == "block_router":
        monkeypatch.setitem(BLOCK_ROUTERS, "last", RouterType(f"{__name__}:LastRouter", ()))
        flat = METHODS["soft_moa"] | {"method": "custom", "block_router": "last"}
    else:
        monkeypatch.setitem(EXPERT_ROUTERS, "first", RouterType(f"{__name__}:FirstExpert", ()))
        flat = METHODS["molora"] | {"expert_router": "first"}
    llm = Llama.build(BASE, config=AdapterConfig.from_dict(flat, ARGS.n_layers), device="cpu")
    load_adapter_state_dict(llm.model, random_state(llm.model), "random")
    model, batch = llm.model, tokens(2, 6)
    keys = {key for key in adapter_state_dict(model) if key.endswith("router.factor")}
    assert len(keys) == (3 if kind == "block_router" else 21)
    model.loss(batch, batch).backward()
    moved = {key for key, grad in gradients(model).items() if grad.any()}
    assert keys <= moved
    other = Llama.build(BASE, save(llm, tmp_path / "out"), device="cpu", seed=8)
    assert torch.equal(other.model(batch), model(batch))
    assert llm.generate([[256, 3, 4]], 4) == other.generate([[256, 3, 4]], 4)


def test_the_new_kinds_were_taken_out_again() -> None:
    assert "last" not in BLOCK_ROUTERS and "first" not in EXPERT_ROUTERS
    assert "scale" not in ADAPTERS
    with pytest.raises(ValueError, match="unknown adapter setting scale_layers"):
        AdapterConfig.from_dict({"method": "lora", "scale_layers": "all"}, 3)
