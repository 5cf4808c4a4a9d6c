"""Four processes (gloo, CPU) that share one model, and two pairs that each share one and divide the rows, against one
process that holds it all."""

from pathlib import Path
from typing import Any

import pytest
import torch

import observe
from commands import side_by_side
from llama import Llama, Transformer
from llama.distributed import get_device, init_distributed
from moa.state import adapter_state_dict, assert_replicas_equal
from observe import COPIED, EVERYTHING, IMPOSSIBLE, LARGE, OBSERVED, SIZES, WORLD
from tiny import (
    BASE,
    PARAMS,
    build,
    golden_state,
    relative,
    require_close,
    require_identical,
    save,
    write_base,
)

Observed = dict[str, Any]


def write_folders(folder: Path) -> None:
    """The golden base in all kinds of shards, a large one, one of an impossible shape without weights, an adapter."""
    state = golden_state()
    for shards in (1, 2, 4):
        write_base(folder / f"base_{shards}", PARAMS, state, shards)
    shared = write_base(folder / "base_shared", PARAMS, state, 4)
    for i in range(4):  # two shards hold the same of two key/value heads
        heads = {key: state[key].chunk(2)[i // 2].clone() for key in state if ".wk." in key or ".wv." in key}
        change(shared / f"consolidated.{i:02d}.pth", heads)
    init_distributed(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    shapes = {key: tensor.shape for key, tensor in Transformer(LARGE).named_parameters()}
    large = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    write_base(folder / "large", {}, large, 4)
    for file in write_base(folder / "impossible", PARAMS | IMPOSSIBLE["heads"], {}).glob("*.pth"):
        file.unlink()
    save(build(EVERYTHING), folder / "adapter_1")


def change(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(torch.load(file, weights_only=True) | tensors, file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where four processes read their checkpoints and wrote what they observed. Starting them takes seconds: once."""
    folder = tmp_path_factory.mktemp("ranks")
    write_folders(folder)
    for output in side_by_side(observe.__file__, WORLD, folder, timeout=600):
        assert "Traceback" not in output
    return folder


@pytest.fixture(scope="module")
def processes(folder: Path) -> list[dict[int, Observed]]:
    """By process, then by model-parallel size."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(params=SIZES)
def ranks(request, processes) -> list[Observed]:
    """What all processes observed at one model-parallel size."""
    return [by_size[request.param] for by_size in processes]


@pytest.fixture(scope="module", params=OBSERVED)
def single(request) -> tuple[str, Observed]:
    """A method, and what one process observes."""
    return request.param, observe.observe(request.param, 1)


@pytest.fixture
def compared(single, ranks) -> tuple[Observed, list[Observed]]:
    """(one process, the several that share a model) for one method and size."""
    name, alone = single
    return alone, [rank["methods"][name] for rank in ranks if name in rank["methods"]]


def test_logits_and_loss(compared) -> None:
    alone, shared = compared
    for rank in shared:
        assert rank["logits"].shape == alone["logits"].shape
        assert relative(rank["logits"], alone["logits"]) < 1e-5
        assert relative(rank["float32"]["loss"], alone["float32"]["loss"]) < 1e-6
        assert torch.equal(rank["float32"]["loss"], shared[0]["float32"]["loss"])


def test_every_gradient_in_float32(compared) -> None:
    """Where float64 shows a gradient to be some way off by rounding alone (the small rest of large sums), the other may
    be five times as far. Of a single number that may be luck: it may also be off by a few last bits of what was summed,
    which is of the size of 1."""
    alone, shared = compared
    for rank in shared:
        grads = rank["float32"]["gradients"]
        assert grads.keys() == alone["float32"]["gradients"].keys()
        for key, expected in alone["float32"]["gradients"].items():
            rounding = relative(expected, alone["none"]["gradients"][key])
            # AdaMoLE's threshold sees differences of nearly equal numbers; in float64 it is as exact as the rest
            rounding = max(rounding, 1e-5 if "threshold" in key else 0.0)
            few_bits = expected.numel() == 1 and (grads[key] - expected).norm() < 1.5e-6
            assert expected.norm() > 0 and (few_bits or relative(grads[key], expected) < max(1e-5, 5 * rounding)), key


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_every_gradient_in_float64(compared, checkpointing: str) -> None:
    """To a bound far below what any mistake would do."""
    alone, shared = compared
    assert all(grad.norm() > 0 for grad in alone[checkpointing]["gradients"].values())
    assert len(shared) == 4 or checkpointing in shared[0]
    for rank in (rank for rank in shared if checkpointing in rank):
        require_close(rank[checkpointing]["gradients"], alone[checkpointing]["gradients"], 1e-9)
        assert relative(rank[checkpointing]["loss"], alone[checkpointing]["loss"]) < 1e-7  # a float32


def test_gradients_of_what_several_ranks_hold_are_equal_on_them(compared) -> None:
    """To the bit: or else what should be one parameter would drift apart."""
    _, shared = compared
    n_compared = 0
    for key in shared[0]["float32"]["local"]:
        _, shards = shared[0]["shards"].get(key, (0, 1))
        for shard in range(shards):
            holders = shared[shard * len(shared) // shards : (shard + 1) * len(shared) // shards]
            first, *others = (rank["float32"]["local"][key] for rank in holders)
            assert all(torch.equal(first, other) for other in others), key
            n_compared += len(others)
    assert n_compared


def test_adapters_are_sharded_as_their_layers_are(compared) -> None:
    alone, shared = compared
    columns, rows = ("Q", "K", "V", "FFN_UP", "FFN_GATE"), ("O", "FFN_DOWN")
    along_outputs = ("lora_B", "start_B", "bias", "magnitude", "lambda_b", "factor")
    outputs = {f"_{target}.{name}" for target in columns for name in along_outputs}
    outputs |= {"mixlora.lora_B1", "mixlora.lora_B3"}
    inputs = {*(f"_{target}.{name}_A" for target in rows for name in ("lora", "start")), "mixlora.lora_A2"}
    routers = {f"lora_{target}.expert_router.{name}.weight" for target in rows for name in ("proj", "threshold")}
    expected = {key for key in alone["state"] if key.endswith((*outputs, *inputs, *routers, "prompt.gate"))}
    for rank in shared:
        assert set(rank["shards"]) == expected
        for key, (_, shards) in rank["shards"].items():
            kv_heads = key.endswith(tuple(f"_{target}.{name}" for target in "KV" for name in along_outputs))
            assert shards == (2 if kv_heads else len(shared)), key


def test_generation(compared) -> None:
    alone, shared = compared
    assert any(alone["greedy"]) and alone["greedy"] != alone["sampled"]
    for rank in shared:
        assert rank["greedy"] == alone["greedy"]
        assert rank.get("sampled", alone["sampled"]) == alone["sampled"]
    assert len(shared) == 4 or "sampled" in shared[0]


def test_initial_values_and_state_do_not_depend_on_the_size(compared) -> None:
    alone, shared = compared
    for rank in shared:
        require_identical(rank["state"], alone["state"])
        require_identical(rank["state"], rank["loaded"])
        summed = {key for key in alone["fresh"] if key.endswith("magnitude")}  # from the base's weights
        for keys, bound in ((alone["fresh"].keys() - summed, 0), (summed, 1e-6)):
            require_close({key: rank["fresh"][key] for key in keys}, {key: alone["fresh"][key] for key in keys}, bound)
        assert rank["fresh"].keys() == alone["fresh"].keys()


@pytest.mark.parametrize("name", observe.STEPPED)
def test_a_step_divided_between_replicas_is_the_step_of_one_process(processes, name: str) -> None:
    """Through the project's own loop, rows of unequal lengths, replicas of two ranks each."""
    steps = [by_size[2]["steps"][name] for by_size in processes]
    require_same_step(steps, observe.observe_step(name, 1, exact=True), 1e-9)


def test_a_divided_step_in_float32(ranks) -> None:
    alone = observe.observe_step("soft_moa", 1, exact=False)
    require_same_step([rank["step in float32"] for rank in ranks], alone, 1e-5)


def test_a_clipped_step(ranks) -> None:
    """The norm is that of the whole gradient, in which each shard counts once, however many ranks hold it."""
    alone = observe.observe_step(observe.EVERYTHING, 1, exact=True, grad_clip=observe.CLIP)
    norm = torch.stack([grad.norm() for grad in alone["gradients"].values()]).norm().item()
    assert norm == pytest.approx(observe.CLIP, rel=1e-4)
    require_same_step([rank["clipped step"] for rank in ranks], alone, 1e-9)


def require_same_step(steps: list[Observed], alone: Observed, bound: float) -> None:
    assert all(grad.norm() > 0 for grad in alone["gradients"].values())
    for step in steps:
        assert step["loss"] == pytest.approx(alone["loss"], rel=1e-6) and len(step["loss"]) == 1
        require_close(step["gradients"], alone["gradients"], bound)
        # AdamW's first step is a sign where gradients are large
        require_close(step["state"], alone["state"], max(1e-7, 10 * bound))


def test_a_noisy_router_draws_the_same_on_all_ranks(ranks) -> None:
    alone = observe.observe_noise(1)
    assert {key for key in alone["gradients"] if ".noise." in key}
    for rank in ranks:
        torch.testing.assert_close(rank["noise"]["loss"], alone["loss"], rtol=1e-5, atol=1e-5)
        require_close(rank["noise"]["gradients"], alone["gradients"], 1e-4)


def test_golden_numbers(ranks) -> None:
    assert len(set().union(*(rank["golden"] for rank in ranks))) == 18
    for rank in ranks:
        assert max(rank["golden"].values()) < 1e-5, rank["golden"]


@pytest.mark.parametrize("name", ["base_1", "base_2", "base_4", "base_shared"])
def test_any_number_of_shards_loads_at_any_size(ranks, folder: Path, name: str) -> None:
    for rank in ranks:
        require_identical(rank["bases"][name], golden_state())
    require_identical(observe.whole_base(Llama.build(folder / name).model), golden_state())


def test_a_rank_reads_its_own_part_of_a_checkpoint(ranks) -> None:
    size = max(rank["rank"] for rank in ranks) + 1
    for rank in ranks:
        own = range(rank["rank"] * 4 // size, (rank["rank"] + 1) * 4 // size)
        for i, share in enumerate(rank["read"]):
            if i in own:
                assert share > 0.9
            elif i > 0:  # the first has the norms of all, and the system maps some more around them
                assert share < 0.05


def test_adapter_files_are_whole(processes, folder: Path) -> None:
    """Written by one process and by two and four that share a model, read by each."""
    expected = torch.load(folder / "adapter_1" / "adapter.pth", weights_only=True)
    for by_size in processes:
        assert set(by_size[4]["adapters"]) == {"adapter_1"}
        assert set(by_size[2]["adapters"]) == {"adapter_1", "adapter_4"}
        for state in (*by_size[4]["adapters"].values(), *by_size[2]["adapters"].values()):
            require_identical(state, expected)
    for size in SIZES:
        llm = Llama.build(BASE, folder / f"adapter_{size}", device="cpu")
        require_identical(adapter_state_dict(llm.model), expected)


# Of each of COPIED: the process whose copy process 3 is compared with, by model-parallel size
HOLDERS = {4: (0, None, 2), 2: (0, 1, 1)}


@pytest.mark.parametrize("size", SIZES)
def test_copies_that_drift_apart_are_named_on_all_processes(processes, size: int) -> None:
    other = "has other values than process {}; they must be equal"
    expected: dict[str, str | None] = {
        f"{key} 3": first if first is None else f"{key}: process 3 {other.format(first)}"
        for key, first in zip(COPIED, HOLDERS[size], strict=True)
    }
    expected[f"{COPIED[0]} 0"] = f"{COPIED[0]}: process 1 {other.format(0)}"
    assert all(by_size[size]["drifts"] == expected for by_size in processes)


def test_one_process_has_no_copies() -> None:
    assert_replicas_equal(build("lora").model)


def test_impossible_sizes_are_refused_with_the_numbers(processes) -> None:
    words = {
        "heads": "n_heads (3) cannot be cut into {} equal parts",
        "kv_heads": "n_kv_heads (3) cannot be cut into {} equal parts, nor each be held by equally many of {}",
        "ffn": "feed-forward width (171) cannot be cut into {} equal parts",
        "vocab": "vocab_size (511) cannot be cut into {} equal parts",
        "no weights": "n_heads (3) cannot be cut into {} equal parts",  # nothing was loaded before
        "processes": "model_parallel_size 3 does not divide the 4 processes of this run",
    }
    for by_size in processes:
        for size in SIZES:
            messages = by_size[size]["refusals"]
            assert messages.keys() == words.keys()
            assert all(words[name].format(size, size) in text for name, text in messages.items()), messages


@pytest.mark.parametrize("size, words", [(2, "2 does not divide the 1 processes"), (0, "0 ")])
def test_one_process_cannot_be_two_ranks(size: int, words: str) -> None:
    with pytest.raises(ValueError, match=f"model_parallel_size {words}"):
        Llama.build(BASE, device="cpu", model_parallel_size=size)


@pytest.mark.parametrize("device", ["tpu", "gpu", "meta", "cuda:x"])
def test_unknown_devices_are_named(device: str) -> None:
    with pytest.raises(ValueError, match=f"device '{device}' is not one of auto, cpu, cuda, cuda:N"):
        Llama.build(BASE, device=device)


def test_a_gpu_that_is_not_there(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert get_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'cuda:0': this machine has no GPU"):
        get_device("cuda:0")
