"""What is faster than the formulas equals them; the formulas compile, and take any frozen layer and a new adapter."""

import copy

import pytest
import torch
from torch import Tensor, nn

from commands import REPO, side_by_side
from llama.accelerate import Lanes, accelerate_model, restore_model
from llama.accelerate.lanes import split_lanes
from llama.model import ForwardContext, Transformer
from llama.packing import PackedBatch
from moa.state import adapter_parameters
from observe import float64
from tiny import METHODS, build, gradients, relative, shared, tokens
from training.loop import expert_fraction, forward_backward, uses_load_balancing

LENGTHS, PROMPT_LENS = [5, 11, 1, 8], [2, 6, 1, 4]


def micro_batch() -> tuple[Tensor, Tensor, PackedBatch]:
    packed = tokens(sum(LENGTHS))
    labels = packed.clone()
    labels[:7] = -100
    return packed, labels, PackedBatch(LENGTHS, "cpu", PROMPT_LENS)


def step(model: Transformer, run=forward_backward) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's losses and every gradient."""
    return run(model, micro_batch(), 20, sum(LENGTHS)), gradients(model)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_that_of_the_formulas(name: str, checkpointing: str) -> None:
    model = copy.deepcopy(shared(name).model)
    results = []
    with float64(model):
        for change in (restore_model, accelerate_model):
            change(model)
            model.activation_checkpointing = "none" if change is restore_model else checkpointing
            results.append(step(model))
    (plain_losses, plain), (losses, fast) = results
    assert relative(losses.double(), plain_losses.double()) < 1e-6  # summed in float32
    for key, grad in plain.items():
        assert relative(fast[key], grad) < 1e-10, key


@pytest.mark.parametrize("name", METHODS)
def test_two_lanes_give_the_same_step(name: str) -> None:
    model = copy.deepcopy(shared(name).model)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with float64(model), Lanes(model, forward_backward, expert_fraction, uses_load_balancing(model)) as in_lanes:
            losses, grads = step(model, in_lanes)
            again, _ = step(model, in_lanes)
    finally:
        torch.set_num_threads(threads)
    with float64(model):
        one_losses, one = step(model)
    assert torch.equal(losses, again) and relative(losses.double(), one_losses.double()) < 1e-6
    for key, grad in one.items():
        assert relative(grads[key], grad) < 1e-9, key


@pytest.mark.parametrize(
    ("lengths", "threads", "lanes"), [([5, 11, 1, 8], 2, 2), ([5, 11], 1, 1), ([9], 2, 1), ([20, 1, 1], 2, 1)]
)
def test_lanes_where_they_help(lengths: list[int], threads: int, lanes: int) -> None:
    split = split_lanes(lengths, threads)
    assert len(split) == lanes and sorted(i for lane in split for i in lane) == list(range(len(lengths)))


@pytest.mark.parametrize("name", METHODS)
def test_a_block_compiles_without_graph_breaks(name: str) -> None:
    """Forward and backward, of the plain formulas."""
    model = copy.deepcopy(shared(name).model)
    restore_model(model)
    torch._dynamo.reset()
    batch = PackedBatch([4, 3], "cpu", [2, 3])
    model.extend_rope_cache(8, torch.device("cpu"))
    context = ForwardContext(batch, model.freqs_cis[batch.positions])
    block, x = model.layers[1], torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    results = []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        out, stats = run(x.clone().requires_grad_(), context)
        (out.square().sum() + sum(s.probs.square().sum() for s in stats)).backward()
        results.append((out.detach(), gradients(model)))
    (expected, plain), (out, compiled) = results
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    for key, grad in plain.items():
        assert relative(compiled[key], grad) < 1e-3, key


class Scaled(nn.Module):
    """A frozen layer of another kind, as a quantised one: no plain weight."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.register_buffer("halved", (layer.weight / 2).detach())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.halved * 2)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_any_frozen_linear_layer_can_be_the_base(name: str, accelerated: bool) -> None:
    llm, prompts = build(name), [[256, 3, 4, 5], [256, 9]]
    answers = llm.generate(prompts, max_gen_len=4)
    with float64(copy.deepcopy(llm.model)) as model:
        expected_losses, expected = step(model)
    for block in llm.model.layers:
        for part, names in ((block.attention, ("wq", "wk", "wv", "wo")), (block.feed_forward, ("w1", "w2", "w3"))):
            for layer in names:
                setattr(part, layer, Scaled(getattr(part, layer)))
        # the prompt reads the key and value projections
        block.attention.adapters.targets["attention"].layers[:] = [block.attention.wk, block.attention.wv]
    if not accelerated:
        restore_model(llm.model)
        llm.fast_decoding = None
    assert llm.generate(prompts, max_gen_len=4) == answers
    with float64(llm.model) as model:
        losses, grads = step(model)
    assert relative(losses.double(), expected_losses.double()) < 1e-6  # summed in float32
    for key, grad in expected.items():
        assert relative(grads[key], grad) < 1e-9, key


def test_dora_in_one_file_has_the_same_gradients_on_two_processes(tmp_path) -> None:
    from moa.methods import ADAPTERS
    from observe_dora import observe_dora

    try:
        alone = observe_dora(1)
    finally:
        ADAPTERS.pop("dora")  # other tests know nothing of it
    side_by_side(str(REPO / "tests" / "helpers" / "observe_dora.py"), 2, tmp_path, timeout=200)
    for rank in range(2):
        found = torch.load(tmp_path / f"dora{rank}.pt", weights_only=True)
        assert found["answers"] == alone["answers"]
        torch.testing.assert_close(found["loss"], alone["loss"])
        for kind, bound in (("fresh", 1e-6), ("gradients", 1e-9)):
            assert found[kind].keys() == alone[kind].keys()
            for key, tensor in alone[kind].items():
                assert relative(found[kind][key], tensor) < bound, key
    magnitudes = [tensor for key, tensor in alone["gradients"].items() if key.endswith("magnitude")]
    assert len(magnitudes) == 15 and all(grad.any() for grad in magnitudes)


def test_hooks_see_the_adapters_routers() -> None:
    """A module with a hook runs its own forward."""
    llm, calls = build("topk_moelora"), []
    routers = [m for m in llm.model.modules() if getattr(m, "chooses_experts", False)]
    hooks = [m.register_forward_hook(lambda *_: calls.append(1)) for m in routers]
    expected = step(build("topk_moelora").model)
    losses, grads = step(llm.model)
    assert len(calls) == len(routers) > 0
    for hook in hooks:
        hook.remove()
    for key in adapter_parameters(llm.model):
        assert relative(grads[key], expected[1][key]) < 1e-4, key
    assert relative(losses, expected[0]) < 1e-6
