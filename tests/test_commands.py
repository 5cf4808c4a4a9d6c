"""The scripts as a user runs them: the whole path, resuming, several processes, and everything that goes wrong."""

import json
import os
import shutil

import pytest
import torch

from benchmarks.common import LLAMA_3_1
from commands import refused, run, torchrun, train_flags, write_rows
from tiny import BASE


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_rows(folder / "train.json")
    write_rows(folder / "AddSub.json", 7, answer=True)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A finished run in one process, with a checkpoint in the middle."""
    out = tmp_path_factory.mktemp("runs") / "one"
    result = run("finetune.py", *train_flags(data / "train.json", out, save_every=2))
    assert result.returncode == 0, result.stderr
    result = run("extract_adapter.py", out / "checkpoint-LAST.pth")
    assert result.returncode == 0, result.stderr
    return out


def adapter(folder):
    return torch.load(folder / "adapter.pth", weights_only=True)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def generate_flags(data, trained, save_path, **flags):
    values = {
        "ckpt_dir": BASE,
        "adapter_path": trained / "adapter.pth",
        "data_path": data / "AddSub.json",
        "save_path": save_path,
        "max_gen_len": 8,
        "min_gen_len": 8,
        "temperature": 0.8,
        "max_batch_size": 3,
        "bf16": False,
        "device": "cpu",
    } | flags
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


def test_a_run_leaves_its_record_log_and_checkpoints(trained, data):
    assert {f.name for f in trained.iterdir()} == {
        *("config.json", "log.jsonl", "tensorboard", "adapter.pth", "adapter_params.json", ".lock"),
        *("checkpoint-2.pth", "checkpoint-4.pth", "checkpoint-6.pth"),
    }
    config = json.loads((trained / "config.json").read_text())
    assert config["settings"]["lr"] == 0.01 and config["adapter"]["lora_rank"] == 2
    assert config["versions"]["torch"] == torch.__version__ and len(config["data_sha256"]) == 64
    assert config["git_revision"] and config["trainable_parameters"] == sum(
        t.numel() for t in adapter(trained).values()
    )
    assert len(losses(trained)) == 6 and losses(trained)[-1] < losses(trained)[0]
    assert list((trained / "tensorboard").glob("events*"))


@pytest.mark.parametrize(("mp", "batch", "accum"), [(1, 2, 1), (2, 2, 2)])
def test_two_processes_train_as_one(trained, data, tmp_path, mp, batch, accum):
    """Two data-parallel replicas, then one model cut in two: the same rows per step, the same adapter."""
    out = tmp_path / "two"
    flags = train_flags(data / "train.json", out, batch_size=batch, accum_iter=accum, model_parallel_size=mp)
    result = torchrun(2, "finetune.py", *flags)
    assert result.returncode == 0, result.stderr
    assert run("extract_adapter.py", out / "checkpoint-LAST.pth").returncode == 0
    assert losses(out) == pytest.approx(losses(trained), rel=1e-4)
    for key, tensor in adapter(trained).items():
        assert torch.allclose(tensor, adapter(out)[key], atol=2e-3), key


def test_generation_is_resumed_and_shared_out_without_a_difference(trained, data, tmp_path):
    alone, shared = tmp_path / "alone" / "AddSub.jsonl", tmp_path / "shared" / "AddSub.jsonl"
    assert run("generate.py", *generate_flags(data, trained, alone)).returncode == 0
    rows = json.loads((data / "AddSub.json").read_text())
    answered = [json.loads(line) for line in alone.read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "generate"} for row in answered] == rows
    result = torchrun(2, "generate.py", *generate_flags(data, trained, shared, max_batch_size=2))
    assert result.returncode == 0, result.stderr
    assert shared.read_text() == alone.read_text()
    shared.write_text("".join(shared.read_text().splitlines(keepends=True)[2:5]))
    assert run("generate.py", *generate_flags(data, trained, shared)).returncode == 0
    assert shared.read_text() == alone.read_text()
    complete = run("generate.py", *generate_flags(data, trained, shared))
    assert complete.returncode == 0 and "complete, all 7 rows" in complete.stderr
    refused(run("generate.py", *generate_flags(data, trained, shared, seed=1)), "seed 0, now it is 1", "--overwrite")
    score = run("-m", "evaluate", "--predict_files", alone, "--save_path", tmp_path / "scores.json")
    assert score.returncode == 0 and "7 of 395" in score.stdout


def test_model_parallel_generation_and_samples(trained, data, tmp_path):
    alone, shared = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    flags = {"num_samples": 2, "max_rows": 3}
    assert run("generate.py", *generate_flags(data, trained, alone, **flags)).returncode == 0
    result = torchrun(2, "generate.py", *generate_flags(data, trained, shared, model_parallel_size=2, **flags))
    assert result.returncode == 0, result.stderr
    assert alone.read_text() == shared.read_text()
    answers = [json.loads(line)["generate"] for line in alone.read_text().splitlines()]
    assert [len(answer) for answer in answers] == [2, 2, 2] and answers[0][0] != answers[0][1]


def test_dry_run_needs_params_json_alone(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(LLAMA_3_1["8B"]))
    result = run("finetune.py", "--dry_run", "--ckpt_dir", tmp_path, "--max_steps", 7, "--batch_size", 8)
    assert result.returncode == 0, result.stderr
    *lines, last = result.stdout.splitlines()
    assert "7 steps of 8 rows, peak learning rate 0.0001875" in lines
    plan = json.loads(last)
    assert plan["trainable_parameters"]["total"] == 24_520_288 and plan["base_parameters"] == 8_030_261_248
    assert plan["steps"] == 7 and plan["lr"] == 6e-3 * 8 / 256
    assert plan["memory_bytes"]["total"] == sum(v for k, v in plan["memory_bytes"].items() if k != "total")
    assert [f.name for f in tmp_path.iterdir()] == ["params.json"]


def test_a_wrong_flag_is_refused_before_torch_is_loaded_or_a_file_made(tmp_path):
    watch = "import sys, runpy; sys.argv = sys.argv[1:]\ntry: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    watch += "finally: print('torch' in sys.modules)"
    result = run("-c", watch, "finetune.py", "--output_dir", tmp_path / "out", "--batch_size", 0)
    refused(result, "--batch_size must be at least 1, not 0", status=2)
    assert result.stdout.strip() == "False" and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["base", "consolidated.00.pth", "damaged, cut short"]),
        ("[]", ["rows.json", "empty"]),
        ('[{"instruction": "a", "input": ""}]', ["rows.json", "row 1", "'output'"]),
        (json.dumps([{"instruction": "a", "input": "", "output": "b" * 400}]), ["none of the 1 rows fits", "300"]),
    ],
)
def test_a_base_or_rows_that_are_not_right_are_refused_before_a_folder_is_made(content, words, tmp_path):
    base, rows = tmp_path / "base", write_rows(tmp_path / "rows.json")
    shutil.copytree(BASE, base)
    if content is None:
        os.truncate(base / "consolidated.00.pth", 5000)
    else:
        rows.write_text(content)
    refused(run("finetune.py", *train_flags(rows, tmp_path / "out", ckpt_dir=base)), *words)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def other_base(tmp_path):
    """The golden base with one weight changed."""
    folder = tmp_path / "other"
    shutil.copytree(BASE, folder)
    state = torch.load(folder / "consolidated.00.pth", weights_only=True)
    state["norm.weight"][0] = torch.nan
    torch.save(state, folder / "consolidated.00.pth")
    return folder


def test_another_base_of_the_same_shape_is_told(trained, data, tmp_path, other_base):
    flags = ("--data_path", data / "train.json", "--output_dir", trained, "--resume")
    refused(run("finetune.py", *flags, "--ckpt_dir", other_base), f"{other_base}: is not the --ckpt_dir")
    save_path = tmp_path / "AddSub.jsonl"
    assert run("generate.py", *generate_flags(data, trained, save_path, max_rows=2)).returncode == 0
    again = run("generate.py", *generate_flags(data, trained, save_path, ckpt_dir=other_base))
    refused(again, "was made with another --ckpt_dir, by its contents", "--overwrite")


@pytest.mark.parametrize("temperature", [0, 0.5])
def test_a_base_with_damaged_numbers_gives_an_error_and_no_answers(temperature, trained, data, tmp_path, other_base):
    save_path = tmp_path / "AddSub.jsonl"
    flags = generate_flags(data, trained, save_path, ckpt_dir=other_base, temperature=temperature)
    refused(run("generate.py", *flags), "not finite")
    assert not save_path.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("step"),
        lambda content: content["adapter"].update({"layers.0.router.proj.w1.bias": "text"}),
        lambda content: content["adapter_params"].update(lora_rank=torch.zeros(1)),
    ],
)
def test_a_damaged_checkpoint_is_not_extracted(damage, trained, tmp_path):
    content = torch.load(trained / "checkpoint-6.pth", weights_only=True)
    damage(content)
    torch.save(content, tmp_path / "checkpoint-007.pth")
    refused(run("extract_adapter.py", tmp_path), "checkpoint-007.pth")
    assert [f.name for f in tmp_path.iterdir()] == ["checkpoint-007.pth"]


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)  # as a full disk: writing beyond it fails
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(trained, data, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    (out / "checkpoint-6.pth").unlink()
    before = (out / "checkpoint-4.pth").read_bytes()
    result = run(
        "-c", LIMITED, 40_000, "finetune.py", "--data_path", data / "train.json", "--output_dir", out, "--resume"
    )
    refused(result, "File too large")
    assert (out / "checkpoint-4.pth").read_bytes() == before
    assert not [f for f in out.iterdir() if "tmp" in f.name or f.name == "checkpoint-6.pth"]
    refused(run("-c", LIMITED, 1000, "extract_adapter.py", out), "File too large")
    assert (out / "adapter.pth").read_bytes() == (trained / "adapter.pth").read_bytes()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["extract_adapter.py", "none.pth"], ["none.pth", "no such file"]),
        (["extract_adapter.py", "docs"], ["docs", "checkpoint-STEP.pth"]),
        (["extract_adapter.py", BASE / "consolidated.00.pth"], ["not a checkpoint"]),
        (["generate.py", "--save_path", "x.jsonl", "--ckpt_dir", BASE, "--data_path", "none.json"], ["none.json"]),
    ],
)
def test_what_is_not_there_is_named(words, expected):
    refused(run(*words), *expected)


def test_graphs_are_for_a_gpu():
    flags = ["--save_path", "x.jsonl", "--cuda_graphs"]
    refused(run("generate.py", *flags, "--device", "cpu"), "--cuda_graphs needs a GPU", status=2)
    refused(run("generate.py", *flags, "--model_parallel_size", 2), "--model_parallel_size 1", status=2)


def test_an_adapter_for_another_base_is_refused(trained, data, tmp_path):
    shutil.copy(trained / "adapter.pth", tmp_path)
    params = json.loads((trained / "adapter_params.json").read_text())
    params["base"]["dim"] = 128
    (tmp_path / "adapter_params.json").write_text(json.dumps(params))
    result = run("generate.py", *generate_flags(data, tmp_path, tmp_path / "x.jsonl"))
    refused(result, "adapter_params.json", "dim 128", "64")
