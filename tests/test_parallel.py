"""Two processes that share one model (gloo, CPU) against one process that holds it all."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import observe
from llama import Llama
from llama.parallel import pick_device
from observe import IMPOSSIBLE
from tiny import BASE, METHODS, PARAMS, golden_state, relative, write_base

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two ranks observed. Starting processes takes seconds: once for all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    state = golden_state()
    for shards in (1, 2, 4):
        write_base(folder / f"base_{shards}", PARAMS, state, shards)
    wide = write_base(folder / "base_wide", PARAMS, state, 4)
    for i, part in enumerate(state["tok_embeddings.weight"].chunk(4, 1)):  # LLaMA-2's way
        shard = torch.load(wide / f"consolidated.{i:02d}.pth", weights_only=True)
        torch.save(shard | {"tok_embeddings.weight": part.clone()}, wide / f"consolidated.{i:02d}.pth")

    command = [sys.executable, str(Path(observe.__file__))]
    outputs = [folder / f"output{rank}" for rank in (0, 1)]
    processes = []
    try:
        for rank, output in enumerate(outputs):
            with output.open("w") as file:
                arguments = [*command, str(rank), str(folder)]
                environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
                processes.append(
                    subprocess.Popen(arguments, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT)
                )
        for process in processes:
            process.wait(timeout=150)
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.wait() == 0, output.read_text()[-3000:]
        assert "Traceback" not in output.read_text()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.fixture(scope="module", params=METHODS)
def compared(request, ranks) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(one process, both of two) for one method."""
    return observe.observe(request.param, 1), [rank[request.param] for rank in ranks]


def test_logits_and_loss(compared) -> None:
    one, two = compared
    for rank in two:
        assert rank["logits"].shape == one["logits"].shape
        torch.testing.assert_close(rank["logits"], one["logits"], rtol=5e-5, atol=5e-5)
        torch.testing.assert_close(rank["loss"], one["loss"], rtol=1e-5, atol=1e-5)
        assert torch.equal(rank["loss"], two[0]["loss"])


@pytest.mark.parametrize("kind", ["gradients", "checkpointed"])
def test_every_gradient(compared, kind: str) -> None:
    one, two = compared
    for rank in two:
        assert rank[kind].keys() == one[kind].keys()
        for key, expected in one[kind].items():
            assert expected.norm() > 0, key
            # A single number that is the small rest of a large sum is held to float32's rounding of the sum
            rounding = (rank[kind][key] - expected).norm() < 1e-7
            assert relative(rank[kind][key], expected) < (3e-5 if expected.numel() > 1 else 5e-4) or (
                expected.numel() == 1 and rounding
            ), key


def test_replicated_gradients_are_equal_on_both_ranks(compared) -> None:
    """To the bit: or else what should be one parameter would drift apart."""
    _, two = compared
    assert two[0]["replicated"].keys() == two[1]["replicated"].keys() and two[0]["replicated"]
    for key, grad in two[0]["replicated"].items():
        assert torch.equal(grad, two[1]["replicated"][key]), key


def test_adapters_are_cut_as_their_layers_are(compared) -> None:
    one, _ = compared
    columns, rows = ("Q", "K", "V", "FFN_UP", "FFN_GATE"), ("O", "FFN_DOWN")
    outputs = {f"lora_{target}.B" for target in columns} | {f"bias_{target}.bias" for target in columns}
    inputs = {f"lora_{target}.A" for target in rows}
    routers = {f"lora_{target}.expert_router.{name}.weight" for target in rows for name in ("linear", "threshold")}
    expected = {key for key in one["state"] if key.endswith((*outputs, *inputs, *routers, "prompt.z"))}
    assert set(one["cut"]) == expected


def test_a_noisy_router_draws_the_same_on_all_ranks(ranks) -> None:
    one = observe.observe_noise(1)
    noise = {key for key in one["gradients"] if ".noise." in key}
    assert noise
    for rank in ranks:
        torch.testing.assert_close(rank["noise"]["loss"], one["loss"], rtol=1e-5, atol=1e-5)
        for key, expected in one["gradients"].items():
            assert expected.norm() > 0 and relative(rank["noise"]["gradients"][key], expected) < 1e-4, key


def test_generation(compared) -> None:
    one, two = compared
    assert any(one["greedy"]) and one["greedy"] != one["sampled"]
    for rank in two:
        assert rank["greedy"] == one["greedy"]
        assert rank["sampled"] == one["sampled"]


def test_start_and_state_do_not_depend_on_the_cut(compared) -> None:
    one, two = compared
    assert one["state"].keys() == one["loaded"].keys()
    for rank in two:
        for kind in ("fresh", "state"):
            assert rank[kind].keys() == one[kind].keys()
            for key, expected in one[kind].items():
                assert torch.equal(rank[kind][key], expected), key
        for key, tensor in rank["state"].items():
            assert torch.equal(tensor, rank["loaded"][key]), key


def test_exchanges_leave_other_branches_alone(ranks) -> None:
    """Reducing in place would corrupt a gradient, or an input, that another branch uses too."""
    for rank, own in enumerate(torch.tensor([[1.0, 2.0], [2.0, 4.0]])):
        found, total = ranks[rank]["exchanges"], torch.tensor([3.0, 6.0])
        assert torch.equal(found["u"], total)  # summed over ranks
        assert torch.equal(found["v"], own)
        assert torch.equal(found["x"], own) and torch.equal(found["sum"], total)
        assert torch.equal(found["w"], 2 * own)


@pytest.mark.parametrize("name", ["base_1", "base_2", "base_4", "base_wide"])
def test_any_number_of_shards_loads(ranks, name: str) -> None:
    expected = torch.load(BASE / "consolidated.00.pth", weights_only=True)
    for rank in ranks:
        found = rank["bases"][name]
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize(
    "what, words",
    [
        ("heads", ["n_heads (3)", "2 equal parts"]),
        ("kv_heads", ["n_kv_heads (3)", "2 equal parts"]),
        ("ffn", ["feed-forward width (171)", "2 equal parts"]),
        ("vocab", ["vocab_size (511)", "2 equal parts"]),
        ("processes", ["model_parallel_size 3", "2 processes"]),
    ],
)
def test_impossible_sizes_are_refused_with_the_numbers(ranks, what: str, words: list[str]) -> None:
    assert {*IMPOSSIBLE, "processes"} == set(ranks[0]["errors"])
    for rank in ranks:
        assert all(word in rank["errors"][what] for word in words), rank["errors"][what]


def test_one_process_cannot_be_two_ranks() -> None:
    with pytest.raises(ValueError, match="model_parallel_size 2 does not divide the 1 processes"):
        Llama.build(BASE, device="cpu", model_parallel_size=2)
    with pytest.raises(ValueError, match="model_parallel_size 0 "):
        Llama.build(BASE, device="cpu", model_parallel_size=0)


@pytest.mark.parametrize("device", ["tpu", "gpu", "meta", "cuda:x"])
def test_unknown_devices_are_named(device: str) -> None:
    with pytest.raises(ValueError, match=f"device '{device}' is not one of auto, cpu, cuda, cuda:N"):
        Llama.build(BASE, device=device)


def test_a_gpu_that_is_not_there(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'cuda:0': this machine has no GPU"):
        pick_device("cuda:0")
