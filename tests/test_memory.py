"""Memory of a run: what is free, what is worked out again where it would not fit, and what is said of it."""

import json

import pytest
import torch

import training.memory
from commands import script, train_flags, write_rows
from llama.distributed import init_distributed
from llama.free_memory import _of_groups, _of_the_system, free_memory
from training.config import RunConfig, TrainConfig
from training.memory import RESERVED, Needed, advice, needed_by_all

GB = 2**30
NAMES = ("base", "adapters", "gradients", "optimizer", "activations", "temporary")


def need(free, asked="auto"):
    """Of a run that takes 20, 12 and 8 GiB."""
    parts = {c: dict.fromkeys(NAMES, 0) | {"total": n * GB} for c, n in {"off": 20, "ffn": 12, "all": 8}.items()}
    return Needed(parts, asked, None if free is None else free * GB + RESERVED)


@pytest.mark.parametrize(
    ("free", "choice"), [(None, "off"), (20, "off"), (19.99, "ffn"), (12, "ffn"), (11, "all"), (7, "all")]
)
def test_auto_takes_the_least_that_fits(free, choice):
    assert need(free).choice == choice
    assert [need(free, asked).choice for asked in ("off", "ffn", "all")] == ["off", "ffn", "all"]


def test_auto_says_what_it_has_come_to():
    assert need(20).why() is None and need(7, "all").why() is None
    assert need(15).why() == (
        "--activation_checkpointing ffn: a step would take 20.00 GiB by the estimate, 16.00 GiB are free, of which "
        "1.00 GiB are left to the libraries; so it takes 12.00 GiB"
    )
    assert need(7).why().endswith("so it takes 8.00 GiB; that may not be enough")


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (need(25), ", give --activation_checkpointing ffn (12.00 GiB) or all (8.00 GiB), or give --model"),
        (need(9, "off"), ", give --activation_checkpointing all (8.00 GiB), or give --model"),
        (need(5, "off"), "lower --max_seq_len (300), or give --model"),
        (need(None, "ffn"), ", give --activation_checkpointing all (8.00 GiB), or give --model"),
        (need(25, "all"), "lower --max_seq_len (300), or give --model"),
    ],
)
def test_advice_names_the_choices_that_fit(memory, words):
    settings = RunConfig(TrainConfig(), {}, frozenset())
    with pytest.raises(MemoryError) as told, advice(settings, memory):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert words in str(told.value) and memory.total(memory.choice) in str(told.value)


def test_one_process_is_all():
    init_distributed(torch.device("cpu"))
    assert needed_by_all(need(3)) == need(3) and needed_by_all(need(None)).free is None


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def test_what_the_system_has(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:    40 kB\n")
    assert list(_of_the_system(tmp_path / "meminfo")) == [40 * 1024]
    assert list(_of_the_system(tmp_path / "none")) == []


def test_what_is_left_of_the_limits_of_control_groups(tmp_path):
    mine, root = tmp_path / "cgroup", tmp_path / "fs"
    assert list(_of_groups(mine, root)) == []
    mine.write_text("4:memory:/a/b\n3:cpu:/a\n0::/c/d\n")
    write(root / "memory" / "a", memory__limit_in_bytes=900, memory__usage_in_bytes=300)
    write(root / "memory" / "a", memory__stat="cache 7\ntotal_inactive_file 50")
    write(root / "c" / "d", memory__max="max", memory__current=5, memory__stat="inactive_file 1")
    write(root / "c", memory__max=700, memory__current=500, memory__stat="anon 3\ninactive_file 20")
    assert sorted(_of_groups(mine, root)) == [220, 650]


def test_processes_of_a_machine_share_what_it_has(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = free_memory(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    assert alone > 500 * free_memory(torch.device("cpu")) > 0


def test_a_run_that_would_not_fit_works_out_again_and_learns_the_same(tmp_path, monkeypatch, capsys):
    data, losses = write_rows(tmp_path / "rows.json"), {}
    for choice, free in (("off", None), ("all", 0)):
        monkeypatch.setattr(training.memory, "free_memory", lambda _, free=free: free)
        out = tmp_path / choice
        script("finetune.py", *train_flags(data, out, max_steps=2))
        said = capsys.readouterr().err
        assert ("--activation_checkpointing all: a step would take 0." in said) == (choice == "all")
        losses[choice] = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
        assert json.loads((out / "config.json").read_text())["settings"]["activation_checkpointing"] == "auto"
    assert losses["all"] == losses["off"] and len(losses["off"]) == 2
