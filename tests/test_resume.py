"""Going on with a run: what is kept, what is refused, what happens when somebody else was there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import training.recorder
from commands import script, train_flags, write_rows
from llama import Llama, Transformer
from moa.files import lock
from tiny import BASE

EARLIER = Path(__file__).parent / "data" / "run_79f64d3"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "train.json")


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of four steps, with its adapter."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    script("finetune.py", *train_flags(data, out, max_steps=4))
    script("extract_adapter.py", out)
    return out


def steps(out) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def begun(data, out):
    """A run of four steps that ends before its first checkpoint."""

    def end(*arguments):
        raise OSError("the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.recorder, "state_dict", end)
        with pytest.raises(SystemExit):
            script("finetune.py", *train_flags(data, out, max_steps=4))
    return out


def resume_flags(data, out):
    return ["--data_path", data, "--ckpt_dir", BASE, "--output_dir", out, "--resume", "--device", "cpu"]


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as end:
        script("finetune.py", *words)
    assert end.value.code == 1
    return capsys.readouterr().err


def test_before_the_first_checkpoint_the_rows_of_a_step_are_those_of_the_start(data, tmp_path):
    """... also where micro-batches are of another size, as they may be on other processes."""
    out = begun(data, tmp_path / "out")
    before = json.loads((out / "config.json").read_text())
    script("finetune.py", *resume_flags(data, out), "--batch_size", 1)
    after = json.loads((out / "config.json").read_text())
    assert [entry["rows"] for entry in steps(out)] == [4] * 4
    for name in ("rows_per_step", "lr", "steps", "warmup_steps", "adapter"):
        assert after[name] == before[name], name


@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_run_that_came_in_between_is_left_alone(data, tmp_path, monkeypatch, capsys, resume):
    """It began when this one had looked into the folder, and was over before this one had loaded its model."""
    out, build = tmp_path / "out", Llama.build

    def slow(*arguments, **settings):
        monkeypatch.setattr(Llama, "build", build)
        script("finetune.py", *train_flags(data, out, max_steps=1))
        return build(*arguments, **settings)

    monkeypatch.setattr(Llama, "build", slow)
    message = refused(capsys, *train_flags(data, out, max_steps=2), *resume)
    assert f"{out}: another run has been there in the meantime" in message
    assert (out / "checkpoint-1.pth").exists() and len(steps(out)) == 1


@pytest.mark.parametrize(
    "damage",
    [
        {"settings": None},
        {"base": {}},
        {"adapter": {"method": "x"}},
        {"adapter": {"method": "lora", "lora_rank": "x"}},
        {"settings": {"max_steps": 4.5}},
    ],
)
def test_a_damaged_record_is_refused_in_one_sentence(finished, data, tmp_path, capsys, damage):
    out, (name, value) = tmp_path / "out", *damage.items()
    shutil.copytree(finished, out)
    record = json.loads((out / "config.json").read_text())
    record[name] = record[name] | value if name == "settings" and value else value
    (out / "config.json").write_text(json.dumps(record))
    message = refused(capsys, *resume_flags(data, out))
    assert f"{out / 'config.json'}: not the record of a run that can be resumed (" in message


SAME = ["--swi_x 4 --lora_rank 2", "--lora_layers all", '{"lora_rank": 2}', "adapter_params.json"]
OTHER = {
    "--lr 0.02": "--lr 0.01, not 0.02",
    "--swi_x 3": "--swi_x 4, not 3",
    "--train_on_input": "--train_on_input False, not True",
    '{"lora_rank": 3}': "--lora_rank 2, not 3",
    '{"method": "lora"}': "--method soft_moa, not lora",
}


@pytest.mark.parametrize("words", [*SAME, *OTHER])
def test_what_is_typed_on_resume_must_be_what_the_run_was_started_with(finished, data, tmp_path, capsys, words):
    """... in whatever spelling: as the method's preset came to, as a file of settings."""
    before = {f.name: f.stat().st_mtime_ns for f in finished.iterdir() if f.name != "config.json"}
    if words == "adapter_params.json":
        typed = ["--adapter_config", finished / words]
    elif words.startswith("{"):
        (tmp_path / "mixture.json").write_text(words)
        typed = ["--adapter_config", tmp_path / "mixture.json"]
    else:
        typed = words.split()
    flags = [*resume_flags(data, finished), *typed]
    if words in SAME:
        script("finetune.py", *flags)
        assert "the run is complete" in capsys.readouterr().err
    else:
        assert OTHER[words] in refused(capsys, *flags)
    assert {f.name: f.stat().st_mtime_ns for f in finished.iterdir() if f.name != "config.json"} == before


def test_a_folder_with_a_run_is_left_alone(finished, data, tmp_path, capsys):
    before = {f.name: f.stat().st_mtime_ns for f in finished.iterdir()}
    message = refused(capsys, *train_flags(data, finished))
    assert "holds a run already" in message and "--resume" in message and "--overwrite" in message
    other = write_rows(tmp_path / "other.json", 5)
    assert "is not the --data_path" in refused(capsys, *resume_flags(other, finished))
    with lock(finished / ".lock", "taken"):
        message = refused(capsys, *train_flags(data, finished), "--overwrite")
    assert f"{finished}: another run is writing there" in message
    assert {f.name: f.stat().st_mtime_ns for f in finished.iterdir()} == before


@pytest.mark.parametrize("method", ["soft_moa", "topk_moelora", "unipeft"])
def test_a_run_of_an_earlier_revision_goes_on_and_its_adapter_loads(method, tmp_path):
    """tests/data/run_79f64d3: runs of four steps by revision 79f64d3, with the checkpoint of the second. expected.npz:
    its logits with that adapter."""
    shutil.copytree(EARLIER, tmp_path / "earlier")
    out, data = tmp_path / "earlier" / method, tmp_path / "earlier" / "train.json"
    before = steps(out)
    script("finetune.py", *resume_flags(data, out))
    assert [entry["step"] for entry in steps(out)] == [1, 2, 3, 4]
    for entry, same in zip(steps(out), before, strict=True):
        assert entry["loss"] == pytest.approx(same["loss"], rel=1e-6) and entry["lr"] == same["lr"]
    record = json.loads((out / "config.json").read_text())
    assert [entry["step"] for entry in record["resumed"]] == [2]

    with np.load(EARLIER / method / "expected.npz") as expected:
        tokens, logits = (torch.from_numpy(expected[name]) for name in ("tokens", "logits"))
    with torch.no_grad():
        actual = Llama.build(BASE, EARLIER / method / "adapter.pth").model(tokens)
    assert (actual - logits).abs().max() < 1e-5


def test_loss_on_the_prompt_clipping_beta2_and_a_warm_up_beyond_the_end(data, tmp_path):
    out, flags = tmp_path / "out", {"train_on_input": True, "grad_clip": 0.1, "beta2": 0.999, "warmup_epochs": 1}
    script("finetune.py", *train_flags(data, out, max_steps=1, **flags))
    (entry,) = steps(out)
    assert entry["label_tokens"] == entry["tokens"] - entry["rows"]  # nothing precedes a row's first token
    assert entry["lr"] == pytest.approx(0.01 / 6)  # of 24 rows, 4 at a time
    moments = torch.load(out / "checkpoint-1.pth", weights_only=True)["optimizer"]
    squares = {name: sum(t.double().square().sum().item() for t in moments[name].values()) for name in moments}
    assert squares["exp_avg"] == pytest.approx((0.1 * 0.1) ** 2, rel=1e-3)
    assert sum(t.sum().item() for t in moments["exp_avg_sq"].values()) == pytest.approx(0.001 * 0.1**2, rel=1e-3)


def test_beginning_anew_takes_everything_of_the_old_run_away(data, tmp_path):
    out = tmp_path / "out"
    script("finetune.py", *train_flags(data, out, max_steps=2, save_every=1))
    script("extract_adapter.py", out)
    (out / "checkpoint-9.pth.damaged").write_text("")
    (out / "mine.txt").write_text("")
    script("finetune.py", *train_flags(data, out, max_steps=1), "--overwrite")
    left = {f.name for f in out.iterdir() if f.name != ".lock"}
    assert left == {"checkpoint-1.pth", "config.json", "log.jsonl", "tensorboard", "mine.txt"} and len(steps(out)) == 1


def test_only_the_newest_checkpoints_are_kept_when_asked(data, tmp_path):
    out = tmp_path / "out"
    script("finetune.py", *train_flags(data, out, max_steps=5, save_every=1, keep_checkpoints=2))
    assert sorted(f.name for f in out.glob("checkpoint*")) == ["checkpoint-4.pth", "checkpoint-5.pth"]


def test_a_gradient_whose_square_is_too_large_is_not_taken(data, tmp_path, monkeypatch):
    """AdamW keeps squares: one such step, and no checkpoint could be gone on from any more."""
    forward, count = Transformer.forward, iter(range(1, 100))

    def large(model, tokens, *arguments, **named):
        losses = forward(model, tokens, *arguments, **named)
        if not tokens.is_meta and next(count) == 3:  # meta: the estimate of memory
            return losses._replace(ce_loss=losses.ce_loss * 1e22)
        return losses

    monkeypatch.setattr(Transformer, "forward", large)
    out = tmp_path / "out"
    script("finetune.py", *train_flags(data, out, max_steps=4, batch_size=4, accum_iter=1))
    assert ["skipped" in entry for entry in steps(out)] == [False, False, True, False]
    moments = torch.load(out / "checkpoint-4.pth", weights_only=True)["optimizer"]["exp_avg_sq"]
    assert all(torch.isfinite(tensor).all() for tensor in moments.values())
