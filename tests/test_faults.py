"""What goes wrong with a machine, and what then becomes of a run: the table of docs/failures.md, line by line.

Damaged files are in test_hostile.py, kills by the dozen in test_kills.py.
"""

import json
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

SAVED = ["checkpoint-2.pth", "config.json", "log.jsonl", "tensorboard"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All of FAULTS, done by one program: starting processes is what takes the time."""
    folder = tmp_path_factory.mktemp("faults")
    result = program(faulty.__file__, folder)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="module")
def came_of(folder):
    results = json.loads((folder / "results.json").read_text())
    assert results.keys() == FAULTS.keys()
    return results


def out(folder: Path, name: str) -> Path:
    return folder / name.replace(" ", "_") / "out"


def errors(result) -> list[list[str]]:
    """What each process said of the fault."""
    return [[line for line in said.splitlines() if line.startswith("error: ")] for said in result["said"]]


def tensors(out: Path, step: int) -> dict[str, torch.Tensor]:
    return torch.load(out / f"checkpoint-{step}.pth", weights_only=True)["adapter"]


def log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_no_process_outlives_another(came_of):
    for name, result in came_of.items():
        assert None not in result["statuses"], name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("killed", ["process 0 stops: another process of this run is gone without a word"]),
        ("frozen", ["process 0 stops: process 1 has shown no sign of life for 5 seconds"]),
        ("refuses", ["row 7 is not to its taste", "process 0 stops: process 1 failed: row 7 is not to its taste"]),
        ("fault of the program", ["process 0 stops: process 1 failed: KeyError 'surprise'"]),
        ("out of memory", ["error: out of memory: CUDA out", "process 0 stops: process 1 failed: CUDA"]),
        ("both refuse", ["row 7 is not to its taste"]),
        ("loss, twice", ["step 4: the loss is not finite (loss nan; rows ", ", nor was it in step 3;"]),
        ("loss, twice, slow disk", ["step 4: the loss is not finite (loss nan; rows "]),
    ],
)
def test_a_process_that_fails_is_named_and_takes_the_others_along(came_of, name, words):
    result = came_of[name]
    assert result["statuses"] in ([1, 1], [1, -9], [1])
    said = [line for process in reversed(errors(result)) for line in process]
    assert all(any(word in line for line in said) for word in words), said
    if not name.startswith("both"):  # of which either may hear of the other's before it speaks
        assert len(said) == len(words) or name.startswith("loss, twice")  # of one line; or each its own
    tracebacks = ["Traceback" in process for process in result["said"]]
    assert tracebacks == [False, name == "fault of the program"]
    assert set(SAVED) <= set(result["left"]) <= {*SAVED, ".lock", "checkpoint-3.pth"}


def test_lack_of_memory_says_what_to_turn_down_and_what_is_estimated(came_of):
    (line,) = [line for line in sum(errors(came_of["out of memory"]), []) if "process 0" not in line]
    assert "Tried to allocate 2.00 GiB; by the estimate a step takes 0.0" in line and " GiB (base 0.00, " in line
    assert "lower --batch_size (2; a larger --accum_iter keeps the rows of a step), lower --max_seq_len (300)" in line
    assert "give --activation_checkpointing ffn (0.0" in line and " GiB) or all (0.0" in line
    assert "give --model_parallel_size above 1" in line


def test_the_process_that_keeps_the_store_may_be_the_one_that_dies(came_of):
    result = came_of["the first is killed"]
    assert result["statuses"] == [-9, 1] and "process 1 stops: another process" in errors(result)[1][-1]


def test_another_base_on_one_machine_is_told_before_anything_is_made(came_of):
    result = came_of["other base"]
    assert result["statuses"] == [1, 1] and result["left"] == []
    said = sum(errors(result), [])  # by both, or by one of which the other has heard it before it spoke
    assert said and all("base_fingerprint: process 1 has 'another', process 0 '" in line for line in said)


@pytest.mark.parametrize(("name", "status"), [("taken away", 143), ("Ctrl-C", 130), ("told twice", 143)])
def test_a_signal_to_any_process_ends_the_run_with_a_checkpoint_to_go_on_from(came_of, folder, name, status):
    result = came_of[name]
    assert result["statuses"] == [status, status] and result["left"] == sorted([*SAVED, "checkpoint-3.pth"])
    signal_name = "SIGINT" if name == "Ctrl-C" else "SIGTERM"
    assert f"stopped by {signal_name} after step 3: checkpoint-3.pth is saved; the same" in result["said"][0]
    for key, tensor in tensors(out(folder, "nothing"), 2).items():
        assert torch.equal(tensors(out(folder, name), 2)[key], tensor), key
    assert [entry["loss"] for entry in log(out(folder, name))] == [e["loss"] for e in log(out(folder, "nothing"))][:3]


def test_the_third_signal_ends_a_process_that_waits_for_another(came_of):
    assert came_of["told thrice"]["statuses"] == [143] and not any(errors(came_of["told thrice"]))


def test_a_pause_of_all_processes_is_no_sign_of_death(came_of, folder):
    assert came_of["paused"]["statuses"] == [0, 0]
    assert log(out(folder, "paused"))[-1]["loss"] == log(out(folder, "nothing"))[-1]["loss"]


@pytest.mark.parametrize("name", ["loss", "gradient"])
def test_a_step_that_is_not_finite_on_one_process_is_skipped_on_all(came_of, folder, name):
    result, found = came_of[name], log(out(folder, name))
    assert result["statuses"] == [0, 0] and [entry["step"] for entry in found] == list(range(1, 7))
    assert [entry["step"] for entry in found if "skipped" in entry] == [3]
    what = "the loss" if name == "loss" else "a gradient"
    assert f"step 3: {what} is not finite (loss " in result["said"][0] and "): skipped" in result["said"][0]
    content = torch.load(out(folder, name) / "checkpoint-6.pth", weights_only=True)
    assert content["skipped"] == [3]


@pytest.mark.parametrize("name", ["loss, twice", "loss, twice, slow disk"])
def test_a_loss_that_stays_not_finite_leaves_a_checkpoint_of_the_last_good_step(came_of, folder, name):
    assert came_of[name]["left"] == sorted([*SAVED, "checkpoint-3.pth"])
    assert "(checkpoint-3.pth is saved)" in "".join(sum(errors(came_of[name]), []))
    at_2, at_3 = (tensors(out(folder, name), step) for step in (2, 3))
    assert all(torch.equal(at_2[key], at_3[key]) for key in at_2)


def test_a_clock_that_is_set_back_changes_nothing(came_of, folder):
    assert came_of["clock"]["statuses"] == [0, 0]
    for key, tensor in tensors(out(folder, "nothing"), 6).items():
        assert torch.equal(tensors(out(folder, "clock"), 6)[key], tensor), key
    assert all(entry["seconds"] >= 0 for entry in log(out(folder, "clock")))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "train.json")


@pytest.mark.parametrize("place", ["/proc/run", "/dev/null", "/dev/null/run"])
def test_a_folder_that_cannot_be_made_is_named(data, place):
    refused(run("finetune.py", *train_flags(data, Path(place))), place)


def test_a_checkpoint_that_is_damaged_is_set_aside_and_the_one_before_is_taken(came_of, folder, data, tmp_path):
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
    for key, tensor in tensors(whole, 6).items():  # one process here, two there: equal up to rounding
        assert torch.allclose(tensors(damaged, 6)[key], tensor, atol=2e-3), key
    assert [entry["rows"] for entry in log(damaged)] == [4] * 6
    assert [entry["loss"] for entry in log(damaged)] == pytest.approx([entry["loss"] for entry in log(whole)], rel=1e-4)
    record = json.loads((damaged / "config.json").read_text())
    assert [(entry["step"], entry["processes"]) for entry in record["resumed"]] == [(2, 1)]
    for file in damaged.glob("checkpoint-?.pth"):
        file.write_bytes(b"nothing of the kind")
    result = run("finetune.py", "--data_path", folder / "rows.json", "--output_dir", damaged, "--resume")
    refused(result, "no checkpoint can be read", "checkpoint-2.pth", "checkpoint-6.pth")


@pytest.mark.parametrize(("size", "processes"), [(1, 3), (2, 4)])
def test_a_run_goes_on_with_other_numbers_of_processes(came_of, folder, tmp_path, size, processes):
    """Of data-parallel ranks 2 -> 3 and 2, of model-parallel ones 1 -> 1 and 2."""
    whole, other = out(folder, "nothing"), tmp_path / "out"
    shutil.copytree(whole, other)
    for step in (4, 6):
        (other / f"checkpoint-{step}.pth").unlink()
    flags = ("--data_path", folder / "rows.json", "--output_dir", other, "--resume", "--model_parallel_size", size)
    result = torchrun(processes, "finetune.py", *flags)
    assert result.returncode == 0, result.stderr
    found, expected = log(other), log(whole)
    assert [entry["rows"] for entry in found] == [4] * 6
    assert [entry["loss"] for entry in found] == pytest.approx([entry["loss"] for entry in expected], rel=1e-4)
    for key, tensor in tensors(whole, 6).items():
        assert torch.allclose(tensors(other, 6)[key], tensor, atol=2e-3), key


def test_torchrun_that_is_asked_to_stop_leaves_a_checkpoint(data, tmp_path):
    """SIGTERM comes to torchrun alone, which passes it on."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "finetune.py"]
    flags = train_flags(data, tmp_path / "out", accum_iter=1, max_steps=100_000)
    process = subprocess.Popen(
        [sys.executable, *launch, *map(str, flags)], cwd=REPO, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and not ((tmp_path / "out/log.jsonl").exists() and log(tmp_path / "out")):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=100)
    finally:
        process.kill()
    assert "stopped by SIGTERM after step " in said, said
    steps = len(log(tmp_path / "out"))
    assert f"checkpoint-{steps}.pth" in [f.name for f in (tmp_path / "out").iterdir()]
