"""Router statistics beside a recomputation from the formulas, token by token."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import plain_model
from commands import torchrun, write_rows
from inspection import router_stats as command
from inspection.__main__ import MODULES
from inspection.__main__ import main as inspect
from inspection.router_recorder import record
from inspection.running_stats import BINS, RouterStatistics, read_statistics
from llama import Llama
from llama.data import encode_prompt
from llama.distributed import init_distributed
from moa.state import adapter_parameters
from plain_model import PlainModel
from test_golden import load as golden
from tiny import BASE, PARAMS, build, save, shared, tokens

# The authors' implementation's adapters on its base, and beside them what no method of theirs combines
ROUTED = "soft_moa soft_moa_linear_router soft_moa_experts sparse_moa sparse_moa_const_threshold soft_moa_instance "
ROUTED += "unipeft molora hydralora topk_moelora adamole parallel_adapter_moe prompt_moe custom"
PROMPTS, ANSWERS = [5, 4, 3], [3, 2, 4]
IS_ANSWER = np.array([is_answer for p, a in zip(PROMPTS, ANSWERS, strict=True) for is_answer in [0] * p + [1] * a])


class Recomputed:
    """All gates, thresholds and weights of experts of a plain model: a row of numbers per token (or per row)."""

    def __init__(self, llm: Llama, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch):
        self.gates: dict[int, list[list[float]]] = {}
        self.limits: dict[int, list[list[float]]] = {}
        self.experts: dict[tuple[int, str], list[list[float]]] = {}
        gates_of, experts_of = plain_model.Block.gates, plain_model.Block.experts

        def gates(block: plain_model.Block, x: Tensor) -> dict:
            result, layer = gates_of(block, x), int(block.path.split(".")[1])
            if block.slots and block.flat["block_router"] != "none":
                self.gates.setdefault(layer, []).append([float(gate) for gate in result.values()])
                if block.flat["block_router"] == "sparse":
                    self.limits.setdefault(layer, []).append([limit(block, x)])
            return result

        def experts(block: plain_model.Block, slot: str, u: Tensor) -> Tensor:
            weights = experts_of(block, slot, u)
            if block.flat["expert_num"] > 1:
                self.experts.setdefault((int(block.path.split(".")[1]), slot), []).append(weights.tolist())
            return weights

        monkeypatch.setattr(plain_model.Block, "gates", gates)
        monkeypatch.setattr(plain_model.Block, "experts", experts)
        w = {k: t.detach().double() for k, t in llm.model.named_parameters()}
        model = PlainModel(PARAMS, llm.model.config.to_dict(), w)
        for row, prompt_len in zip(rows, PROMPTS, strict=True):
            model.logits(row, prompt_len)


def limit(block: plain_model.Block, x: Tensor) -> float:
    """G_max s(w x + b), or G_max."""
    if block.flat["const_threshold"]:
        return block.flat["max_threshold"]
    w, b = block.here["router.threshold.weight"], block.here["router.threshold.bias"]
    return block.flat["max_threshold"] / (1 + math.exp(-float(w[0] @ x + b[0])))


def statistics_of(llm: Llama, prompts: list[list[int]], answers: list[list[int]]) -> dict[str, Any]:
    statistics = RouterStatistics(llm)
    statistics.read(prompts, answers)
    statistics.reduce()
    return statistics.result({"rows": len(prompts)})


def split(rows: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    pairs = list(zip(rows, PROMPTS, strict=True))
    return [row[:n] for row, n in pairs], [row[n:] for row, n in pairs]


def some_rows() -> list[list[int]]:
    return [tokens(p + a, seed=p).tolist() for p, a in zip(PROMPTS, ANSWERS, strict=True)]


def parts_of(values: list[list[float]], per_row: bool = False) -> dict[str, np.ndarray]:
    """Numbers of all tokens (T, columns), row by row, by part."""
    every = np.array(values)
    return {"all": every} | ({} if per_row else {"prompt": every[IS_ANSWER == 0], "answer": every[IS_ANSWER == 1]})


def require_numbers(numbers: dict[str, Any], values: np.ndarray) -> None:
    """The numbers are those of values (T, columns)."""
    assert numbers["count"] == len(values)
    assert numbers["mean"] == pytest.approx(values.mean(0), abs=1e-6)
    assert numbers["std"] == pytest.approx(values.std(0), abs=1e-6)
    assert numbers["active"] == pytest.approx((values > 0).mean(0), abs=1e-6)
    bins = np.minimum((values * BINS).astype(int), BINS - 1)
    assert numbers["histogram"] == [np.bincount(column, minlength=BINS).tolist() for column in bins.T]


def entropy(p: np.ndarray) -> float:
    return -sum(v * math.log(v) for v in p if v > 0) / math.log(len(p))


@pytest.mark.parametrize("name", ROUTED.split())
def test_statistics_equal_the_formulas(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, rows = shared(name) if name == "custom" else golden(name), some_rows()
    result = statistics_of(llm, *split(rows))
    wanted = Recomputed(llm, rows, monkeypatch)
    assert result["counts"] == {"prompt": sum(PROMPTS), "answer": sum(ANSWERS), "all": sum(PROMPTS + ANSWERS)}
    of_blocks = [router for router in result["routers"] if router["slot"] is None]
    of_experts = [router for router in result["routers"] if router["slot"] is not None]
    assert [router["layer"] for router in of_blocks] == sorted(wanted.gates)
    assert {(router["layer"], router["slot"]) for router in of_experts} == wanted.experts.keys()
    assert result["routers"]
    for router in of_blocks:
        per_row = llm.model.config.to_dict()["block_router"] in ("instance", "unipelt")
        assert router["unit"] == ("row" if per_row else "token")
        assert router["names"] == [slot.name for slot in llm.model.config.slots(router["layer"])]
        parts = parts_of(wanted.gates[router["layer"]], per_row)
        assert router["parts"].keys() == parts.keys()
        for part, values in parts.items():
            require_numbers(router["parts"][part], values)
        assert ("threshold" in router["parts"]["all"]) == bool(wanted.limits)
        for part, limits in parts_of(wanted.limits[router["layer"]]).items() if wanted.limits else ():
            mean_and_std = {
                "mean": pytest.approx(limits.mean(), abs=1e-6),
                "std": pytest.approx(limits.std(), abs=1e-6),
            }
            assert router["parts"][part]["threshold"] == mean_and_std
    for router in of_experts:
        for part, values in parts_of(wanted.experts[router["layer"], router["slot"]]).items():
            require_mixture(router["parts"][part], values)


def require_mixture(numbers: dict[str, Any], values: np.ndarray) -> None:
    require_numbers(numbers, values)
    assert numbers["balance"] == pytest.approx(entropy(values.sum(0) / values.sum()), abs=1e-6)
    assert numbers["entropy"] == pytest.approx(np.mean([entropy(p) for p in values]), abs=1e-6)


@pytest.mark.parametrize("name", ["comol", "all_kinds"])
def test_weights_of_cores_are_softmax_of_the_projected_input(name: str) -> None:
    """Their router is a parameter of the adapter: recomputed from the input of each adapted layer."""
    llm, (prompts, answers), inputs = shared(name), split(some_rows()), {}
    adapters = {
        (block.layer, slot.name): ({**block.attention.adapters, **block.feed_forward.adapters}[slot.name], slot)
        for block in llm.model.layers
        for slot in llm.model.config.slots(block.layer)
        if slot.type == "comol"
    }
    hooks = [
        adapter.register_forward_hook(lambda _, args, output, key=key: inputs.update({key: args[0].double()}))
        for key, (adapter, _) in adapters.items()
    ]
    try:
        result = statistics_of(llm, prompts, answers)
    finally:
        for hook in hooks:
            hook.remove()
    routers = {(router["layer"], router["slot"]): router for router in result["routers"] if router["slot"]}
    assert adapters and adapters.keys() <= routers.keys()
    for key, (adapter, _) in adapters.items():
        logits = inputs[key] @ adapter.lora_A.detach().double().T @ adapter.core_router.detach().double().T
        assert routers[key]["names"] == ["0", "1", "2"]
        for part, values in parts_of(logits.softmax(-1).tolist()).items():
            require_mixture(routers[key]["parts"][part], values)


@pytest.mark.parametrize("name", ["soft_moa", "sparse_moa", "unipeft", "adamole", "mola", "mixlora", "comol", "custom"])
def test_rows_may_be_read_one_by_one(name: str) -> None:
    llm, (prompts, answers) = shared(name), split(some_rows())
    together, before = statistics_of(llm, prompts, answers), llm.max_batch_size
    llm.max_batch_size = 1
    try:
        assert_close(statistics_of(llm, prompts, answers), together)
    finally:
        llm.max_batch_size = before


def assert_close(result: Any, wanted: Any) -> None:
    """Equal, but for the last digits of floating-point numbers."""
    assert type(result) is type(wanted)
    if isinstance(result, dict):
        assert result.keys() == wanted.keys()
        result, wanted = list(result.values()), [wanted[key] for key in result]
    if isinstance(result, list):
        for pair in zip(result, wanted, strict=True):
            assert_close(*pair)
    else:
        assert result == (pytest.approx(wanted, abs=2e-6) if isinstance(result, float) else wanted)


def hooks(llm: Llama) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in llm.model.modules())


def test_no_hook_is_left_and_nothing_of_the_model_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    llm, (prompts, answers) = build("custom"), split(some_rows())
    state = {key: t.clone() for key, (t, *_) in adapter_parameters(llm.model).items()}
    plain = llm.generate(prompts, 8)
    (recording,) = record(llm, prompts, answers)
    assert len(recording.is_answer) == sum(PROMPTS + ANSWERS) and hooks(llm) == 0
    assert llm.generate(prompts, 8) == plain
    assert all(torch.equal(t, state[key]) for key, (t, *_) in adapter_parameters(llm.model).items())

    def broken(*_: object) -> None:
        assert hooks(llm) > 0
        raise RuntimeError("stop")

    monkeypatch.setattr(llm.model, "forward_hidden", broken)
    with pytest.raises(RuntimeError, match="stop"):
        list(record(llm, prompts, answers))
    assert hooks(llm) == 0


def test_a_model_without_a_router_is_refused() -> None:
    for name in ("lora", None):
        with pytest.raises(ValueError, match="has no router"):
            RouterStatistics(shared(name))


def test_what_was_saved_is_read_again_and_nothing_else(tmp_path: Path) -> None:
    result, file = statistics_of(shared("sparse_moa"), *split(some_rows())), tmp_path / "a.json"
    file.write_text(json.dumps(result, allow_nan=False))
    assert read_statistics(file) == result
    for change in ({"format": "x"}, {"version": 2}):
        file.write_text(json.dumps(result | change))
        with pytest.raises(ValueError, match="a.json: not moa-router-statistics of version 3"):
            read_statistics(file)


# The command


def flags(tmp_path: Path, name: str, *words: object) -> list[str]:
    adapter = tmp_path / "adapter"
    if not adapter.exists():
        save(shared(name), adapter)
    common = ["--adapter_path", adapter, "--ckpt_dir", BASE, "--device", "cpu", "--bf16", "False"]
    return [str(word) for word in (*common, "--max_seq_len", 256, *words)]


def gates(tmp_path: Path, name: str, *words: object) -> dict[str, Any]:
    out = tmp_path / "new" / "gates.json"
    command.main(flags(tmp_path, name, "--save_path", out, *words), "gates")
    init_distributed(torch.device("cpu"))  # the command leaves the process group
    return read_statistics(out)


def test_gates_of_a_file_and_of_its_answers(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data, predictions = write_rows(tmp_path / "test.json", 5), tmp_path / "predictions.jsonl"
    result = gates(tmp_path, "sparse_moa", "--data_path", data, "--max_rows", 3, "--max_gen_len", 6)
    assert "p_adapter      mean gate " in capsys.readouterr().out
    assert result["source"]["rows"] == 3 and result["source"]["answers"] == "generated"
    assert str(tmp_path) not in json.dumps(result)
    rows = json.loads(data.read_text())[:3]
    llm = build("sparse_moa", max_seq_len=256)
    prompts = [encode_prompt(llm.tokenizer, row, 250) for row in rows]
    answers = llm.generate(prompts, 6)
    assert result["counts"]["prompt"] == sum(map(len, prompts))
    assert result["counts"]["answer"] == sum(map(len, answers))
    texts = ["An answer", ["two", "samples"], ""]
    lines = [json.dumps(row | {"generate": text}) for row, text in zip(rows, texts, strict=True)]
    predictions.write_text("\n".join(lines))
    result = gates(tmp_path, "sparse_moa", "--data_path", predictions, "--max_gen_len", 6)
    assert result["source"]["rows"] == 4 and result["source"]["answers"] == "given"
    sizes = [len(prompts[i]) for i in (0, 1, 1, 2)]
    assert result["counts"] == {"prompt": sum(sizes), "answer": 6 + 3 + 6, "all": sum(sizes) + 15}


@pytest.mark.e2e
@pytest.mark.parametrize("name", ["sparse_moa", "soft_moa_experts"])
def test_two_processes_count_what_one_counts(tmp_path: Path, name: str) -> None:
    data, out = write_rows(tmp_path / "test.json", 5), tmp_path / "two.json"
    words = ["--data_path", data, "--max_gen_len", 6]
    alone = gates(tmp_path, name, *words)
    done = torchrun(2, "-m", "inspection", "gates", *flags(tmp_path, name, "--save_path", out, *words))
    assert done.returncode == 0, done.stderr
    both = read_statistics(out)
    assert (alone["source"].pop("processes"), both["source"].pop("processes")) == (1, 2)
    assert_close(both, alone)


@pytest.mark.parametrize(
    ("words", "message", "status"),
    [
        ([], "--data_path is required", 2),
        (["--data_path", "a", "--max_gen_len", "256"], "--max_gen_len 256 must be below --max_seq_len", 2),
        (["--data_path", "none.json"], "none.json: no such file", 1),
        (["--data_path", "LONG"], "no row leaves room", 1),
    ],
)
def test_gates_refuses(tmp_path: Path, words: list[str], message: str, status: int, capsys) -> None:
    (tmp_path / "LONG").write_text(json.dumps([{"instruction": "word " * 60, "input": ""}]))
    words = [word.replace("LONG", str(tmp_path / "LONG")) for word in words]
    with pytest.raises(SystemExit) as end:
        command.main(flags(tmp_path, "soft_moa", "--save_path", tmp_path / "x.json", *words), "gates")
    init_distributed(torch.device("cpu"))
    assert end.value.code == status and message in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_help_names_the_commands(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        inspect(["--help"])
    overview = capsys.readouterr().out
    assert all(f"python -m inspection {name} " in overview for name in MODULES)
    with pytest.raises(SystemExit):
        inspect(["gate"])
    assert "gates, row, report" in capsys.readouterr().err
