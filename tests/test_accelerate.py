"""What is faster than the formulas equals them; the formulas compile, and take any frozen layer and a new adapter."""

import copy
import shutil
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

from llama.accelerate import Lanes, accelerate_model, fuse_small_operations, kernels, restore_model
from llama.accelerate.forwards import joint_weight
from llama.accelerate.fused_decode import is_known
from llama.accelerate.lanes import split_lanes
from llama.model import ForwardContext, Transformer
from llama.packing import PackedBatch
from moa.state import self_balancing
from tiny import BASELINES, METHODS, build, drawn, float64, gradients, prompts, relative, require_close, shared, tokens
from training.loop import expert_fraction, forward_backward, uses_load_balancing

LENGTHS, PROMPT_LENS = [5, 11, 1, 8], [2, 6, 1, 4]
Step = tuple[Tensor, dict[str, Tensor]]


def step(model: Transformer, run=forward_backward) -> Step:
    """A micro-batch's losses and every gradient."""
    packed = tokens(sum(LENGTHS))
    labels = packed.clone()
    labels[:7] = -100
    micro_batch = packed, labels, PackedBatch(LENGTHS, "cpu", PROMPT_LENS)
    return run(model, micro_batch, 20, sum(LENGTHS)), gradients(model)


@cache
def plain_step(name: str) -> Step:
    """By the plain formulas, in float64."""
    model = copy.deepcopy(shared(name).model)
    restore_model(model)
    with float64(model):
        return step(model)


def require_same_step(actual: Step, name: str, bound: float) -> None:
    losses, grads = plain_step(name)
    assert relative(actual[0].double(), losses.double()) < 1e-6  # summed in float32
    require_close(actual[1], grads, bound)


@pytest.mark.parametrize("name", [*METHODS, *BASELINES])
def test_an_accelerated_step_is_that_of_the_formulas(name: str) -> None:
    model = copy.deepcopy(shared(name).model)
    accelerate_model(model)
    with float64(model):
        for model.activation_checkpointing in ("none", "selective", "full"):
            require_same_step(step(model), name, 1e-10)


def compile_by(monkeypatch: pytest.MonkeyPatch, backend: str | Callable) -> None:
    """Fuse small operations, until the test ends."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, fullgraph=True, backend=backend))
    monkeypatch.setattr(kernels.Fusable, "enabled", False)
    for fusable in vars(kernels).values():
        if isinstance(fusable, kernels.Fusable):
            monkeypatch.setattr(fusable, "_compiled", None)
    fuse_small_operations(torch.device("cpu"))


def test_a_step_in_fused_operations_is_that_of_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_by(monkeypatch, "aot_eager")
    for name in [*METHODS, *BASELINES]:
        model = copy.deepcopy(shared(name).model)
        accelerate_model(model)
        with float64(model):
            require_same_step(step(model), name, 1e-10)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
def test_kernels_of_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_by(monkeypatch, "inductor")
    model = copy.deepcopy(shared("soft_moa").model)
    accelerate_model(model)
    require_same_step(step(model), "soft_moa", 1e-4)


def test_where_nothing_compiles_the_flag_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no compiler")

    with pytest.raises(ValueError, match="--compile needs a C.* compiler on a CPU, Triton on a GPU .no compiler.$"):
        compile_by(monkeypatch, broken)
    assert not kernels.Fusable.enabled


@pytest.mark.parametrize("name", [*METHODS, *BASELINES])
def test_two_lanes_give_the_same_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(shared(name).model).train()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with float64(model), Lanes(model, forward_backward, expert_fraction, uses_load_balancing(model)) as in_lanes:
        first = step(model, in_lanes)
        again, _ = step(model, in_lanes)
    assert torch.equal(first[0], again)
    assert all(m.token_counts.sum() == 2 * sum(LENGTHS) * m.top_k for m in self_balancing(model))
    require_same_step(first, name, 1e-9)


@pytest.mark.parametrize(
    ("lengths", "threads", "lanes"), [([5, 11, 1, 8], 2, 2), ([5, 11], 1, 1), ([9], 2, 1), ([20, 1, 1], 2, 1)]
)
def test_lanes_where_they_help(lengths: list[int], threads: int, lanes: int) -> None:
    split = split_lanes(lengths, threads)
    assert len(split) == lanes and sorted(i for lane in split for i in lane) == list(range(len(lengths)))


@pytest.mark.parametrize("name", [*METHODS, *BASELINES])
def test_a_block_compiles_without_graph_breaks(name: str) -> None:
    """Forward and backward, of the plain formulas."""
    model = copy.deepcopy(shared(name).model)
    restore_model(model)
    torch._dynamo.reset()
    batch = PackedBatch([4, 3], "cpu", [2, 3])
    model.extend_rope_cache(8, torch.device("cpu"))
    context = ForwardContext(batch, model.freqs_cis[batch.positions])
    block, results = model.layers[1], []
    for run in (block, torch.compile(block, fullgraph=True, backend="aot_eager")):
        out, stats = run(drawn(7, 64).requires_grad_(), context)
        (out.square().sum() + sum(s.scaled_probs.square().sum() for s in stats)).backward()
        results.append((out.detach(), gradients(model)))
    (expected, plain), (out, compiled) = results
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    require_close(compiled, plain, 1e-3)


class Scaled(nn.Module):
    """A frozen layer of another kind, as a quantised one: no plain weight."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.register_buffer("halved", (layer.weight / 2).detach())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.halved * 2)


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("name", [*METHODS, *BASELINES])
def test_any_frozen_linear_layer_can_be_the_base(name: str, accelerated: bool) -> None:
    llm, rows = build(name), prompts(4, 2)
    for block in llm.model.layers:
        for part, names in ((block.attention, ("wq", "wk", "wv", "wo")), (block.feed_forward, ("w1", "w2", "w3"))):
            for layer in names:
                setattr(part, layer, Scaled(getattr(part, layer)))
        # the prompt reads the key and value projections, MixLoRA the second layer of the feed-forward block
        block.attention.adapters.targets["attention"].layers[:2] = [block.attention.wk, block.attention.wv]
        block.feed_forward.adapters.targets["FFN"].layers[:] = [block.feed_forward.w2]
    if not accelerated:
        restore_model(llm.model)
        llm.fast_decoding = None
    assert llm.generate(rows, max_gen_len=4) == shared(name).generate(rows, max_gen_len=4)
    with float64(llm.model) as model:
        require_same_step(step(model), name, 1e-9)


def test_which_models_decode_in_few_operations() -> None:
    """Those whose adapters are LoRAs, prompts and parallel adapters of one expert (results: test_generation.py)."""
    names = [None, *METHODS, *BASELINES]
    known = {name for name in names if is_known(shared(name).model)}
    soft = {"soft_moa", "soft_moa_linear_router", "sparse_moa", "sparse_moa_const_threshold", "soft_moa_instance"}
    assert known == {None, "lora", "prompt", "parallel_adapter", "rslora", "lora_plus", "unipeft", *soft}


def test_weights_joined_for_a_gpu_take_no_memory() -> None:
    attention = copy.deepcopy(shared("lora").model).layers[0].attention
    layers = [attention.wq, attention.wk, attention.wv]
    before = [layer.weight.clone() for layer in layers]
    joint = joint_weight(layers)
    assert joint_weight(layers) is joint and torch.equal(joint, torch.cat(before))
    assert {layer.weight.untyped_storage().data_ptr() for layer in layers} == {joint.data_ptr()}


def test_hooks_see_the_adapters_routers() -> None:
    """A module with a hook runs its own forward."""
    model, calls = build("topk_moelora").model, []
    routers = [m for m in model.modules() if getattr(m, "chooses_experts", False)]
    for router in routers:
        router.register_forward_hook(lambda *_: calls.append(1))
    with float64(model):
        require_same_step(step(model), "topk_moelora", 1e-9)
    assert len(calls) == len(routers) > 0
