"""What goes wrong with a machine, and what then becomes of a run: the table of docs/failures.md, line by line.

Damaged files are in test_hostile.py, kills by the dozen in test_kills.py.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import faulty
from commands import REPO, program, refused, run, torchrun, train_flags, write_rows
from faulty import FAULTS
from llama.machine import check_machine

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SAVED = [".lock", "checkpoint-2.pth", "config.json", "log.jsonl", "tensorboard"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All of FAULTS, done by one program: starting processes is what takes the time."""
    folder = tmp_path_factory.mktemp("faults")
    result = program(faulty.__file__, folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def results(folder):
    results = json.loads((folder / "results.json").read_text())
    assert results.keys() == FAULTS.keys()
    return results


def out(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "_") / "out"


def errors(result) -> list[str]:
    """All error messages, those of process 1 first."""
    return [line for text in reversed(result["printed"]) for line in text.splitlines() if line.startswith("error: ")]


def tensors(out: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(out / f"checkpoint-{step}.pth", weights_only=True)["adapter"]


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("killed", ["process 0 stops: another process failed, was killed, or its machine was lost"]),
        ("refuses", ["row 7 is not acceptable", "process 0 stops: another process failed"]),
        ("fault of the program", ["process 0 stops: another process failed"]),
        ("out of memory", ["error: out of memory: CUDA out", "process 0 stops: another process failed"]),
        ("both refuse", ["row 7 is not acceptable"]),
    ],
)
def test_a_process_that_fails_is_named_and_takes_the_others_along(results, name, words):
    result = results[name]
    assert result["statuses"] in ([1, 1], [1, -9])
    assert len(errors(result)) == len(words)
    assert all(word in line for word, line in zip(words, errors(result), strict=True))
    assert ["Traceback" in text for text in result["printed"]] == [False, name == "fault of the program"]
    assert set(SAVED) <= set(result["files"]) <= {*SAVED, "checkpoint-3.pth"}


def test_the_process_that_keeps_the_store_may_be_the_one_that_dies(results):
    assert results["the first is killed"]["statuses"] == [-9, 1]
    assert "process 1 stops: another process failed, was killed" in errors(results["the first is killed"])[-1]


def test_another_base_on_one_machine_is_refused_before_anything_is_made(results):
    assert results["other base"]["statuses"] == [1, 1] and results["other base"]["files"] == []
    (line,) = errors(results["other base"])
    assert "base_fingerprint: process 1 has '" in line and ", process 0 '" in line


def test_lack_of_memory_says_what_to_turn_down(results):
    (line,) = [line for line in errors(results["out of memory"]) if "process 0" not in line]
    assert "Tried to allocate 2.00 GiB; " in line
    assert "--batch_size" in line and "--max_seq_len" in line and "--model_parallel_size" in line


@pytest.mark.parametrize(("name", "status"), [("taken away", 143), ("Ctrl-C", 130), ("signalled twice", 143)])
def test_a_signal_to_any_process_ends_the_run_with_a_checkpoint_to_go_on_from(results, folder, name, status):
    result = results[name]
    assert result["statuses"] == [status, status] and result["files"] == sorted([*SAVED, "checkpoint-3.pth"])
    signal_name = "SIGINT" if name == "Ctrl-C" else "SIGTERM"
    assert f"stopped by {signal_name} after step 3: checkpoint-3.pth is saved; the same" in result["printed"][0]
    for key, tensor in tensors(out(folder, "nothing"), 2).items():
        assert torch.equal(tensors(out(folder, name), 2)[key], tensor), key
    assert [entry["loss"] for entry in log(out(folder, name))] == [e["loss"] for e in log(out(folder, "nothing"))][:3]


@pytest.mark.parametrize(("signals", "status"), [(2, 0), (3, 143)])
def test_a_third_signal_ends_a_process_at_once(signals, status):
    code = (
        "import os, signal; from training.recorder import GracefulShutdown\n"
        "with GracefulShutdown() as shutdown:\n"
        f"    for _ in range({signals}): os.kill(os.getpid(), signal.SIGTERM)\n"
        "    assert shutdown.signum == signal.SIGTERM"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO).returncode == status


@pytest.mark.parametrize("name", ["loss", "gradient"])
def test_a_step_that_is_not_finite_on_one_process_is_skipped_on_all(results, folder, name):
    result, entries = results[name], log(out(folder, name))
    assert result["statuses"] == [0, 0] and [entry["step"] for entry in entries] == list(range(1, 7))
    assert [entry["step"] for entry in entries if "skipped" in entry] == [3]
    what = "the loss" if name == "loss" else "a gradient"
    assert f"step 3: {what} is not finite (loss " in result["printed"][0] and "): skipped" in result["printed"][0]
    content = torch.load(out(folder, name) / "checkpoint-6.pth", weights_only=True)
    assert content["skipped"] == [3]


def test_a_loss_that_stays_not_finite_leaves_a_checkpoint_of_the_last_good_step(results, folder):
    result = results["loss, twice"]
    assert result["statuses"] == [1, 1] and result["files"] == sorted([*SAVED, "checkpoint-3.pth"])
    (line,) = errors(result)
    assert "step 4: the loss is not finite (loss nan; rows " in line and ", nor was it in step 3;" in line
    assert "(checkpoint-3.pth is saved)" in line
    at_2, at_3 = (tensors(out(folder, "loss, twice"), step) for step in (2, 3))
    assert all(torch.equal(at_2[key], at_3[key]) for key in at_2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "train.json")


def test_one_gpu_for_all_processes_is_refused(monkeypatch):
    check_machine("cuda:0", None, False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_machine("cuda", None, False)
    with pytest.raises(ValueError, match="--device cuda:0: all processes of torchrun would share this GPU"):
        check_machine("cuda:0", None, False)


@pytest.mark.parametrize("path", ["/proc/run", "/dev/null", "/dev/null/run"])
def test_a_folder_that_cannot_be_made_is_named(data, path):
    refused(run("finetune.py", *train_flags(data, Path(path))), path)


def test_a_checkpoint_that_is_damaged_is_set_aside_and_the_one_before_is_taken(results, folder, tmp_path):
    """... by any number of processes: the rows of a step stay the same."""
    whole, damaged = out(folder, "nothing"), tmp_path / "out"
    shutil.copytree(whole, damaged)
    for step in (4, 6):
        path = damaged / f"checkpoint-{step}.pth"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    result = run("finetune.py", "--data_path", folder / "rows.json", "--output_dir", damaged, "--resume")
    assert result.returncode == 0, result.stderr
    for step in (4, 6):
        assert f"checkpoint-{step}.pth: damaged" in result.stderr
        assert f"kept as checkpoint-{step}.pth.damaged, going on from checkpoint-2.pth" in result.stderr
        assert (damaged / f"checkpoint-{step}.pth.damaged").exists()
    require_same_run(damaged, whole)
    record = json.loads((damaged / "config.json").read_text())
    assert [(entry["step"], entry["processes"]) for entry in record["resumed"]] == [(2, 1)]
    for file in damaged.glob("checkpoint-?.pth"):
        file.write_bytes(b"nothing of the kind")
    result = run("finetune.py", "--data_path", folder / "rows.json", "--output_dir", damaged, "--resume")
    refused(result, "no checkpoint can be read", "checkpoint-2.pth", "checkpoint-6.pth")


@pytest.mark.parametrize(("size", "processes"), [(1, 3), (2, 4)])
def test_a_run_goes_on_with_other_numbers_of_processes(results, folder, tmp_path, size, processes):
    """Of data-parallel ranks 2 -> 3 and 2, of model-parallel ones 1 -> 1 and 2."""
    whole, other = out(folder, "nothing"), tmp_path / "out"
    shutil.copytree(whole, other)
    for step in (4, 6):
        (other / f"checkpoint-{step}.pth").unlink()
    flags = ("--data_path", folder / "rows.json", "--output_dir", other, "--resume", "--model_parallel_size", size)
    result = torchrun(processes, "finetune.py", *flags)
    assert result.returncode == 0, result.stderr
    require_same_run(other, whole)


def require_same_run(out: Path, expected: Path) -> None:
    """Equal up to rounding: the numbers of processes differ."""
    assert [entry["rows"] for entry in log(out)] == [4] * 6
    assert [entry["loss"] for entry in log(out)] == pytest.approx([entry["loss"] for entry in log(expected)], rel=1e-4)
    for key, tensor in tensors(expected, 6).items():
        assert torch.allclose(tensors(out, 6)[key], tensor, atol=2e-3), key


@pytest.mark.parametrize(("fault", "words"), [("refuses", "row 7 is not acceptable"), ("killed", "Signal 9 (SIGKILL)")])
def test_torchrun_ends_all_processes_when_one_fails(data, tmp_path, fault, words):
    flags = train_flags(data, tmp_path / "out", accum_iter=1, max_steps=100_000)
    environment = os.environ | {"PYTHONPATH": f"{REPO}:{Path(faulty.__file__).parent}"}
    command = [*LAUNCH, faulty.__file__, fault, *map(str, flags)]
    result = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 1 and words in result.stderr, result.stderr
    assert "error: row 7 is not acceptable\n" in result.stderr or fault == "killed"


def test_torchrun_that_is_asked_to_stop_leaves_a_checkpoint(data, tmp_path):
    """SIGTERM comes to torchrun alone, which passes it on."""
    flags = train_flags(data, tmp_path / "out", accum_iter=1, max_steps=100_000)
    process = subprocess.Popen(
        [*LAUNCH, "finetune.py", *map(str, flags)], cwd=REPO, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and not ((tmp_path / "out/log.jsonl").exists() and log(tmp_path / "out")):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=100)
    finally:
        process.kill()
    assert "stopped by SIGTERM after step " in stderr, stderr
    steps = len(log(tmp_path / "out"))
    assert f"checkpoint-{steps}.pth" in [f.name for f in (tmp_path / "out").iterdir()]
