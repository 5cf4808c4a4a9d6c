"""`--dry_run` for layouts whose processes are not there, and the table of layouts."""

import json
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from benchmarks.layouts import BATCH_SIZE, RESERVED, Layout, compute, markdown, memory_of, shares
from benchmarks.layouts import main as layouts
from benchmarks.shapes import LLAMA_3_1
from commands import refused, run, write_rows
from tiny import BASE, PARAMS
from training.config import RECOMPUTED, read_settings
from training.dry_run import dry_run, print_dry_run


@pytest.fixture
def outside(monkeypatch):
    """No torchrun around."""
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def settings(folder, *words, params=LLAMA_3_1["8B"]):
    (folder / "params.json").write_text(json.dumps(params))
    return read_settings(["--dry_run", "--ckpt_dir", str(folder), *map(str, words)], {}, "")


def test_a_model_cut_in_eight_needs_one_process(tmp_path, outside, capsys):
    print_dry_run(settings(tmp_path, "--model_parallel_size", 8, "--bf16", "--accum_iter", 2))
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["layout"] == {"processes": 8, "model_parallel_size": 8, "data_parallel_size": 1}
    assert found["trainable_parameters"]["total"] == 24_520_288  # of the whole model
    assert 8_030_261_248 / 8 < found["memory_bytes"]["base"] / 2 < 8_030_261_248 / 8 * 1.001
    exchanged = found["exchanged_per_step"]
    assert exchanged["gradients"]["messages"] == 0 and exchanged["micro_batches"] == 2
    assert exchanged["micro_batch"]["forward"]["bytes"] > 2 * 32 * 4 * 299 * 4096 * 2
    assert found["rows_per_step"] == 8 and not dist.is_initialized() or dist.get_world_size() == 1
    assert any("8 processes, 8 to a model" in line for line in lines)
    assert any(line.startswith("backward within a model, each of 2 micro-batches: ") for line in lines)


def test_replicas_are_counted_from_the_environment(tmp_path, outside, capsys):
    outside.setenv("WORLD_SIZE", "8")
    given = settings(tmp_path, "--model_parallel_size", 2, "--lora_rank", 2, "--method", "lora", params=PARAMS)
    found = dry_run(given)
    assert found["layout"] == {"processes": 8, "model_parallel_size": 2, "data_parallel_size": 4}
    assert found["rows_per_step"] == 16 and found["lr"] == 6e-3 * 16 / 256
    adapters = found["memory_bytes"]["adapters"]
    assert found["exchanged_per_step"]["gradients"] == {
        **{"messages": 1, "bytes": adapters, "sent_bytes": round(1.5 * adapters)}
    }
    outside.setenv("RANK", "1")  # torchrun's first process speaks for all
    print_dry_run(given)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "size, processes, words",
    [
        (3, None, r"n_heads \(4\) cannot be cut into 3 equal parts"),
        (2, "3", "model_parallel_size 2 does not divide the 3 processes"),
        (4, "2", "model_parallel_size 4 does not divide the 2 processes"),
        (1, "two", "WORLD_SIZE must be a whole number from 1, not 'two'"),
        (1, "0", "WORLD_SIZE must be a whole number from 1, not '0'"),
    ],
)
def test_impossible_layouts_are_refused_as_in_a_run(tmp_path, outside, size, processes, words):
    if processes is not None:
        outside.setenv("WORLD_SIZE", processes)
    with pytest.raises(ValueError, match=words):
        dry_run(settings(tmp_path, "--model_parallel_size", size, params=PARAMS))


def test_a_gpu_can_be_planned_for_without_one(tmp_path, outside):
    given = settings(tmp_path, "--device", "cuda", "--method", "lora", params=PARAMS)
    outside.setattr("torch.cuda.is_available", lambda: False)

    def found(device: str, bf16: bool | None) -> dict:
        return dry_run(replace(given, train=replace(given.train, device=device, bf16=bf16)))

    assert found("cuda", None) == found("cuda", True) and found("cuda", None)["bf16"]
    gpu, cpu = (found(device, True)["memory_bytes"] for device in ("cuda", "cpu"))
    assert gpu["activations"] == cpu["activations"] and gpu["base"] == cpu["base"]
    # In float32, with key heads that are shared, a GPU has no kernel that keeps no weights of attention
    gpu, cpu = (found(device, False)["memory_bytes"] for device in ("cuda", "cpu"))
    assert gpu["activations"] > cpu["activations"] and gpu["base"] == cpu["base"]


def test_the_command_ends_in_one_sentence(tmp_path, outside):
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    data = write_rows(tmp_path / "rows.json")
    words = ["--dry_run", "--ckpt_dir", tmp_path, "--data_path", data, "--method", "lora", "--device", "cpu"]
    refused(run("finetune.py", *words, "--model_parallel_size", 8), "n_heads (4)", "8 equal parts")
    done = run("finetune.py", *words, "--model_parallel_size", 4)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["steps"] == 12  # two passes over 24 rows, 4 a step


def test_the_table_of_layouts(monkeypatch):
    monkeypatch.setitem(LLAMA_3_1, "8B", LLAMA_3_1["8B"] | {"n_layers": 4})
    memory_of.cache_clear()
    layout = Layout("8B", 8, 24, 4)
    found = compute(layout, "soft_moa")
    memory = memory_of("8B", 4, "soft_moa")
    for kind in RECOMPUTED:
        most, room = found[kind]["largest_batch_size"], 24 * 2**30 - RESERVED
        assert memory.total(most, kind) <= room < memory.total(most + 1, kind)
        assert found[kind]["total"] == memory.total(BATCH_SIZE, kind)
        assert found[kind]["step"]["micro_batches"] == 4  # 32 rows, 4 at a time on each of 2 replicas
    off, ffn, whole = (found[kind]["activations"] for kind in RECOMPUTED)
    assert off > 1.4 * ffn > 1.4 * 1.4 * whole
    off, ffn, whole = (found[kind]["step"]["micro_batch"]["backward"]["messages"] for kind in RECOMPUTED)
    assert off < ffn < whole  # what the forward pass exchanges is exchanged again
    lines = [
        line for line in markdown([found]).splitlines() if line.startswith("| 8B on 8 x 24 GB, 2 x 4 | soft_moa |")
    ]
    assert len(lines) == 3 and f"{found['held']['base'] / 2**30:.2f}" in lines[0]
    memory_of.cache_clear()


def test_rows_are_shared_out_more_evenly_than_in_turn():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(60, 301, (32 * 20 + 5,), generator=generator).tolist()
    for found in shares(lengths):
        in_turn, shared = found["in_turn"], found["shared_out"]
        assert 1 <= shared["mean"] < 1.03 and shared["mean"] - 1 < (in_turn["mean"] - 1) / 5
        assert shared["mean"] <= shared["largest"] < in_turn["mean"]


def test_the_tables_of_layouts_need_no_tokenizer(capsys):
    with pytest.raises(SystemExit):
        layouts(["--ckpt_dir", "x"])
    assert "--ckpt_dir has no effect without --data_path" in capsys.readouterr().err


def test_the_shares_of_real_rows(tmp_path, capsys):
    layouts(["--data_path", str(write_rows(tmp_path / "rows.json", 64)), "--ckpt_dir", str(BASE)])
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]] == ["2", "4", "8"]


def test_a_dry_run_tells_all_choices_and_counts_the_one_that_is_asked_for(tmp_path, outside, capsys):
    totals, used = {}, []
    for words in (("--activation_checkpointing",), ("--activation_checkpointing", "ffn"), ()):
        found = dry_run(settings(tmp_path, *words, params=PARAMS))
        totals, used = found["activation_checkpointing"], [*used, found["memory_bytes"]["total"]]
    assert used == [totals["all"], totals["ffn"], totals["off"]] == sorted(used) and len(set(used)) == 3
    print_dry_run(settings(tmp_path, params=LLAMA_3_1["8B"]))
    assert "total by --activation_checkpointing: off " in capsys.readouterr().out


def test_the_sum_of_gradients_is_measured(tmp_path):
    result = run(
        *("-m", "benchmarks.exchange", "--methods", "soft_moa", "--tokens", 4, "--repeats", 1, "--layers", 3),
        *("--json", tmp_path / "figures.json"),
    )
    assert result.returncode == 0, result.stderr
    (found,) = json.loads((tmp_path / "figures.json").read_text())
    assert found["bytes"] == 4 * 3_147_720 // 10 and set(found["seconds"]) == {"alone", "after", "buckets", "sum"}
    assert "| soft_moa | 1.2 MiB |" in result.stdout
    refused(run("-m", "benchmarks.exchange", "--methods", "soft"), "--methods", "'soft'", status=2)
