"""A kind of adapter or router that the project does not know needs a module and one registration, nothing else.

(Its gradients on several processes: test_parallel.)
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import dora
from llama import Llama
from moa.adapter import AdapterModule, Target, normal
from moa.config import AdapterConfig, Slot
from moa.methods import BLOCK_ROUTERS, EXPERT_ROUTERS, RouterType
from moa.state import adapter_state_dict, count_parameters, load_adapter_state_dict, optimizer_groups
from tiny import ARGS, BASE, METHODS, gradients, random_state, save, tokens


def require_saved_and_loaded(llm: Llama, folder: Path) -> None:
    """The adapter of `llm`, from its file, gives the same model."""
    other, batch = Llama.build(BASE, save(llm, folder), device="cpu", seed=8), tokens(2, 6)
    assert torch.equal(other.model(batch), llm.model(batch))
    assert llm.generate([[256, 3, 4]], 4) == other.generate([[256, 3, 4]], 4)


@pytest.mark.parametrize("flat", [{"method": "lora", "lora_layers": ""}, METHODS["soft_moa"], METHODS["sparse_moa"]])
def test_a_new_kind_of_adapter_needs_one_registration(flat: dict, tmp_path: Path) -> None:
    with dora.registered():
        config = AdapterConfig.from_dict(
            flat | {"my_dora_layers": "1-3", "my_dora_targets": "Q,FFN_DOWN"}, ARGS.n_layers
        )
        llm, batch = Llama.build(BASE, config=config, device="cpu"), tokens(2, 6)
        model = llm.model
        assert count_parameters(model)["my_dora_Q"] == 2 * (4 * (64 + 64) + 64)
        slots = {slot.name for slot in config.slots(1)}
        assert {"my_dora_Q", "my_dora_FFN_DOWN"} <= slots
        if model.layers[1].router is not None:
            assert set(model.layers[1].router(torch.zeros(1, 64))) == slots
        before, losses = adapter_state_dict(model), []
        optimizer = torch.optim.SGD(optimizer_groups(model, 0.0), lr=0.5)
        for _ in range(3):
            loss = model.loss(batch, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        still = [key for key, tensor in adapter_state_dict(model).items() if torch.equal(tensor, before[key])]
        assert losses[2] < losses[0] and not [key for key in still if "dora" in key]
        require_saved_and_loaded(llm, tmp_path / "out")
    with pytest.raises(ValueError, match="unknown adapter setting my_dora_layers"):
        AdapterConfig.from_dict({"method": "lora", "my_dora_layers": "all"}, 3)


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
        self.weight = torch.eye(config.expert_num)[0]
        self.add_parameter("factor", (1,), normal)

    def forward(self, u: Tensor) -> tuple[Tensor, None]:
        return (self.factor * self.weight).expand(len(u), -1), None


@pytest.mark.parametrize(
    "routers, module, flat, count",
    [
        (BLOCK_ROUTERS, "LastRouter", {**METHODS["soft_moa"], "method": "custom", "block_router": "new"}, 3),
        (EXPERT_ROUTERS, "FirstExpert", {**METHODS["molora"], "expert_router": "new"}, 21),
    ],
)
def test_a_new_router_needs_one_registration(routers, module, flat, count, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setitem(routers, "new", RouterType(f"{__name__}:{module}", ()))
    llm = Llama.build(BASE, config=AdapterConfig.from_dict(flat, ARGS.n_layers), device="cpu")
    load_adapter_state_dict(llm.model, random_state(llm.model), "random")
    llm.model.loss(tokens(2, 6), tokens(2, 6)).backward()
    moved = [key for key, grad in gradients(llm.model).items() if key.endswith("router.factor") and grad.any()]
    assert len(moved) == count
    require_saved_and_loaded(llm, tmp_path / "out")
    answers = llm.generate([[256, 3, 4]], 8)
    llm.fast_decoding._prepack_from = 1
    assert llm.generate([[256, 3, 4]], 8) == answers
