"""Measurements run, and compare like with like. Their times are not tested; what is computed is."""

import importlib
import io
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import common, generation, gpu, gpu_checks, models, peers, step
from benchmarks.common import PEFT, TINY, TRANSFORMERS
from benchmarks.compare import same_task, summary
from benchmarks.generation import agreement
from commands import REPO, refused, run, write_rows
from llama import ModelArgs
from llama.distributed import init_distributed
from llama.tokenizer import Tokenizer
from tiny import BASE

Run = Callable[..., tuple[dict[str, Any], str]]
GPU_WORDS = ["--shape", "tiny", "--device", "cpu", "--rows", 2, "--decode_rows", "1,3", "--context", 5, "--repeats", 1]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Run:
    """Runs `python -m benchmarks.NAME FLAGS --json FILE`, with all its processes, in this one -> JSON and output."""

    def run_process(words: list[object], *_: object) -> str:
        with redirect_stdout(io.StringIO()) as output:
            importlib.import_module(words[1]).main([str(word) for word in words[2:]])
        return output.getvalue()

    def call(name: str, *words: object) -> tuple[dict[str, Any], str]:
        file = tmp_path / "figures.json"
        monkeypatch.setattr(common, "run_process", run_process)
        monkeypatch.setattr(models, "measure_machine", lambda *_: models.Machine(1e11, 1e11))
        importlib.import_module(f"benchmarks.{name}").main([*map(str, words), "--json", str(file)])
        return json.loads(file.read_text()), capsys.readouterr().out

    init_distributed(torch.device("cpu"))
    return call


def table_rows(printed: str) -> list[str]:
    """First cells of a table's lines, without its head."""
    return [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")][1:]


def test_a_step_is_measured_beside_pefts_on_the_same_task(tmp_path: Path) -> None:
    """Equal first losses are required by the command itself: PEFT's model has our weights and our labels."""
    data, file = write_rows(tmp_path / "rows.json", 8), tmp_path / "figures.json"
    words = ["--ckpt_dir", BASE, "--data_path", data, "--methods", "soft_moa", "--rows", 2, "--repeats", 2, "--peft"]
    result = run("-m", "benchmarks.step", *words, "--rounds", 1, "--threads", 1, "--json", file)
    assert result.returncode == 0, result.stderr
    figures = json.loads(file.read_text())
    ours, theirs = figures["kinds"]["soft_moa"], figures["kinds"][PEFT]
    assert all(f["seconds_per_step"] > 0 and f["peak_memory_bytes"] > 0 for f in (ours, theirs))
    assert theirs["trainable"] == 35_328 < ours["trainable"]
    ours, theirs = (figures["runs"][kind][0] for kind in ("soft_moa", PEFT))
    assert ours["tokens"] == theirs["tokens"] and len(ours["tokens"]) == len(ours["seconds"]) == 2
    assert table_rows(result.stdout) == ["soft_moa", PEFT]


def test_generation_is_measured_beside_its_peers_on_the_same_task(tmp_path: Path, command: Run) -> None:
    """Transformers and PEFT, on our weights, answer token by token as our base does: padding is masked."""
    data = write_rows(tmp_path / "rows.json", 12)
    words = ["--ckpt_dir", BASE, "--data_path", data, "--methods", "lora", "--prompts", 12, "--new_tokens", 36]
    words += ["--peft", "--repeats", 1, "--rounds", 2, "--threads", 1, "--bf16", "False"]
    figures, printed = command("generation", *words)
    assert list(figures["kinds"]) == ["base", "lora", TRANSFORMERS, PEFT] == table_rows(printed)
    for kind, f in figures["kinds"].items():
        assert f["same_tokens"] == {"first": 1.0, "all": 1.0} and f["tokens"] == 12 * 36
        assert f["seconds_per_answer"] > 0 and f["peak_memory_bytes"] > 0
        assert [len(r["seconds"]) for r in figures["runs"][kind]] == [1, 1]


def test_answers_end_where_the_model_ends_them(tmp_path: Path, command: Run, monkeypatch) -> None:
    """Transformers and PEFT give the same answers as we do, whatever rows shared their batch."""
    original = Tokenizer.__init__

    def with_more_stops(self: Tokenizer, *words: Any) -> None:
        original(self, *words)
        self.stop_ids = tuple(range(0, 512, 7))  # or random weights would hardly ever stop

    monkeypatch.setattr(Tokenizer, "__init__", with_more_stops)
    words = ["--ckpt_dir", BASE, "--data_path", write_rows(tmp_path / "rows.json", 7), "--methods", "", "--peft"]
    words += ["--natural_stops", "--prompts", 7, "--batch_size", 3, "--new_tokens", 12, "--rounds", 1]
    kinds = command("generation", *words, "--repeats", 1, "--threads", 1, "--bf16", "False")[0]["kinds"]
    assert all(f["same_tokens"] == {"first": 1.0, "all": 1.0} for f in kinds.values())
    assert 7 < kinds["base"]["tokens"] == kinds[PEFT]["tokens"] < 7 * 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["step", "--methods", "lora,lora"], "--methods: lora is there twice"),
        (["step", "--rows", 0], "--rows must be at least 1, not 0"),
        (["generation", "--methods", "lorra"], "--methods: 'lorra' is none of soft_moa, "),
        (["generation", "--llama_cpp"], "--llama_cpp needs --batch_size 1"),
        (["gpu", "--parts", "step,all"], "--parts: all is none of "),
        (["gpu", "--decode_rows", "1,x"], "--decode_rows: expected whole numbers above 0"),
        (["compare", "--base", "/nowhere", "--what", "step"], "--base /nowhere: no finetune.py there"),
        (["compare", "--base", REPO, "--what", "step", "--max_steps", 2], "--max_steps must be above 2"),
    ],
)
def test_flags_that_make_no_sense_are_refused(command: Run, capsys, words: list, message: str) -> None:
    with pytest.raises(SystemExit) as exit_info:
        command(*words)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_too_few_rows_are_refused(tmp_path: Path) -> None:
    words = ["--ckpt_dir", BASE, "--data_path", write_rows(tmp_path / "rows.json", 2)]
    refused(run("-m", "benchmarks.generation", *words, "--prompts", 3), "--prompts 3", "2 rows")
    refused(run("-m", "benchmarks.step", *words, "--rows", 1, "--repeats", 2), "3 rows are needed, 2 fit")


@pytest.mark.parametrize("what", ["step", "generation"])
def test_a_checkout_is_compared_with_itself(tmp_path: Path, what: str) -> None:
    data, file = write_rows(tmp_path / "rows.json", 8), tmp_path / "figures.json"
    words = ["--base", REPO, "--what", what, "--methods", "lora", "--ckpt_dir", BASE, "--data_path", data]
    words += ["--rounds", 1, "--threads", 1, "--json", file, "--bf16", "False", "--prompts", 3, "--new_tokens", 4]
    result = run("-m", "benchmarks.compare", *words, "--batch_size", 2, "--max_steps", 3)
    assert result.returncode == 0, result.stderr
    figures = json.loads(file.read_text())["methods"]["lora"]
    assert figures["same"] == {"step": "0.0000", "generation": "yes"}[what]
    assert figures["seconds_ratio"] > 0 and table_rows(result.stdout) == ["lora"]


def test_ratios_of_a_comparison() -> None:
    def runs(*seconds: list[float], loss: float = 1.0) -> list[dict[str, Any]]:
        more = {"cpu_seconds": 7, "tokens": [5], "losses": [loss]}
        return [{"seconds": s, "peak_memory_bytes": 100 * s[0]} | more for s in seconds]

    both = {"base": runs([1, 2, 3], [2, 3, 4], [9, 9, 9]), "this": runs([2, 4, 6], [3, 3, 3], [9, 9, 8], loss=1.25)}
    figures = summary(both)
    assert figures["seconds_ratio"] == 4 / 3 and figures["fastest_ratio"] == 2 and figures["cpu_seconds_ratio"] == 1
    assert figures["peak_memory_bytes_ratio"] == 1.5 and same_task("step", both) == "0.2500"
    both["this"][0]["tokens"] = [6]
    with pytest.raises(ValueError, match="trained on different rows"):
        same_task("step", both)


def test_kinds_take_turns_forwards_and_backwards() -> None:
    assert "".join(common.interleave("abc", 3)) == "abccbaabc"


def test_agreement_counts_first_tokens_and_all() -> None:
    assert agreement([[1, 2], [3]], [[1, 3], [3]]) == {"first": 1.0, "all": 2 / 3}
    assert agreement([[1, 2], []], [[4, 2, 5], [6]]) == {"first": 0.0, "all": 1 / 4}


def test_the_gpus_command_runs_without_one(command: Run, monkeypatch) -> None:
    monkeypatch.setattr(gpu_checks, "MODELS", ["no_adapter", "soft_moa"])
    results, printed = command("gpu", *GPU_WORDS)
    assert not results["failed"] and not results["left_out"]
    assert all(f"{part}, soft_moa" in results for part in gpu.CHECKS) and "golden, no_adapter" in results
    for kind in ("soft_moa", PEFT):
        assert results[f"step, {kind}"]["tokens_per_second"] > 0
    for kind in ("soft_moa", "base", TRANSFORMERS, PEFT):
        assert all(f"decode, {kind}, {n} rows" in results for n in (1, 3))
    assert all(results[f"memory, soft_moa, {mode}"]["estimated_bytes"] > 0 for mode in ("none", "full"))
    assert results["trace, soft_moa, decode"]["kernels"] > results["trace, base, decode"]["kernels"]
    keys = [key for key in results if key not in ("task", "failed", "left_out")]
    assert all(f"\n{key}: " in printed for key in keys)
    theirs = [TRANSFORMERS in key or PEFT in key for key in keys]
    assert theirs == sorted(theirs), "what a user would install instead comes last"


def test_parts_of_the_gpus_command_and_its_time_box(command: Run) -> None:
    results, printed = command("gpu", *GPU_WORDS, "--parts", "memory", "--minutes", 0)
    assert results["left_out"] and all(key.startswith("memory, ") for key in results["left_out"])
    assert f"left out after 0 minutes: {results['left_out'][0]}" in printed


def test_a_part_that_fails_on_the_gpu_leaves_the_others(tmp_path, command: Run, monkeypatch, capsys) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error: unspecified\nat length")

    monkeypatch.setattr(gpu.Bench, "decode", broken)
    with pytest.raises(SystemExit) as exit_info:
        command("gpu", *GPU_WORDS, "--parts", "decode,trace")
    assert exit_info.value.code == 1 and "CUDA error" in capsys.readouterr().err
    results = json.loads((tmp_path / "figures.json").read_text())
    assert results["failed"]["decode, soft_moa, 3 rows"] == "RuntimeError: CUDA error: unspecified"
    assert "trace, base, decode" in results


@pytest.mark.parametrize("name", ["soft_moa", "sparse_moa", "topk_moelora"])
@pytest.mark.parametrize("part", gpu.CHECKS)
def test_a_device_that_computes_otherwise_is_found(part: str, name: str, monkeypatch) -> None:
    """The CPU passes; then what is loaded for the device has one wrong weight matrix."""
    check, device = gpu.CHECKS[part], torch.device("cpu")
    check(name, device)
    load = gpu_checks.load

    def load_damaged(name: str, where: torch.device, *more: Any, **settings: Any) -> Any:
        llm = load(name, where, *more, **settings)
        if where is device:
            llm.model.layers[1].attention.wo.weight.data.neg_()
        return llm

    monkeypatch.setattr(gpu_checks, "load", load_damaged)
    with pytest.raises(ValueError):
        check(name, device)


@pytest.fixture(scope="module")
def scaled() -> tuple[ModelArgs, dict[str, Tensor]]:
    """The tiny shape with LLaMA-3.1's angles, and weights so large that it matters what attention looks at."""
    args = ModelArgs(**TINY, use_scaled_rope=True)
    base = models.random_base(args, torch.float32, torch.device("cpu"))
    return args, {key: 8 * weight if weight.dim() > 1 else weight for key, weight in base.items()}


def test_a_peer_shares_our_weights(scaled: tuple[ModelArgs, dict[str, Tensor]]) -> None:
    args, base = scaled
    ours = {weight.data_ptr() for weight in base.values()}
    weights = list(peers.transformers_on(args, base).parameters())
    copies = [weight for weight in weights if weight.data_ptr() not in ours]
    assert len(weights) == len(base) and len(copies) == 2 * args.n_layers
    assert sum(weight.nbytes for weight in copies) == peers.copied_bytes(base)


def test_pefts_first_loss_is_our_loras(scaled: tuple[ModelArgs, dict[str, Tensor]]) -> None:
    """B is 0 in both, whatever A is. All of PEFT's B learn, in float32."""
    args, base = scaled
    rows = gpu.random_rows(3, args.vocab_size)
    assert rows == gpu.random_rows(3, args.vocab_size)
    assert len({len(row.tokens) for row in rows}) > 1, "no padding to be tested"
    ours = models.model_on(args, base, models.config_of("lora", args.n_layers))
    model = peers.new_lora(peers.transformers_on(args, base))
    losses = [train(1)[0]["loss"] for train in (models.trainer(ours, rows, 3), peers.trainer(model, rows, 3))]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 and "lora_" in name for name, p in trained.items())
    assert all(p.grad.any() for name, p in trained.items() if "lora_B" in name)


def test_peers_answer_as_our_base_does(scaled: tuple[ModelArgs, dict[str, Tensor]]) -> None:
    args, base = scaled
    prompts = [row.tokens for row in gpu.random_rows(3, args.vocab_size)]
    answers = models.llm_on(models.model_on(args, base, None), 300, 3).generate(prompts, 12, 12)
    assert len(set(map(tuple, answers))) == 3 and len(set(answers[0])) > 3
    for model in (peers.transformers_on(args, base), peers.new_lora(peers.transformers_on(args, base))):
        assert peers.padded_answers(model, [0], prompts, 12, 12, 3) == answers


def test_llama_cpp_answers_as_our_base_does(tmp_path: Path, command: Run) -> None:
    pytest.importorskip("xllamacpp")
    words = ["--ckpt_dir", BASE, "--data_path", write_rows(tmp_path / "rows.json", 3), "--methods", "", "--llama_cpp"]
    words += ["--batch_size", 1, "--prompts", 3, "--new_tokens", 8, "--rounds", 1, "--repeats", 1, "--threads", 1]
    kinds = command("generation", *words, "--bf16", "False")[0]["kinds"]
    assert kinds[common.LLAMA_CPP]["same_tokens"] == {"first": 1.0, "all": 1.0}


@pytest.mark.parametrize("package", ["xllamacpp", "transformers", "peft"])
def test_a_peer_that_is_missing_is_named(
    monkeypatch, package: str, scaled: tuple[ModelArgs, dict[str, Tensor]]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"{package} is not installed"):
        if package == "xllamacpp":
            peers.llama_cpp_server(str(BASE), False, 64, 1)
        peers.new_lora(peers.transformers_on(*scaled))
    for command in (step, generation) if package == "peft" else ():
        with pytest.raises(ValueError, match="peft is not installed"):
            command.Flags(peft=True)
