"""Memory of a run: what is free, what is recomputed where it would not fit, and what is said of it."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import training.memory
from commands import script, train_flags, write_rows
from llama.distributed import init_distributed
from llama.machine import available_memory, cgroup_limits, free_memory
from tiny import ARGS, config
from training.config import CHECKPOINTING_MODES, TrainConfig
from training.memory import MemoryEstimate, oom_hint

GB = 2**30
ROOT = Path(__file__).resolve().parent.parent


def estimate(free, requested="auto"):
    """Of a run that takes 20, 12 and 8 GiB."""
    by_mode = {mode: {"base": 0, "total": n * GB} for mode, n in zip(CHECKPOINTING_MODES, (20, 12, 8), strict=True)}
    return MemoryEstimate(by_mode, 1, requested, free * GB)


@pytest.mark.parametrize(
    ("free", "mode"),
    [(math.inf, "none"), (20, "none"), (19.99, "selective"), (12, "selective"), (11, "full"), (7, "full")],
)
def test_auto_takes_the_least_that_fits(free, mode):
    assert estimate(free).mode == mode
    assert [estimate(free, requested).mode for requested in CHECKPOINTING_MODES] == list(CHECKPOINTING_MODES)
    for memory, explained in ((estimate(free), mode != "none"), (estimate(free, mode), False)):
        assert ("--activation_checkpointing" in memory.report()) == explained


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (estimate(25), ", give --activation_checkpointing selective (12.00 GiB) or full (8.00 GiB), or give --model"),
        (estimate(9, "none"), ", give --activation_checkpointing full (8.00 GiB), or give --model"),
        (estimate(5, "none"), "lower --max_seq_len (300), or give --model"),
        (estimate(25, "full"), "lower --max_seq_len (300), or give --model"),
    ],
)
def test_the_hint_names_the_modes_that_fit(memory, words):
    with pytest.raises(MemoryError) as raised, oom_hint(TrainConfig(), memory):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert words in str(raised.value) and memory.total(memory.mode) in str(raised.value)


def test_more_is_kept_back_on_a_gpu(monkeypatch):
    monkeypatch.setattr(training.memory, "free_memory", lambda _: 3 * GB // 2)
    task = TrainConfig(bf16=True), ARGS, config("lora")
    on_cpu, on_gpu = (training.memory.estimate_memory(*task, torch.device(name)) for name in ("cpu", "cuda"))
    assert (on_cpu.room, on_gpu.room) == (GB // 2, -GB // 2)
    assert on_cpu.mode == "none" and on_gpu.mode == "full" and "memory may not be enough" in on_gpu.report()


def test_one_process_is_all():
    init_distributed(torch.device("cpu"))
    estimates = [estimate(free) for free in (math.inf, 15, 3)]
    for memory in estimates:
        memory.agree()
    assert [memory.mode for memory in estimates] == ["none", "selective", "full"]


@pytest.mark.parametrize(
    ("free", "accum_iter", "rows", "mode"),
    [
        (math.inf, 1, 4, "none"),
        (math.inf, 8, 32, "none"),
        (math.inf, 9, 18, "none"),  # of 36 rows; no micro-batch has more than 32
        (90, 8, 16, "none"),
        (29, 8, 4, "none"),  # rather than 8 rows and recomputation
        (27, 8, 8, "selective"),
        (14.5, 9, 9, "full"),
        (10.6, 8, 1, "full"),
        (9, 8, 1, "full"),
    ],
)
def test_micro_batches_are_as_large_as_fits(free, accum_iter, rows, mode, monkeypatch):
    """First comes as little recomputation as four rows need. A row takes 4.5, 2 or 0.5 GiB beside 10."""

    def memory_by_mode(model, lengths, device):
        sizes = (10 + len(lengths) * size for size in (4.5, 2, 0.5))
        return {mode: {"total": size * GB} for mode, size in zip(CHECKPOINTING_MODES, sizes, strict=True)}

    monkeypatch.setattr(training.memory, "memory_by_mode", memory_by_mode)
    flags = TrainConfig(batch_size=None, accum_iter=accum_iter)
    memory = training.memory.fit_memory(None, flags, torch.device("cuda"), free * GB)
    assert (memory.batch_size, memory.mode) == (rows, mode) and f"of up to {rows} rows" in memory.report()


def test_a_run_in_micro_batches_that_fit_learns_the_same(tmp_path, monkeypatch, capsys):
    data, losses, chosen = write_rows(tmp_path / "rows.json"), {}, {}
    for size, free in (("4", None), ("auto", None), ("auto", 0)):
        monkeypatch.setattr(training.memory, "free_memory", lambda _, free=free: free)
        out = tmp_path / f"{size}-{free}"
        script("finetune.py", *train_flags(data, out, batch_size=size, max_steps=2, save_every=1))
        (chosen[size, free],) = re.findall(r"of up to (\d) rows", capsys.readouterr().err)
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses[size, free] = [entry["loss"] for entry in log]
        assert [entry["rows"] for entry in log] == [8, 8]
    assert list(chosen.values()) == ["4", "8", "1"]
    for values in losses.values():
        assert values == pytest.approx(losses["4", None], rel=1e-5)
    # ... and goes on in micro-batches of another size
    (out / "checkpoint-2.pth").unlink()
    script("finetune.py", *train_flags(data, out, batch_size=3, accum_iter=None, max_steps=2), "--resume")
    (entry,) = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()][1:]
    assert entry["rows"] == 8 and entry["loss"] == pytest.approx(losses["4", None][1], rel=1e-5)


def test_free_memory_of_the_system_and_of_control_groups(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:    40 kB\n")
    assert list(available_memory(tmp_path / "meminfo")) == [40 * 1024] and not list(available_memory(tmp_path / "no"))
    (tmp_path / "cgroup").write_text("3:cpu:/a\n0::/c/d\n")
    for group, limit, used, stat in (("c/d", "max", 5, "inactive_file 1"), ("c", 700, 500, "anon 3\ninactive_file 20")):
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        for name, content in (("memory.max", limit), ("memory.current", used), ("memory.stat", stat)):
            (tmp_path / group / name).write_text(f"{content}\n")
    assert list(cgroup_limits(tmp_path / "cgroup", tmp_path)) == [220] and not list(cgroup_limits(tmp_path / "no"))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = free_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")  # processes of a machine share what it has
    assert alone > 500 * free_memory(torch.device("cpu")) > 0


def test_a_run_that_would_not_fit_recomputes_and_learns_the_same(tmp_path, monkeypatch, capsys):
    data, losses = write_rows(tmp_path / "rows.json"), {}
    for mode, free in (("none", None), ("full", 0)):
        monkeypatch.setattr(training.memory, "free_memory", lambda _, free=free: free)
        out = tmp_path / mode
        script("finetune.py", *train_flags(data, out, max_steps=2))
        assert ("--activation_checkpointing full: a step would" in capsys.readouterr().err) == (mode == "full")
        losses[mode] = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
        assert json.loads((out / "config.json").read_text())["settings"]["activation_checkpointing"] == "auto"
    assert losses["full"] == losses["none"] and len(losses["none"]) == 2


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="there, a child's peak begins at its parent's")
def test_peak_memory_is_not_that_of_the_process_that_started_this_one() -> None:
    ballast = torch.ones(2**28)  # 1 GiB
    code = "import torch; from training.loop import peak_memory; print(peak_memory(torch.device('cpu')))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 2**26 < int(result.stdout) < 4 * ballast.numel()
