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
from moa.replicas import assert_replicas_equal
from moa.state import adapter_state_dict
from observe import DRIFTING, EVERYTHING, IMPOSSIBLE, LARGE, SIZES, WORLD
from tiny import BASE, METHODS, PARAMS, build, golden_state, relative, save, write_base

Found = dict[str, Any]


def write_folders(folder: Path) -> None:
    """The golden base in all kinds of shards, a large one, one of an impossible shape without weights, an adapter."""
    state = golden_state()
    for shards in (1, 2, 4):
        write_base(folder / f"base_{shards}", PARAMS, state, shards)
    wide, shared = (write_base(folder / f"base_{kind}", PARAMS, state, 4) for kind in ("wide", "shared"))
    for i, part in enumerate(state["tok_embeddings.weight"].chunk(4, 1)):  # LLaMA-2's way
        change(wide / f"consolidated.{i:02d}.pth", {"tok_embeddings.weight": part.clone()})
    for i in range(4):  # two shards hold the same of two key/value heads
        heads = {key: state[key].chunk(2)[i // 2].clone() for key in state if ".wk." in key or ".wv." in key}
        change(shared / f"consolidated.{i:02d}.pth", heads)
    init_distributed(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    shapes = {key: tensor.shape for key, tensor in Transformer(LARGE).named_parameters()}
    large = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    for shards in (1, 4):
        write_base(folder / f"large_{shards}", {}, large, shards)
    for file in write_base(folder / "impossible", PARAMS | IMPOSSIBLE["heads"], {}).glob("*.pth"):
        file.unlink()
    save(build(EVERYTHING), folder / "adapter_1")


def change(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    torch.save(torch.load(file, weights_only=True) | tensors, file)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where four processes found their checkpoints and left what they observed. Starting them takes seconds: once."""
    folder = tmp_path_factory.mktemp("ranks")
    write_folders(folder)
    for said in side_by_side(observe.__file__, WORLD, folder, timeout=600):
        assert "Traceback" not in said
    return folder


@pytest.fixture(scope="module")
def everyone(folder: Path) -> list[dict[int, Found]]:
    """By process, then by model-parallel size."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(params=SIZES)
def ranks(request, everyone) -> list[Found]:
    """What all processes observed at one model-parallel size."""
    return [found[request.param] for found in everyone]


@pytest.fixture(scope="module", params=METHODS)
def one(request) -> tuple[str, Found]:
    """A method, and what one process observes."""
    return request.param, observe.observe(request.param, 1)


@pytest.fixture
def compared(one, ranks) -> tuple[Found, list[Found]]:
    """(one process, the several that share a model) for one method and size."""
    name, alone = one
    return alone, [rank["methods"][name] for rank in ranks if name in rank["methods"]]


def require_equal(found: Found, wanted: Found, bound: float, exact: Found | None = None) -> None:
    """Every tensor by its norm. exact: the same in float64; where it shows `wanted` to be some way off by rounding
    alone (the small rest of large sums), `found` may be five times as far. Of a single number that may be luck: it may
    also be off by a few last bits of what was summed, which is of the size of one."""
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert tensor.norm() > 0, key
        rounding = relative(tensor, exact[key]) if exact else 0.0
        # AdaMoLE's threshold sees differences of nearly equal numbers; in float64 it is as exact as the rest
        rounding = max(rounding, 1e-5 if exact and "threshold" in key else 0.0)
        few_bits = exact is not None and tensor.numel() == 1 and (found[key] - tensor).norm() < 1.5e-6
        assert few_bits or relative(found[key], tensor) < max(bound, 5 * rounding), key


def test_logits_and_loss(compared) -> None:
    alone, shared = compared
    for rank in shared:
        assert rank["logits"].shape == alone["logits"].shape
        assert relative(rank["logits"], alone["logits"]) < 1e-5
        assert relative(rank["float32"]["loss"], alone["float32"]["loss"]) < 1e-6
        assert torch.equal(rank["float32"]["loss"], shared[0]["float32"]["loss"])


def test_every_gradient_in_float32(compared) -> None:
    alone, shared = compared
    exact = alone["float64"]["gradients"]
    for rank in shared:
        require_equal(rank["float32"]["gradients"], alone["float32"]["gradients"], 1e-5, exact)


@pytest.mark.parametrize("kind", ["float64", "ffn", "all"])
def test_every_gradient(compared, kind: str) -> None:
    """To a bound far below what any mistake would do."""
    alone, shared = compared
    for rank in (rank for rank in shared if kind in rank):
        require_equal(rank[kind]["gradients"], alone[kind]["gradients"], 1e-9)
        assert relative(rank[kind]["loss"], alone[kind]["loss"]) < 1e-7  # a float32


def test_gradients_of_what_several_ranks_hold_are_equal_on_them(compared) -> None:
    """To the bit: or else what should be one parameter would drift apart."""
    _, shared = compared
    n_compared = 0
    for key in shared[0]["float32"]["local"]:
        _, parts = shared[0]["cut"].get(key, (0, 1))
        for part in range(parts):
            holders = shared[part * len(shared) // parts : (part + 1) * len(shared) // parts]
            first, *others = (rank["float32"]["local"][key] for rank in holders)
            assert all(torch.equal(first, other) for other in others), key
            n_compared += len(others)
    assert n_compared


def test_adapters_are_cut_as_their_layers_are(compared) -> None:
    alone, shared = compared
    columns, rows = ("Q", "K", "V", "FFN_UP", "FFN_GATE"), ("O", "FFN_DOWN")
    outputs = {f"lora_{target}.lora_B" for target in columns} | {f"bias_{target}.bias" for target in columns}
    inputs = {f"lora_{target}.lora_A" for target in rows}
    routers = {f"lora_{target}.expert_router.{name}.weight" for target in rows for name in ("proj", "threshold")}
    expected = {key for key in alone["state"] if key.endswith((*outputs, *inputs, *routers, "prompt.gate"))}
    for rank in shared:
        assert set(rank["cut"]) == expected
        for key, (_, parts) in rank["cut"].items():
            assert parts == (2 if key.endswith(("lora_K.lora_B", "lora_V.lora_B")) else len(shared)), key


def test_generation(compared) -> None:
    alone, shared = compared
    assert any(alone["greedy"]) and alone["greedy"] != alone["sampled"]
    for rank in shared:
        assert rank["greedy"] == rank["greedy with copies"] == alone["greedy"] == alone["greedy with copies"]
        assert rank.get("sampled", alone["sampled"]) == alone["sampled"]
    assert len(shared) == 4 or "sampled" in shared[0]


def test_start_and_state_do_not_depend_on_the_cut(compared) -> None:
    alone, shared = compared
    for rank in shared:
        for kind in ("fresh", "state"):
            require_identical(rank[kind], alone[kind])
        require_identical(rank["state"], rank["loaded"])


def require_identical(found: Found, wanted: Found) -> None:
    assert found.keys() == wanted.keys() and wanted
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("name", METHODS)
def test_a_step_divided_between_replicas_is_the_step_of_one_process(everyone, name: str) -> None:
    """Through the project's own loop, rows of unequal lengths, replicas cut in two."""
    require_same_step([rank[2]["steps"][name] for rank in everyone], observe.observe_step(name, 1, exact=True), 1e-9)


def test_a_divided_step_in_float32(ranks) -> None:
    alone = observe.observe_step("soft_moa", 1, exact=False)
    require_same_step([rank["step in float32"] for rank in ranks], alone, 1e-5)


def require_same_step(found: list[Found], alone: Found, bound: float) -> None:
    for rank in found:
        assert rank["loss"] == pytest.approx(alone["loss"], rel=1e-6) and len(rank["loss"]) == 1
        require_equal(rank["gradients"], alone["gradients"], bound)
        assert rank["state"].keys() == alone["state"].keys()
        for key, tensor in alone["state"].items():  # AdamW's first step is a sign where gradients are large
            assert relative(rank["state"][key], tensor) < max(1e-7, 10 * bound), key


def test_a_noisy_router_draws_the_same_on_all_ranks(ranks) -> None:
    alone = observe.observe_noise(1)
    assert {key for key in alone["gradients"] if ".noise." in key}
    for rank in ranks:
        torch.testing.assert_close(rank["noise"]["loss"], alone["loss"], rtol=1e-5, atol=1e-5)
        require_equal(rank["noise"]["gradients"], alone["gradients"], 1e-4)


def test_golden_numbers(ranks) -> None:
    assert len(set().union(*(rank["golden"] for rank in ranks))) == 18
    for rank in ranks:
        assert max(rank["golden"].values()) < 1e-5, rank["golden"]


def test_exchanges_leave_other_branches_alone(ranks) -> None:
    """Reducing in place would corrupt a gradient, or an input, that another branch uses too."""
    size = max(rank["rank"] for rank in ranks) + 1
    total = torch.tensor([1.0, 2.0]) * sum(range(1, size + 1))
    for rank in ranks:
        found, own = rank["exchanges"], torch.tensor([1.0, 2.0]) * (rank["rank"] + 1)
        assert torch.equal(found["u"], total)  # summed over ranks
        assert torch.equal(found["v"], own)
        assert torch.equal(found["x"], own) and torch.equal(found["sum"], total)
        assert torch.equal(found["w"], 2 * own)


@pytest.mark.parametrize("name", ["base_1", "base_2", "base_4", "base_wide", "base_shared"])
def test_any_number_of_shards_loads_at_any_size(ranks, folder: Path, name: str) -> None:
    for rank in ranks:
        require_identical(rank["bases"][name], golden_state())
    model = Llama.build(folder / name).model
    require_identical(observe.whole_base(model), golden_state())


def test_what_is_copied_out_of_the_files(everyone) -> None:
    """Of the layers, when nothing is converted; processes of a machine share the rest."""
    columns, cut = ["w2", "wo"], ["output", "tok_embeddings", "w1", "w2", "w3", "wk", "wo", "wq", "wv"]
    expected = {
        4: {"base_1": columns, "base_2": columns, "base_4": ["wk", "wv"], "base_shared": []},
        2: {"base_1": columns, "base_2": [], "base_4": cut, "base_shared": sorted({*cut} - {"wk", "wv"})},
    }
    for size in SIZES:
        for rank in everyone:
            assert {name: rank[size]["copied"][name] for name in expected[size]} == expected[size]
            assert rank[size]["copied"]["base_wide"] == sorted({*rank[size]["copied"]["base_4"], "tok_embeddings"})


def test_a_rank_reads_its_own_part_of_a_checkpoint(ranks) -> None:
    size = max(rank["rank"] for rank in ranks) + 1
    for rank in ranks:
        for name in ("large_1", "large_4"):
            read = rank["read"][name]
            assert read["by torch"] == read["needed"] < 20_500_000 / size  # of 19.9 MB in all; ranks share heads
            assert read["otherwise"] < 0.25  # small tensors, for their checksums
        mine = range(rank["rank"] * 4 // size, (rank["rank"] + 1) * 4 // size)
        for i, share in enumerate(rank["read"]["large_4"]["mapped"]):
            if i in mine:
                assert share > 0.9
            elif i > 0:  # the first has the norms of all, and the system maps some more around them
                assert share < 0.05


def test_adapter_files_are_whole(everyone, folder: Path) -> None:
    """Written by one process and by two and four that share a model, read by each."""
    wanted = torch.load(folder / "adapter_1" / "adapter.pth", weights_only=True)
    for rank in everyone:
        assert set(rank[4]["adapters"]) == {"adapter_1"} and set(rank[2]["adapters"]) == {"adapter_1", "adapter_4"}
        for state in (*rank[4]["adapters"].values(), *rank[2]["adapters"].values()):
            require_identical(state, wanted)
    for size in SIZES:
        llm = Llama.build(BASE, folder / f"adapter_{size}", device="cpu")
        require_identical(adapter_state_dict(llm.model), wanted)


def test_copies_that_drift_apart_are_named_on_all_processes(everyone) -> None:
    a, b, shared_b, norm = DRIFTING
    copies = {  # of the copy that each process holds: the processes that hold it
        4: {a: "0123 0123 0123 0123", b: "0 1 2 3", shared_b: "01 01 23 23", norm: "0123 0123 0123 0123"},
        2: {a: "0123 0123 0123 0123", b: "02 13 02 13", shared_b: "02 13 02 13", norm: "0123 0123 0123 0123"},
    }
    for size in SIZES:
        expected: dict[str, str | None] = {}
        for key, holders in copies[size].items():
            for rank, held in enumerate(holders.split()):
                first, *rest = held
                others = rest if first == str(rank) else [str(rank)]
                named = f"process{'es' * (len(others) > 1)} {', '.join(others)} {'have' if len(others) > 1 else 'has'}"
                problem = f"{key}: {named} other values than process {first}; they must be equal"
                expected[f"{key} {rank}"] = problem if len(held) > 1 else None
        expected["other adapters"] = "process 2 has another model or other adapters than process 0"
        assert all(rank[size]["drifts"] == expected for rank in everyone)


def test_one_process_has_no_copies() -> None:
    assert_replicas_equal(build("lora").model)


def test_impossible_sizes_are_refused_with_the_numbers(everyone) -> None:
    for rank in everyone:
        for size in SIZES:
            found = rank[size]["refusals"]
            for what, words in {
                "heads": "n_heads (3) cannot be cut into {} equal parts",
                "kv_heads": "n_kv_heads (3) cannot be cut into {} equal parts, nor each be held by equally many of {}",
                "ffn": "feed-forward width (171) cannot be cut into {} equal parts",
                "vocab": "vocab_size (511) cannot be cut into {} equal parts",
                "no weights": "n_heads (3) cannot be cut into {} equal parts",  # nothing was loaded before
            }.items():
                assert words.format(size, size) in found.pop(what)
            assert found.pop("processes") == "model_parallel_size 3 does not divide the 4 processes of this run"
            assert not found


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
    assert get_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'cuda:0': this machine has no GPU"):
        get_device("cuda:0")
