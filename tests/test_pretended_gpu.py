"""What a GPU would run, on one that is not there: no wait in the passes of a training step nor in decode steps, no
mixed devices, no copy while a graph is recorded; and, of tensors with numbers, the CPU's results."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import llama.packing
import training.loop
from graph_stand_in import Graph, stand_in_for_graphs
from launches import Launches
from llama.accelerate import FastDecoding, restore_model
from llama.data import IGNORE_INDEX, Example
from llama.distributed import destroy_distributed, get_device, init_distributed
from llama.engine import Request, SamplingParams, generate
from llama.machine import prepare_libraries
from llama.model import Transformer
from llama.packing import async_to_device
from moa.config import AdapterConfig
from moa.state import adapter_parameters
from pretended_gpu import CUDA, Pretended
from tiny import (
    ARGS,
    BASELINES,
    METHODS,
    build,
    changed,
    config,
    float64,
    gradients,
    prompts,
    require_close,
    require_identical,
)
from training.config import CHECKPOINTING_MODES
from training.data import local_micro_batches, micro_batches
from training.estimate import meta_model
from training.loop import TrainState, clip_gradients, forward_backward, make_optimizer, reduce_step
from training.schedule import Schedule

ROWS = [Example(list(range(n)), [IGNORE_INDEX] * p + list(range(p, n)), p) for n, p in ((5, 2), (3, 2), (7, 3))]
NAMES = [*METHODS, *BASELINES]
SOME = ["soft_moa", "sparse_moa", "adamole", "custom", "all_kinds"]  # between them every kind of module


@pytest.fixture(autouse=True)
def single_process() -> None:
    init_distributed(torch.device("cpu"))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    return stand_in_for_graphs(monkeypatch)


@pytest.fixture
def gpu() -> Iterator[Pretended]:
    with Pretended("meta") as gpu:
        yield gpu


def model_of(name: str | None, gpu: Pretended) -> Transformer:
    model = meta_model(ARGS, config(name), bf16=True)
    gpu.waits.clear()  # building may wait
    return model


def micro_batch_step(model: Transformer, device: torch.device = CUDA, rows: list[Example] = ROWS) -> Tensor:
    model.extend_rope_cache(20, device)
    (micro_batch,) = micro_batches(rows, 4, device)
    return forward_backward(model, micro_batch, 9, 15)


def decode_steps(model: Transformer, cuda_graphs: bool) -> list[Request]:
    """Of rows that are sampled, stop, and make room for a fourth."""
    params = SamplingParams((0, 1), min_new_tokens=1, temperature=0.5, top_p=0.9)
    requests = [Request(i, row.tokens, 2 + i % 2, [0.5] * 3) for i, row in enumerate([*ROWS, ROWS[0]])]
    model.eval()
    with FastDecoding(model, cuda_graphs).running(5, hooked=False) as decode:
        return list(generate(model, requests, 3, params, decode, async_lag=1))


@pytest.mark.parametrize(
    ("name", "accelerated"), [*((name, True) for name in NAMES), *((name, False) for name in SOME)]
)
def test_training(name: str, accelerated: bool, gpu: Pretended) -> None:
    model = model_of(name, gpu)
    if not accelerated:
        restore_model(model)
    model.activation_checkpointing = "full"  # so that each forward runs also in the backward pass
    micro_batch_step(model)
    losses = micro_batch_step(model)  # from now on with all narrow copies made at once
    assert not gpu.waits
    adapters = list(adapter_parameters(model).values())
    assert losses.device == CUDA and all(entry.parameter.grad is not None for entry in adapters)
    optimizer = make_optimizer(model, 0.0)
    optimizer.found_inf = reduce_step(losses, [entry.parameter for entry in adapters], 0)[2]
    clip_gradients(adapters, 1.0)
    optimizer.step()
    assert not gpu.waits  # the loop's one comes after the step


def test_a_step_waits_once_when_the_next_is_prepared(gpu: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(*arguments: Any) -> Iterator[Any]:
        gpu.waits.append("rows prepared")
        return local_micro_batches(*arguments)

    model, schedule, log = model_of("lora", gpu), Schedule(3, 3, 2, 0, 0.1, 0.0, True), []
    monkeypatch.setattr(training.loop, "local_micro_batches", prepare)
    training.loop.train(model, make_optimizer(model, 0.0), ROWS, schedule, 2, 0, TrainState(), log.append)
    assert len(log) == 2 and [wait.partition(":")[0] for wait in gpu.waits] == [
        *("rows prepared", "rows prepared", "a copy of memory that is not pinned at loop.py"),
        *("rows prepared", "a copy of memory that is not pinned at loop.py"),
    ]


@pytest.mark.parametrize(
    ("method", "most"), [("lora", 68), ("soft_moa", 166), ("sparse_moa", 144), ("molora", 120), ("adamole", 275)]
)
def test_launches_of_a_training_block(method: str, most: int, gpu: Pretended) -> None:
    """Forward and backward: what a step of two blocks more takes."""
    totals = []
    for n_layers in (3, 5):
        args = replace(ARGS, n_layers=n_layers)
        model = meta_model(args, AdapterConfig.from_dict({"method": method}, n_layers), bf16=True)
        micro_batch_step(model)
        model.zero_grad()
        with Launches() as launches:
            micro_batch_step(model)
        totals.append(launches.counts.total())
    assert 0 < totals[1] - totals[0] <= 2 * most


@pytest.mark.parametrize("name", NAMES)
def test_narrow_copies_made_at_once_change_no_bit(name: str) -> None:
    model, rows = build(name, bf16=True).model.train(), ROWS[:1] * 3
    with Pretended("cpu"):
        losses, grads = micro_batch_step(model, rows=rows), gradients(model)
        for model.activation_checkpointing in CHECKPOINTING_MODES:
            assert torch.equal(micro_batch_step(model, rows=rows), losses)
            require_identical(gradients(model), grads)


def test_training_on_rows_of_equal_length(gpu: Pretended) -> None:
    micro_batch_step(model_of("soft_moa", gpu), rows=ROWS[:1] * 2)
    assert not gpu.waits


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("name", [None, *NAMES])
def test_decoding(name: str | None, cuda_graphs: bool, gpu: Pretended, graphs: list[Graph]) -> None:
    finished = decode_steps(model_of(name, gpu), cuda_graphs)
    assert len(finished) == 4 and not gpu.waits and bool(graphs) == cuda_graphs


@pytest.mark.parametrize("name", SOME)
def test_the_same_numbers(name: str) -> None:
    llm, rows = build(name), prompts(4, 2, 6)
    expected = llm.generate(rows, max_gen_len=5, temperature=0.8, seed=3)
    with Pretended("cpu"), changed(llm, async_lag=1, fast_decoding=FastDecoding(llm.model)):
        assert llm.generate(rows, max_gen_len=5, temperature=0.8, seed=3) == expected
    with float64(llm.model):
        losses, grads = micro_batch_step(llm.model, torch.device("cpu")), gradients(llm.model)
        with Pretended("cpu"):
            actual = micro_batch_step(llm.model), gradients(llm.model)
    torch.testing.assert_close(actual[0], losses)
    require_close(actual[1], grads, 1e-9)


def test_a_gpu_is_set_up(gpu: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process group is bound to it, and attention does not go to cuDNN."""
    calls, join = [], dist.init_process_group

    def init_process_group(backend: str, **kwargs: Any) -> None:
        calls.append((backend, kwargs["device_id"]))
        join("gloo", store=dist.HashStore(), rank=0, world_size=1)

    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        assert get_device("cuda") == CUDA and not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    with monkeypatch.context() as patch:
        patch.setattr(dist, "init_process_group", init_process_group)
        for device in (CUDA, torch.device("cpu")):
            destroy_distributed()
            init_distributed(device)
    assert calls == [("nccl", CUDA), ("gloo", None)]


@pytest.mark.parametrize(
    "given", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, {"PYTORCH_ALLOC_CONF": "backend:native"}]
)
def test_segments_grow_unless_the_user_says_otherwise(given: dict[str, str]) -> None:
    with mock.patch.dict(os.environ, given, clear=True):
        prepare_libraries()
        settings = {name: value for name, value in os.environ.items() if "ALLOC" in name}
    assert settings == (given or {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})


def read_a_value(x: Tensor) -> None:
    x.sum().item()


def mix_devices(x: Tensor) -> None:
    x * torch.ones(x.shape)


def branch(x: Tensor) -> None:
    if x.sum() > 0:
        x.sum()


def number(x: Tensor) -> None:
    torch.tensor([1.0], device=x.device)


def pinned_copy(x: Tensor) -> None:
    async_to_device([1.0], x.device)


def plant(module: nn.Module, fault: Callable[[Tensor], None]) -> None:
    module.register_forward_pre_hook(lambda _, inputs: fault(inputs[0]))


def unpinned(data: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    return torch.as_tensor(data, dtype=dtype).to(device, non_blocking=True)


@pytest.mark.parametrize(
    "fault, what", [(read_a_value, "a value read"), (branch, "a value read"), (number, "a number made a tensor")]
)
def test_a_planted_wait_is_found(fault: Callable, what: str, gpu: Pretended) -> None:
    model = model_of("soft_moa", gpu)
    plant(model.layers[1].router, fault)
    micro_batch_step(model)
    assert gpu.waits and all(wait.startswith(f"{what} at test_pretended_gpu.py") for wait in gpu.waits)


def test_planted_devices_that_mix_are_found(gpu: Pretended) -> None:
    model = model_of("soft_moa", gpu)
    plant(model.layers[1].ffn_norm, mix_devices)
    with pytest.raises(RuntimeError, match="mul: tensors on cuda:0 and on cpu"):
        micro_batch_step(model)


def test_a_planted_copy_of_unpinned_memory_is_found(gpu: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.packing, "async_to_device", unpinned)
    micro_batch_step(model_of("lora", gpu))
    assert gpu.waits and all(wait.startswith("a copy of memory that is not pinned") for wait in gpu.waits)


def test_a_planted_copy_while_recording_is_found(gpu: Pretended, graphs: list[Graph]) -> None:
    model = model_of("soft_moa", gpu)
    plant(model.layers[1].ffn_norm, pinned_copy)
    decode_steps(model, cuda_graphs=False)
    assert not gpu.waits
    decode_steps(model, cuda_graphs=True)
    assert gpu.waits and all(wait.startswith("a copy while recording") for wait in gpu.waits)


def test_other_ways_to_wait_are_found(gpu: Pretended) -> None:
    on_gpu, host = torch.ones(3, device="cuda"), torch.ones(3)
    waiting: list[Callable[[], Any]] = [
        *(on_gpu.tolist, on_gpu.cpu, lambda: bool(on_gpu[0]), lambda: float(on_gpu[0])),
        *(lambda: host.to(CUDA), lambda: host.pin_memory().to(CUDA), lambda: host.to(CUDA, non_blocking=True)),
        *(lambda: on_gpu.copy_(host), lambda: host.copy_(on_gpu), lambda: on_gpu.new_tensor([1.0])),
        *(lambda: on_gpu[[0, 1]], lambda: on_gpu[torch.tensor([0, 1])]),
    ]
    for number, wait in enumerate(waiting, 1):
        wait()
        assert len(gpu.waits) == number, gpu.waits
    for size_from_values in (on_gpu.nonzero, lambda: on_gpu[on_gpu > 0], lambda: torch.unique(on_gpu)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            size_from_values()
    async_to_device([1, 2], CUDA)
    on_gpu[torch.arange(2, device=CUDA)] = on_gpu.new_full((), 2.0)
    assert len(gpu.waits) == len(waiting)
