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
from inspection.router_file import read_statistics
from inspection.router_recorder import RouterRecorder
from inspection.running_stats import BINS, QUANTILES, RouterStatistics, quantiles
from llama import Llama
from llama.data import encode_prompt
from llama.distributed import init_distributed
from llama.packing import PackedBatch
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


def whole_pass(llm: Llama, rows: list[list[int]], prompt_lens: list[int]) -> dict[str, Any]:
    statistics = RouterStatistics(llm.model)
    with statistics.recorder(), torch.inference_mode():
        packed = torch.tensor([token for row in rows for token in row])
        llm.model.forward_hidden(packed, PackedBatch([len(row) for row in rows], "cpu", prompt_lens))
    statistics.reduce()
    return statistics.result({"rows": len(rows)})


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
    used = (values > 0).sum(1)
    assert numbers["used"]["mean"] == pytest.approx(used.mean(), abs=1e-6)
    assert numbers["used"]["histogram"] == np.bincount(used, minlength=values.shape[1] + 1).tolist()


def entropy(p: np.ndarray) -> float:
    return -sum(v * math.log(v) for v in p if v > 0) / math.log(len(p))


@pytest.mark.parametrize("name", ROUTED.split())
def test_statistics_equal_the_formulas(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, rows = shared(name) if name == "custom" else golden(name), some_rows()
    result = whole_pass(llm, rows, PROMPTS)
    wanted = Recomputed(llm, rows, monkeypatch)
    assert result["counts"] == {"prompt": sum(PROMPTS), "answer": sum(ANSWERS), "all": sum(PROMPTS + ANSWERS)}
    assert [block["layer"] for block in result["blocks"]] == sorted(wanted.gates)
    assert {(mixture["layer"], mixture["slot"]) for mixture in result["experts"]} == wanted.experts.keys()
    assert result["blocks"] or result["experts"]
    for block in result["blocks"]:
        per_row = result["block_router"] in ("instance", "unipelt")
        assert block["unit"] == ("row" if per_row else "token")
        assert block["slots"] == [slot.name for slot in llm.model.config.slots(block["layer"])]
        parts = parts_of(wanted.gates[block["layer"]], per_row)
        assert block["parts"].keys() == parts.keys()
        for part, values in parts.items():
            require_numbers(block["parts"][part], values)
        assert ("threshold" in block["parts"]["all"]) == (result["block_router"] == "sparse")
        for part, values in parts_of(wanted.limits[block["layer"]]).items() if wanted.limits else ():
            require_numbers(block["parts"][part]["threshold"], values)
    for mixture in result["experts"]:
        for part, values in parts_of(wanted.experts[mixture["layer"], mixture["slot"]]).items():
            numbers = mixture["parts"][part]
            require_numbers(numbers, values)
            assert numbers["balance"] == pytest.approx(entropy(values.sum(0) / values.sum()), abs=1e-6)
            assert numbers["entropy"] == pytest.approx(np.mean([entropy(p) for p in values]), abs=1e-6)


@pytest.mark.parametrize("name", ["soft_moa", "sparse_moa", "unipeft", "adamole", "mola", "mixlora", "custom"])
@pytest.mark.parametrize("max_rows", [1, 8])
def test_generating_counts_what_one_pass_over_prompts_and_answers_counts(name: str, max_rows: int) -> None:
    llm = shared(name)
    prompts = [tokens(n, seed=n).tolist() for n in (5, 3, 7)]
    statistics, before = RouterStatistics(llm.model), llm.max_batch_size
    llm.max_batch_size = max_rows
    try:
        with statistics.recorder():
            answers = llm.generate(prompts, 6, min_new_tokens=6)
    finally:
        llm.max_batch_size = before
    statistics.reduce()
    assert [len(answer) for answer in answers] == [6, 6, 6]
    # The last token of an answer is chosen, and never read.
    rows = [prompt + answer[:-1] for prompt, answer in zip(prompts, answers, strict=True)]
    assert_close(statistics.result({"rows": 3}), whole_pass(llm, rows, [len(prompt) for prompt in prompts]))


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


def test_no_hook_is_left_and_nothing_of_the_model_changes() -> None:
    llm, prompts = build("custom"), [tokens(5).tolist()]
    state = {key: t.clone() for key, (t, *_) in adapter_parameters(llm.model).items()}
    plain, before = llm.generate(prompts, 8), hooks(llm)
    statistics = RouterStatistics(llm.model)
    assert before == hooks(llm) == 0
    with statistics.recorder():
        assert hooks(llm) > 0
        assert llm.generate(prompts, 8) == plain
    assert hooks(llm) == 0
    with pytest.raises(RuntimeError, match="stop"), statistics.recorder():
        raise RuntimeError("stop")
    assert hooks(llm) == 0 and statistics.counts.sum() == 5 + 7
    assert all(torch.equal(t, state[key]) for key, (t, *_) in adapter_parameters(llm.model).items())


def test_batches_come_as_soon_as_there_are_enough_tokens() -> None:
    llm, sizes = shared("soft_moa"), []
    with RouterRecorder(llm.model, lambda batch: sizes.append(len(batch.is_answer)), flush_tokens=10):
        llm.generate([tokens(7).tolist(), tokens(4, seed=1).tolist()], 8, min_new_tokens=8)
    assert sizes == [11, 10, 4]


def test_a_model_without_a_router_is_refused() -> None:
    for name in ("lora", None):
        with pytest.raises(ValueError, match="has no router"):
            RouterStatistics(shared(name).model)


def test_quantiles_of_a_histogram() -> None:
    one_bin, two_bins = quantiles(torch.tensor([[0.0, 4, 0, 0], [1, 0, 0, 1]])).tolist()
    assert one_bin == pytest.approx([0.25 + 0.25 * q for q in QUANTILES])
    assert two_bins == pytest.approx([0.025, 0.125, 0.25, 0.875, 0.975])


def test_what_was_saved_is_read_again_and_nothing_else(tmp_path: Path) -> None:
    result, file = whole_pass(shared("sparse_moa"), some_rows(), PROMPTS), tmp_path / "a.json"
    file.write_text(json.dumps(result, allow_nan=False))
    assert read_statistics(file) == result
    for change in ({"format": "x"}, {"version": 1}, {"blocks": 1}):
        file.write_text(json.dumps(result | change))
        with pytest.raises(ValueError, match="a.json: not router statistics"):
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
    assert "adapters used per layer" in capsys.readouterr().out
    assert result["source"]["rows"] == 3 and result["source"]["answers"] == "generated"
    assert str(tmp_path) not in json.dumps(result)
    rows = json.loads(data.read_text())[:3]
    llm = build("sparse_moa", max_seq_len=256)
    prompts = [encode_prompt(llm.tokenizer, row, 250) for row in rows]
    answers = llm.generate(prompts, 6)
    assert result["counts"]["prompt"] == sum(map(len, prompts))
    assert result["counts"]["answer"] == sum(min(len(answer), 5) for answer in answers)
    texts = ["An answer", ["two", "samples"], ""]
    lines = [json.dumps(row | {"generate": text}) for row, text in zip(rows, texts, strict=True)]
    predictions.write_text("\n".join(lines))
    result = gates(tmp_path, "sparse_moa", "--predict_file", predictions, "--max_gen_len", 6)
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
        ([], "give one of --data_path, --prompt and --predict_file", 2),
        (["--prompt", "a", "--data_path", "b"], "--data_path and --prompt", 2),
        (["--prompt", "a", "--max_gen_len", "256"], "--max_gen_len 256 must be below --max_seq_len", 2),
        (["--data_path", "none.json"], "none.json: no such file", 1),
        (["--prompt", "word " * 60], "no row leaves room", 1),
    ],
)
def test_gates_refuses(tmp_path: Path, words: list[str], message: str, status: int, capsys) -> None:
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
    assert "gates, row, figures" in capsys.readouterr().err
