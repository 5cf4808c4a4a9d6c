"""`--dry_run` for layouts whose processes are not there."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.common import LLAMA_3_1
from commands import refused, run, write_rows
from llama.packing import balance_by_length
from tiny import PARAMS
from training.config import parse_flags
from training.dry_run import dry_run, print_dry_run


@pytest.fixture(autouse=True)
def outside(monkeypatch):
    """No torchrun around."""
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def config(folder, *words, params=PARAMS):
    (folder / "params.json").write_text(json.dumps(params))
    return parse_flags(["--dry_run", "--ckpt_dir", str(folder), *map(str, words)], {}, "")


def test_a_model_sharded_over_eight_needs_one_process(tmp_path, capsys):
    words = ("--model_parallel_size", 8, "--bf16", "--accum_iter", 2)
    print_dry_run(config(tmp_path, *words, params=LLAMA_3_1["8B"]))
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert result["layout"] == {"processes": 8, "model_parallel_size": 8, "data_parallel_size": 1}
    assert result["trainable_parameters"]["total"] == 24_520_288  # of the whole model
    assert 8_030_261_248 / 8 < result["memory_bytes"]["base"] / 2 < 8_030_261_248 / 8 * 1.001
    exchanged = result["exchanged_per_step"]
    assert exchanged["gradients"]["messages"] == 0 and exchanged["micro_batches"] == 2
    assert exchanged["micro_batch"]["bytes"] > 2 * 2 * 32 * 4 * 299 * 4096 * 2
    assert "steps of 8 rows, peak learning rate 0.0001875" in lines
    assert any("8 processes, 8 to a model" in line for line in lines)
    assert any(line.startswith("a micro-batch, of 2 in a step: ") for line in lines)
    assert any(line.startswith("total by --activation_checkpointing: none ") for line in lines)


def test_replicas_are_counted_from_the_environment(tmp_path, outside, capsys):
    outside.setenv("WORLD_SIZE", "8")
    given = config(tmp_path, "--model_parallel_size", 2, "--lora_rank", 2, "--method", "lora")
    result = dry_run(given)
    assert result["layout"] == {"processes": 8, "model_parallel_size": 2, "data_parallel_size": 4}
    assert result["rows_per_step"] == 16 and result["lr"] == 6e-3 * 16 / 256
    adapters = result["memory_bytes"]["adapters"]
    gradients = {"messages": 1, "bytes": adapters, "sent_bytes": round(1.5 * adapters)}
    assert result["exchanged_per_step"]["gradients"] == gradients
    outside.setenv("RANK", "1")  # torchrun's first process speaks for all
    print_dry_run(given)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("processes", "words"),
    [("3", "model_parallel_size 2 does not divide the 3 processes"), ("two", "WORLD_SIZE must be .*, not 'two'")],
)
def test_impossible_numbers_of_processes_are_refused(tmp_path, outside, processes, words):
    outside.setenv("WORLD_SIZE", processes)
    with pytest.raises(ValueError, match=words):
        dry_run(config(tmp_path, "--model_parallel_size", 2))


def test_a_gpu_can_be_planned_for_without_one(tmp_path, outside):
    given = config(tmp_path, "--device", "cuda", "--method", "lora")
    outside.setattr("torch.cuda.is_available", lambda: False)

    def result(device: str, bf16: bool | None) -> dict:
        return dry_run(replace(given, train=replace(given.train, device=device, bf16=bf16)))

    assert result("cuda", None) == result("cuda", True) and result("cuda", None)["bf16"]
    # In float32, with key heads that are shared, a GPU has no kernel that keeps no weights of attention
    for bf16 in (True, False):
        gpu, cpu = (result(device, bf16)["memory_bytes"] for device in ("cuda", "cpu"))
        assert (gpu["activations"] == cpu["activations"]) == bf16 and gpu["base"] == cpu["base"]


def test_the_command_ends_in_one_sentence(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    data = write_rows(tmp_path / "rows.json")
    words = ["--dry_run", "--ckpt_dir", tmp_path, "--data_path", data, "--method", "lora", "--device", "cpu"]
    refused(run("finetune.py", *words, "--model_parallel_size", 8), "n_heads (4)", "8 equal parts")
    done = run("finetune.py", *words, "--model_parallel_size", 4)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 12  # two passes over 24 rows, 4 a step


def test_a_dry_run_counts_the_mode_that_is_asked_for(tmp_path):
    used = []
    for words in (("--activation_checkpointing",), ("--activation_checkpointing", "ffn"), ()):
        result = dry_run(config(tmp_path, *words))
        totals, used = result["activation_checkpointing"], [*used, result["memory_bytes"]["total"]]
    assert used == [totals["full"], totals["selective"], totals["none"]] == sorted(used) and len(set(used)) == 3


def test_a_dry_run_says_what_micro_batches_would_be(tmp_path, monkeypatch):
    given = config(tmp_path, "--batch_size", "auto", "--accum_iter", 4)
    for free, rows, micro_batches in ((None, 16, 1), (0, 1, 16)):
        monkeypatch.setattr("training.memory.free_memory", lambda _, free=free: free)
        result = dry_run(given)
        assert (result["batch_size"], result["rows_per_step"]) == (rows, 16)
        assert result["exchanged_per_step"]["micro_batches"] == micro_batches


def test_rows_are_shared_out_more_evenly_than_in_turn():
    generator = torch.Generator().manual_seed(0)
    for ranks in (2, 4, 8):
        in_turn, balanced = [], []  # tokens of the busiest rank, as a multiple of the mean
        for step in torch.randint(60, 301, (20, 32), generator=generator).tolist():
            shares = [sum(step[i] for i in share) for share in balance_by_length(step, ranks)]
            balanced.append(max(shares) * ranks / sum(step))
            in_turn.append(max(sum(step[r::ranks]) for r in range(ranks)) * ranks / sum(step))
        assert 1 <= sum(balanced) / 20 < 1.03 and sum(balanced) - 20 < (sum(in_turn) - 20) / 5
