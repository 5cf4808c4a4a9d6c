"""Validation: what is measured, on which rows, what is kept of it, when a run ends; starting from an adapter."""

import json
import os
import shutil
import signal
import sys

import pytest
import torch

import training.checkpoint
import training.config
import training.recorder
from commands import script, torchrun, train_flags, write_rows
from evaluate.scoring import score_file
from inspection.runs import read_run
from llama import Llama
from llama.data import IGNORE_INDEX, encode_prompt
from tiny import BASE
from training.checkpoint import MOMENTS
from training.data import load_examples, split_rows
from training.suite_score import SuiteScore
from training.validation import BestLoss, Validation

BEST = "checkpoint-BEST.pth"
VALIDATED = {"val_share": 0.25, "eval_every": 2, "save_every": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "train.json")


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A run of six steps, validated after the second, fourth and last."""
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    script("finetune.py", *train_flags(data, out, **VALIDATED))
    return out


@pytest.fixture
def losses(monkeypatch):
    """Give a run these validation losses, one after another."""

    def give(*values):
        left = iter(values)
        monkeypatch.setattr(Validation, "loss", lambda self, model: next(left))

    return give


def log(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def val_losses(out) -> dict[int, float]:
    return {entry["step"]: entry["val_loss"] for entry in log(out) if "val_loss" in entry}


def checkpoint(out, name=BEST):
    return torch.load(out / name, weights_only=True)


def same_tensors(actual, expected):
    for group in ("adapter", *MOMENTS):
        first, second = (content["optimizer"].get(group, content["adapter"]) for content in (actual, expected))
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), group


def same_run(out, expected, last="checkpoint-6.pth"):
    names = {f.name for f in expected.iterdir()} - {"tensorboard"}
    assert {f.name for f in out.iterdir()} - {"tensorboard", "validation"} == names and BEST in names
    for name in (BEST, last):
        content, right = checkpoint(out, name), checkpoint(expected, name)
        same_tensors(content, right)
        assert (content["step"], content["validation"]) == (right["step"], right["validation"])
    logs = [[(e["step"], e["loss"], e.get("val_loss"), e.get("early_stop")) for e in log(f)] for f in (out, expected)]
    assert logs[0] == logs[1]


def loss_by_hand(adapter, examples) -> float:
    """Mean over all label tokens of -log p, row by row."""
    model, nll = Llama.build(BASE, adapter).model, []
    with torch.no_grad():
        for example in examples:
            log_p = model(torch.tensor([example.tokens]))[0].double().log_softmax(-1)
            targets = [(i, label) for i, label in enumerate(example.labels) if label != IGNORE_INDEX]
            nll += [-log_p[i - 1, label].item() for i, label in targets]
    return sum(nll) / len(nll)


@pytest.mark.parametrize("method", ["soft_moa", "topk_moelora"])
def test_the_loss_is_the_mean_over_the_label_tokens(method, data, tmp_path, capsys):
    """... also where the router is noisy and rows have unequal numbers of labels."""
    rows = [{"instruction": f"Say {i}", "input": "", "output": "x" * (1 + 7 * i)} for i in range(5)]
    (tmp_path / "val.json").write_text(json.dumps(rows))
    out, noisy = tmp_path / "out", {"noisy_router": True, "p_adapter_size": None, "prompt_len": None}
    settings = {"val_data_path": tmp_path / "val.json"} | (noisy if method == "topk_moelora" else {})
    flags = train_flags(data, out, method=method, max_steps=1, **settings)
    script("finetune.py", *flags)
    text = capsys.readouterr().err
    script("extract_adapter.py", out, "--best")
    examples = load_examples(tmp_path / "val.json", Llama.build(BASE).tokenizer, 300)
    assert val_losses(out)[1] == pytest.approx(loss_by_hand(out / "adapter.pth", examples), rel=1e-5)
    assert f"step 1: validation loss {val_losses(out)[1]:.4f}; the lowest so far" in text
    assert "24 rows and 5 for validation" in text


def test_a_share_is_taken_out_of_training(data, undisturbed, tmp_path, capsys):
    """The same rows as files of their own make the same run: evaluation changes no step."""
    rows = json.loads(data.read_text())
    train, validation = split_rows(rows, 0.25, 0)
    assert len(validation) == 6 and sorted(map(str, train + validation)) == sorted(map(str, rows))
    assert split_rows(rows, 0.25, 1)[1] != validation
    for name, part in (("train", train), ("val", validation)):
        (tmp_path / f"{name}.json").write_text(json.dumps(part))
    flags = VALIDATED | {"val_share": None, "val_data_path": tmp_path / "val.json"}
    script("finetune.py", *train_flags(tmp_path / "train.json", tmp_path / "files", **flags))
    same_run(tmp_path / "files", undisturbed)
    script("finetune.py", *train_flags(tmp_path / "train.json", tmp_path / "without"))
    assert [e["loss"] for e in log(tmp_path / "without")] == [e["loss"] for e in log(undisturbed)]
    assert "val_loss" not in log(tmp_path / "without")[-1] and not (tmp_path / "without" / BEST).exists()
    capsys.readouterr()
    script("finetune.py", *train_flags(data, tmp_path / "dry", val_share=0.25), "--dry_run")
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (plan["rows"], plan["val_rows"]) == (18, 6) and not (tmp_path / "dry").exists()


def test_the_best_checkpoint_is_that_of_the_lowest_loss(data, tmp_path, losses, capsys):
    losses(3.0, 2.0, 2.5, float("nan"), 2.0, 4.0)
    flags = train_flags(data, tmp_path / "out", val_share=0.25, eval_every=1, save_every=1, keep_checkpoints=1)
    script("finetune.py", *flags)
    assert list(val_losses(tmp_path / "out").values()) == [3.0, 2.0, 2.5, None, 2.0, 4.0]
    assert {f.name for f in (tmp_path / "out").glob("checkpoint*")} == {BEST, "checkpoint-6.pth"}
    assert checkpoint(tmp_path / "out")["step"] == 2
    assert checkpoint(tmp_path / "out", "checkpoint-6.pth")["validation"] == {
        "loss": 2.0,
        "step": 2,
        "stale": 4,
        "stop": False,
    }
    script("extract_adapter.py", tmp_path / "out" / BEST)
    assert "parameters after 2 steps" in capsys.readouterr().out
    losses(1.0)
    script("finetune.py", *train_flags(data, tmp_path / "out", val_share=0.25, max_steps=1), "--overwrite")
    assert checkpoint(tmp_path / "out")["step"] == 1
    script("finetune.py", *train_flags(data, tmp_path / "out", max_steps=1), "--overwrite")
    assert not (tmp_path / "out" / BEST).exists()


def test_patience_ends_a_run_in_order(data, tmp_path, losses, capsys):
    out, flags = tmp_path / "out", {"val_share": 0.25, "eval_every": 1, "patience": 2}
    losses(3.0, 2.0, 2.0, 2.1)
    script("finetune.py", *train_flags(data, out, **flags))
    assert [entry.get("early_stop") for entry in log(out)] == [None] * 3 + [True]
    text = capsys.readouterr().err
    assert "the run ends after step 4; the lowest" in text and ", no lower one in 2 evaluations since" in text
    assert checkpoint(out, "checkpoint-4.pth")["step"] == 4 and checkpoint(out)["step"] == 2
    script("extract_adapter.py", out)
    assert [problem for problem in read_run(out).problems if "steps" in problem] == []
    script("finetune.py", *train_flags(data, out, **flags), "--resume")
    assert f"{out}: the run is complete, it ended after step 4" in capsys.readouterr().err
    assert len(log(out)) == 4


class Killed(BaseException):
    """The process is gone: nothing handles it."""


@pytest.mark.parametrize("moment", [*range(6), "signal", "best", "numbered"])
def test_a_run_killed_at_any_step_goes_on_the_same(moment, data, undisturbed, tmp_path, monkeypatch):
    """moment: steps after which it is killed; best, numbered: before that checkpoint is written."""
    out, log_step, write = tmp_path / "out", training.recorder.RunLog.step, training.checkpoint.write_torch
    flags, killed = train_flags(data, out, **VALIDATED), []

    def kill():
        if not killed:
            killed.append(True)
            raise Killed

    def step(self, entry):
        if moment == "signal" and entry["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if entry["step"] - 1 == moment:
            kill()
        log_step(self, entry)

    def write_or_kill(path, content):
        if path.name == {"best": BEST, "numbered": "checkpoint-6.pth"}.get(moment) and content["step"] > 3:
            kill()
        write(path, content)

    monkeypatch.setattr(training.recorder.RunLog, "step", step)
    monkeypatch.setattr(training.checkpoint, "write_torch", write_or_kill)
    with pytest.raises((Killed, SystemExit)) as end:
        script("finetune.py", *flags)
    assert end.type is Killed or end.value.code == 143
    moment = None
    script("finetune.py", *flags, "--resume")
    (out / "checkpoint-4.pth").unlink(missing_ok=True)  # of the signal
    same_run(out, undisturbed)


def test_an_old_checkpoint_goes_on_and_a_damaged_one_is_refused(data, undisturbed, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(undisturbed, out)
    (out / "checkpoint-6.pth").unlink()
    content = checkpoint(out, "checkpoint-3.pth")
    torch.save(content | {"validation": {"loss": 1.0}}, tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match="damaged.pth: missing validation keys"):
        training.checkpoint.read(tmp_path / "damaged.pth", None)
    del content["validation"]
    torch.save(content, out / "checkpoint-3.pth")
    script("finetune.py", *train_flags(data, out, **VALIDATED), "--resume")
    assert val_losses(out) == val_losses(undisturbed)


def test_what_is_left_of_a_run_is_not_deleted(data, undisturbed, tmp_path, capsys):
    """A run goes on from BEST where no other checkpoint is left, and not at all from its adapter."""
    out, flags = tmp_path / "out", train_flags(data, tmp_path / "out", **VALIDATED)

    def refused(*words) -> str:
        with pytest.raises(SystemExit):
            script("finetune.py", *flags, *words)
        return capsys.readouterr().err

    shutil.copytree(undisturbed, out)
    (out / "checkpoint-6.pth").unlink()
    (out / "checkpoint-3.pth").replace(out / BEST)
    assert f"{out}: holds a run already ({BEST})" in refused()
    script("finetune.py", *flags, "--resume")
    shutil.copy(undisturbed / "checkpoint-3.pth", out)
    same_run(out, undisturbed)
    script("extract_adapter.py", out)
    for file in out.glob("checkpoint*"):
        file.unlink()
    assert f"{out}: holds a run already (adapter.pth)" in refused()
    assert f"{out}: holds adapter.pth, and no checkpoint to go on from" in refused("--resume")
    assert (out / "adapter.pth").exists() and len(log(out)) == 6


def test_an_adapter_to_start_from(data, undisturbed, tmp_path, capsys):
    """The first step's loss is that after the earlier run, its moments are those of a first step."""
    source, out = tmp_path / "source", tmp_path / "out"
    script("extract_adapter.py", undisturbed / "checkpoint-6.pth", "--output_dir", source)
    flags = train_flags(data, out, init_adapter=source, max_steps=2, save_every=1, seed=0)
    script("finetune.py", *flags)
    fresh = tmp_path / "fresh"
    script("finetune.py", *train_flags(data, fresh, max_steps=2))
    assert log(out)[0]["loss"] < log(fresh)[0]["loss"] - 0.1
    trained = checkpoint(undisturbed, "checkpoint-6.pth")["adapter"]
    first = checkpoint(out, "checkpoint-1.pth")["adapter"]
    assert all((first[key] - trained[key]).abs().max() < 0.011 for key in trained)  # one step of Adam
    # A run that goes on needs the adapter no more
    second = checkpoint(out, "checkpoint-2.pth")
    shutil.rmtree(source)
    (out / "checkpoint-2.pth").unlink()
    script("finetune.py", *train_flags(data, out, max_steps=2), "--resume")
    same_tensors(checkpoint(out, "checkpoint-2.pth"), second)


REFUSED = {
    "--patience 2": "--patience has no effect without --val_data_path or --val_share",
    "--eval_every 2": "--eval_every has no effect without --val_data_path or --val_share",
    "--val_share 1": "--val_share must be below 1, not 1",
    "--val_share 0.99": "--val_share 0.99 of 24 rows leaves none to train on",
    "--val_share 0.5 --val_data_path x": "--val_data_path and --val_share exclude each other",
    "--val_data_path missing.json": "missing.json",
    "--val_suite gsm8k": "--val_suite needs --val_data_path, or --val_share and --val_suite_path",
    "--val_suite_rows 3": "--val_suite_rows has no effect without --val_suite",
    "--val_data_path DATA --val_suite gsm9k": "no suite is named 'gsm9k' (nearest: GSM8K)",
    "--val_data_path DATA --val_suite mbpp": "--val_suite mbpp: programs are scored afterwards",
    "--val_data_path DATA --val_suite gsm8k": "row 1: field 'answer' is missing",
    "--val_data_path DATA --val_suite gsm8k --val_suite_path BARE": "bare.json: line 1: field 'input' is missing",
    "--resume --init_adapter x": "--resume goes on with a run's own adapter: leave --init_adapter out",
    "--init_adapter missing.pth": "missing",
    "--init_adapter ADAPTER --lora_rank 3": "the adapter has lora_rank 2, the run 3 (--adapter_config",
    "--init_adapter ADAPTER --method lora": "the adapter has block_router 'soft', the run 'none'",
}


@pytest.mark.parametrize("words", REFUSED)
def test_flags_that_do_not_fit_are_refused(words, data, undisturbed, tmp_path, capsys):
    out, bare = tmp_path / "out", tmp_path / "bare.json"
    bare.write_text('{"instruction": "x", "answer": "1"}')
    typed = words.replace("DATA", str(data)).replace("BARE", str(bare)).split()
    if "ADAPTER" in typed:
        script("extract_adapter.py", undisturbed, "--output_dir", tmp_path / "source")
        typed[typed.index("ADAPTER")] = tmp_path / "source"
    small = {"lora_rank": None} if "--lora_rank" in typed else {}
    if "--method" in typed:
        small = {"method": None, "p_adapter_size": None, "prompt_len": None}
    with pytest.raises(SystemExit) as end:
        script("finetune.py", *train_flags(data, out, max_steps=1, **small), *typed)
    assert end.value.code in (1, 2) and REFUSED[words] in capsys.readouterr().err
    assert not out.exists()


SUITE = {"val_suite": "gsm8k", "val_suite_rows": 5}


@pytest.fixture(scope="module")
def suite_path(tmp_path_factory):
    """Test rows; "answer" is what an untrained model may well say."""
    rows = [{"instruction": f"Say {i % 3}", "input": "", "answer": str(i % 3)} for i in range(7)]
    path = tmp_path_factory.mktemp("suite") / "rows.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.fixture(scope="module")
def scored(data, suite_path, tmp_path_factory):
    """The undisturbed run, with a suite's score."""
    out = tmp_path_factory.mktemp("runs") / "scored"
    script("finetune.py", *train_flags(data, out, **VALIDATED, **SUITE, val_suite_path=suite_path))
    return out


def test_a_suites_score_changes_no_number_of_the_run(scored, undisturbed, suite_path, tmp_path):
    scores = {entry["step"]: entry["val_score"] for entry in log(scored) if "val_score" in entry}
    assert scores.keys() == val_losses(undisturbed).keys()
    rows = json.loads(suite_path.read_text())
    answered = [json.loads(line) for line in (scored / "validation/GSM8K.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "generate"} for row in answered] == rows[:5]
    assert scores[6] == score_file(scored / "validation/GSM8K.jsonl").robust.percent
    script("extract_adapter.py", scored / "checkpoint-6.pth", "--output_dir", tmp_path)
    llm = Llama.build(BASE, tmp_path / "adapter.pth", max_seq_len=500)
    prompts = [encode_prompt(llm.tokenizer, row, 300) for row in rows[:5]]
    assert [row["generate"] for row in answered] == list(map(llm.tokenizer.decode, llm.generate(prompts, 200)))
    same_run(scored, undisturbed)


def test_a_model_whose_loss_is_not_finite_is_not_asked(data, suite_path, tmp_path, losses, monkeypatch):
    """... as its logits may not be either, and the run goes on."""
    losses(float("nan"), 1.0)
    monkeypatch.setattr(SuiteScore, "__call__", lambda self: 50.0)
    flags = {"val_share": 0.25, "eval_every": 1, "max_steps": 2} | SUITE
    script("finetune.py", *train_flags(data, tmp_path / "out", **flags, val_suite_path=suite_path))
    assert [entry.get("val_score") for entry in log(tmp_path / "out")] == [None, 50.0]


def test_a_resumed_run_has_the_same_scores(data, scored, suite_path, tmp_path):
    out, entries = tmp_path / "out", log(scored)
    shutil.copytree(scored, out)
    (out / "checkpoint-6.pth").unlink()
    script("finetune.py", *train_flags(data, out, **VALIDATED, **SUITE, val_suite_path=suite_path), "--resume")
    assert [entry.get("val_score") for entry in log(out)] == [entry.get("val_score") for entry in entries]


@pytest.mark.parametrize("model_parallel_size", [1, 2])
def test_two_processes_agree_with_one(model_parallel_size, data, scored, suite_path, tmp_path):
    out, batch_size = tmp_path / "out", model_parallel_size
    layout = {"model_parallel_size": model_parallel_size, "batch_size": batch_size, "val_suite_path": suite_path}
    result = torchrun(2, "finetune.py", *train_flags(data, out, **VALIDATED, **SUITE, **layout))
    assert result.returncode == 0, result.stderr
    assert val_losses(out) == pytest.approx(val_losses(scored), rel=1e-5)
    assert [entry.get("val_score") for entry in log(out)] == [entry.get("val_score") for entry in log(scored)]
    assert checkpoint(out)["step"] == checkpoint(scored)["step"]
    assert result.stderr.count(": validation loss") == 3


def test_other_validation_than_at_the_start_is_refused(data, undisturbed, tmp_path, capsys):
    flags = ["--data_path", data, "--ckpt_dir", BASE, "--output_dir", undisturbed, "--resume", "--device", "cpu"]
    other = {("--val_share", 0.5): "--val_share 0.25, not 0.5", ("--patience", 3): "--patience left out, not 3"}
    for words, message in other.items():
        with pytest.raises(SystemExit):
            script("finetune.py", *flags, *words)
        assert message in capsys.readouterr().err
    script("finetune.py", *train_flags(data, tmp_path / "out", val_data_path=data, max_steps=1))
    flags[5], val = tmp_path / "out", write_rows(tmp_path / "val.json", 3)
    with pytest.raises(SystemExit):
        script("finetune.py", *flags, "--val_data_path", val)
    assert f"{val}: is not the --val_data_path" in capsys.readouterr().err


def test_what_counts_as_an_improvement():
    best = BestLoss()
    assert [best.update(step, loss, 3) for step, loss in enumerate((2.0, 2.0, 1.9, float("nan"), 5.0), 1)] == [
        True,
        False,
        True,
        False,
        False,
    ]
    assert (best.step, best.stale, best.stop) == (3, 2, False)
    best.update(6, 1.95, 3)
    assert best.stop


TRACKER = """
calls = []
def init(**settings): calls.append(settings)
def log(scalars, step): calls.append((step, scalars))
def finish(): calls.append("finish")
"""


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_gets_what_tensorboard_gets(name, data, tmp_path, monkeypatch, capsys):
    out, flags = tmp_path / "out", {"max_steps": 2, "val_share": 0.25, "report_to": name}
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(training.config, "find_spec", lambda name: None)
        script("finetune.py", *train_flags(data, out, **flags))
    assert f"--report_to {name}: the package {name} is not installed" in capsys.readouterr().err
    (tmp_path / f"{name}.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(tmp_path)
    script("finetune.py", *train_flags(data, out, **flags))
    begin, *steps, end = sys.modules.pop(name).calls
    assert (begin["project"], begin["name"], begin["config"]["max_steps"]) == ("moa", "out", 2)
    assert (begin["resume"], begin.get("mode")) == ("never", "offline" if name == "wandb" else None)
    names = ("loss", "lr", "tokens_per_s", "val_loss")
    assert steps == [(e["step"], {name: e[name] for name in names if name in e}) for e in log(out)] and end == "finish"
