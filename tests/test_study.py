"""The study: its lines, its statistics, and one small study from the rows to the tables."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from commands import refused, run, script
from exps import paired, study
from exps.paired import holm, paired_difference, student_t
from exps.scorer import row_losses
from exps.study import Flags, lines_of
from exps.study_data import SPLITS, write_rows
from llama.checkpoint import load_params_and_tokenizer
from llama.data import Example
from moa.reading import read_rows
from tiny import BASE, build
from training.data import label_count
from training.validation import Validation

# ---- statistics


def losses(generator, effect=0.0, of_seeds=0.01, of_rows=0.05, seeds=3, rows=300):
    """Losses of two methods, (S, R) each: rows of unlike length and difficulty, which both methods share; seeds, and
    single rows of a seed, by which they differ. The first is worse by `effect` per label."""
    n = generator.integers(20, 60, rows)
    common = generator.gamma(2, 0.5, rows) + generator.normal(0, of_seeds, (seeds, 1))
    own = generator.normal(0, of_seeds, (2, seeds, 1)) + generator.normal(0, of_rows, (2, seeds, rows))
    values = (common + own) * n
    return values[0] + effect * n, values[1], n


@pytest.mark.parametrize("spread", [{}, {"of_rows": 0.0}, {"of_seeds": 0.0}, {"of_seeds": 0.003}])
def test_equal_methods_are_rarely_called_different(spread, monkeypatch):
    monkeypatch.setattr(paired, "DRAWS", 1)  # of the bootstrap, which decides nothing
    generator = np.random.default_rng(0)
    ps = [paired_difference(*losses(generator, **spread)).p for _ in range(200)]
    assert sum(p < 0.05 for p in ps) <= 16  # 8 %
    assert sum(p < 0.05 for p in holm(ps)) == 0


def test_a_planted_difference_is_found_among_twenty_lines():
    """... after Holm's correction, by as much as a tenth of the learning rate makes, and with its size."""
    generator = np.random.default_rng(1)
    equal = [paired_difference(*losses(generator)) for _ in range(19)]
    planted = paired_difference(*losses(generator, effect=0.4))
    corrected = holm([planted.p, *(difference.p for difference in equal)])
    assert corrected[0] < 0.05 and min(corrected[1:]) > 0.05
    assert planted.interval[0] < 0.4 < planted.interval[1] and abs(planted.mean - 0.4) < 0.05


def test_the_difference_is_paired_and_per_label():
    method, reference, n = losses(np.random.default_rng(2), effect=0.1)
    difference = paired_difference(method, reference, n)
    assert difference.mean == pytest.approx((method.sum() - reference.sum()) / (3 * n.sum()))
    harder = np.random.default_rng(3).gamma(9, 20, (1, len(n)))  # of rows, for both
    easier = paired_difference(method + harder, reference + harder, n)
    assert easier.p == pytest.approx(difference.p) and easier.bootstrap == pytest.approx(difference.bootstrap)
    mirrored = paired_difference(reference, method, n)
    assert mirrored.interval == pytest.approx((-difference.interval[1], -difference.interval[0]))
    same = paired_difference(method, method, n)
    assert (same.mean, same.p, same.interval) == (0, 1, (0, 0))
    assert paired_difference(method[:1], reference[:1], n)[1:] == (None, None, None)  # one seed tells no spread


def test_with_many_seeds_and_rows_both_intervals_agree():
    difference = paired_difference(*losses(np.random.default_rng(4), seeds=40, rows=400))
    widths = [high - low for low, high in (difference.interval, difference.bootstrap)]
    assert widths[0] == pytest.approx(widths[1], rel=0.15)


@pytest.mark.parametrize(
    ("p", "freedom", "quantile"), [(0.05, 1, 12.7062), (0.05, 2, 4.30265), (0.0025, 2, 19.9625), (0.05, 400, 1.96591)]
)
def test_students_distribution(p, freedom, quantile):
    assert student_t(p, freedom) == pytest.approx(quantile, rel=1e-4)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.9]) == pytest.approx([0.04, 0.09, 0.09, 0.9])


# ---- lines


def test_lines_of_a_study():
    text = "lora,soft_moa:swi_x=0 mola:layer_experts=2,4,6,8,lora:lr_scale=0.1,lora:seeds=1,2:rates=1e-2"
    lines = lines_of(text, Flags(seeds="0,5", rates="1e-3,1e-4"))
    assert [line.model for line in lines] == ["lora", "soft_moa-swi_x=0", "mola-layer_experts=2,4,6,8", "lora", "lora"]
    assert [line.lr_scale for line in lines] == [1, 1, 1, 0.1, 1]
    assert [line.seeds for line in lines] == [(0, 5)] * 4 + [(1, 2)]
    assert lines[4].rates == (1e-2,) and lines[0].rates == (1e-3, 1e-4)


@pytest.mark.parametrize(
    ("words", "expected", "status"),
    [
        (["--methods", "lora,sofd_moa"], ["sofd_moa", "soft_moa"], 1),
        (["--methods", "lora:lora_rang=2"], ["--lora_rang", "--lora_rank"], 2),
        (["--methods", "lora:max_steps=7,lora:max_steps=7"], ["named twice"], 1),
        (["--methods", "custom"], ["custom"], 2),
        (["--methods", "lora:lora_rank"], ["flag=value", "lora_rank"], 1),
        (["--methods", "lora", "--rates", "1e-3,high"], ["rates", "high"], 1),
        (["--methods", "lora", "--data", "gsm8k"], ["--data", "gsm8k"], 1),
        (["--methods", "lora", "--collect_only"], ["no line is finished"], 1),
    ],
)
def test_a_wrong_study_is_refused_before_any_work(words, expected, status, tmp_path):
    result = run("-m", "exps.study", *words, "--out", tmp_path / "out", "--ckpt_dir", BASE)
    refused(result, *expected, status=status)
    assert not (tmp_path / "out").exists()


# ---- measures and runs


def test_losses_by_row_are_those_of_the_validation():
    model = build("soft_moa_instance").model
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length in (5, 30, 12, 9):
        tokens = torch.randint(0, 512, (length,), generator=generator).tolist()
        examples.append(Example(tokens, [-100] * 3 + tokens[3:], 3))
    values = row_losses(model, examples)
    labels = sum(map(label_count, examples))
    assert len(values) == 4
    assert sum(values) / labels == pytest.approx(Validation(examples, 2, 1).loss(model), rel=1e-5)
    alone = [row_losses(model, [example])[0] for example in examples]
    assert values == pytest.approx(alone, rel=1e-5)


LINES = "lora lora:lr_scale=0.1 ia3"
BUDGET = ["--steps", 4, "--batch_size", 2, "--train_rows", 20, "--val_rows", 4, "--test_rows", 6, "--demo_rows", 3]
VARYING = ("peak_memory_bytes", "git_revision")  # of the same run done again
BUDGET += ["--seeds", "0,1", "--rates", "1e-2,1e-5", "--max_seq_len", 420, "--bf16", "False", "--device", "cpu"]


@pytest.fixture
def trainings(monkeypatch):
    """The command lines of finetune.py, which is run in this process."""
    commands = []

    def run_here(command, **how):
        commands.append(command[2:])
        script(command[1], *command[2:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=run_here))
    monkeypatch.setattr(study, "code_hash", lambda: "code")  # a file may be edited meanwhile
    return commands


def test_a_study_from_the_rows_to_the_tables_and_again(tmp_path, trainings, capsys):
    out, page = tmp_path / "out", tmp_path / "page.md"
    page.write_text("before\n<!-- study: begin -->\nold\n<!-- study: end -->\nafter\n")
    words = list(map(str, ["--methods", LINES, *BUDGET, "--ckpt_dir", BASE, "--out", out, "--page", page]))
    study.main(words)
    # Two rates on the first seed, the second seed at the chosen one; and for the planted line both seeds at a tenth
    assert len(trainings) == 3 + 2 + 3
    lora = out / "demo" / "lora-lr0.01"
    assert sorted(path.name for path in (out / "demo").iterdir() if "lora" in path.name) == [
        *("lora-lr0.001", "lora-lr0.01", "lora-lr1e-05")
    ]
    assert not (out / "demo/lora-lr1e-05/s0/test.json").exists()  # a rate that is not chosen sees no test

    def numbers(content):
        lines = [{k: v for k, v in line.items() if k not in VARYING} for line in content["demo"]["lines"]]
        return {line["method"]: line for line in lines}

    content = json.loads((out / "results.json").read_text())
    lines = numbers(content)
    assert lines["lora"]["lr"] == 0.01 and lines["lora:lr_scale=0.1"]["lr"] == pytest.approx(0.001)
    assert len(lines["lora"]["test_loss"]) == 2 and lines["base"]["seeds"] == []
    measured = json.loads((lora / "s1" / "test.json").read_text())
    assert lines["lora"]["test_loss"][1] == pytest.approx(sum(measured["losses"]) / sum(measured["labels"]))
    minus_lora = content["demo"]["minus_reference"]["lora"]["loss"]
    expected = np.mean(lines["ia3"]["test_loss"]) - np.mean(lines["lora"]["test_loss"])
    assert minus_lora["ia3"]["mean"] == pytest.approx(expected) and "lora" not in minus_lora
    text = (out / "results.md").read_text()
    assert "4 steps of 2 of 20 rows; losses on 6 test rows, accuracy by the published rule on 3 problems" in text
    assert text in capsys.readouterr().out and content["demo"]["lines"][1]["git_revision"][0] in text
    assert page.read_text().startswith("before\n<!-- study: begin -->\n\n## demo") and page.read_text().endswith(
        "after\n"
    )
    require_peft_schema(json.loads((out / "method_comparison/lora--base-lr0.01-s1.json").read_text()))

    questions = {
        split: {row["instruction"] for _, row in rows_of(out / "demo/rows" / f"{split}.json")}
        for split in ("train", "val", "test")
    }
    assert [len(questions[split]) for split in questions] == [20, 4, 6]
    assert not questions["train"] & questions["val"] and not questions["test"] & (questions["train"] | questions["val"])

    trainings.clear()
    (lora / "s1" / "test.json").unlink()
    study.main(words)  # what is missing is measured again, of the adapter that there is
    assert not trainings and numbers(json.loads((out / "results.json").read_text())) == lines
    with pytest.raises(SystemExit, match="made with other steps"):
        study.main(swap(words, "--steps", "5"))
    record = json.loads((lora / "s0/study.json").read_text())
    (lora / "s0/study.json").write_text(json.dumps(record | {"code": "another"}))
    with pytest.raises(SystemExit):
        study.main([*words, "--collect_only"])
    assert "lora-lr0.01/s0: made with other code" in capsys.readouterr().err
    study.main([*words, "--redo"])
    assert len(trainings) == 1 and numbers(json.loads((out / "results.json").read_text())) == lines


def rows_of(path):
    return enumerate(read_rows(path, ("instruction", "output")))


def swap(words, name, value):
    at = words.index(name)
    return [*words[: at + 1], value, *words[at + 2 :]]


def require_peft_schema(content):
    """What the reader of PEFT's method_comparison takes from a file, in the types that it makes of it."""
    run_info, train_info, meta_info = (content[name] for name in ("run_info", "train_info", "meta_info"))
    assert set(content) == {"run_info", "train_info", "meta_info"}
    for name in ("created_at", "experiment_name", "peft_branch"):
        assert isinstance(run_info[name], str)
    assert run_info["peft_config"]["peft_type"] == "LORA" and run_info["train_config"]["model_id"] == "base"
    assert train_info["status"] == "success" and float(run_info["total_time"]) == float(train_info["train_time"]) == 0
    for name in ("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th"):
        assert isinstance(train_info[name], int)
    assert isinstance(train_info["file_size"], int) and train_info["num_trainable_params"] > 0
    metrics = train_info["metrics"][-1]
    assert 0 <= metrics["test accuracy"] <= 1 and metrics["train loss"] > 0
    assert isinstance(metrics["train samples"], int) and isinstance(metrics["train total tokens"], int)
    packages = ("peft", "transformers", "datasets", "torch", "bitsandbytes")
    assert {f"{name}-version" for name in packages} <= set(meta_info["package_info"])
    assert {"system_info", "pytorch_info", "model_info", "dataset_info"} <= set(meta_info)


def test_rows_of_a_file_are_drawn_once_each_and_only_those_that_fit(tmp_path):
    row = {"input": "", "output": "1"}
    rows = [row | {"instruction": f"{i % 20} + 1?"} for i in range(40)] + [row | {"instruction": "a" * 200}]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    _, tokenizer = load_params_and_tokenizer(BASE)
    flags = Flags(train_rows=12, val_rows=3, test_rows=5, max_seq_len=210)
    folder = write_rows(tmp_path / "rows", tmp_path / "train.json", flags, tokenizer)
    parts = {split: [row["instruction"] for _, row in rows_of(folder / f"{split}.json")] for split in SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {"train": 12, "val": 3, "test": 5}
    assert sorted(sum(parts.values(), [])) == sorted(f"{i} + 1?" for i in range(20))
    more = replace(flags, test_rows=6)
    with pytest.raises(ValueError, match=r"21 rows are wanted .* 20 of 41"):
        write_rows(tmp_path / "more", tmp_path / "train.json", more, tokenizer)
    with pytest.raises(ValueError, match="other rows"):
        write_rows(folder, tmp_path / "train.json", replace(flags, val_rows=2), tokenizer)


def test_a_training_that_diverges_or_fails_costs_its_line_alone(tmp_path, trainings, monkeypatch, capsys):
    here = study.subprocess.run

    def run_or_fail(command, stdout, **how):
        lr, method = (command[command.index(name) + 1] for name in ("--lr", "--method"))
        if method == "ia3" or lr == "0.01":
            stdout.write(b"error: the loss is not finite\n" if method == "lora" else b"error: no such thing\n")
            return SimpleNamespace(returncode=1)
        return here(command)

    monkeypatch.setattr(study.subprocess, "run", run_or_fail)
    words = ["--methods", "ia3,lora", *swap(BUDGET, "--seeds", "0"), "--ckpt_dir", BASE, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as end:
        study.main(list(map(str, words)))
    assert end.value.code == 1 and len(trainings) == 1
    assert "ia3-lr0.01/s0: error: no such thing" in capsys.readouterr().err
    lines = json.loads((tmp_path / "out/results.json").read_text())["demo"]["lines"]
    assert [(line["method"], line["lr"]) for line in lines] == [("base", None), ("lora", 1e-5)]
    assert lines[1]["rates"]["0.01"] is None and lines[1]["rates"]["1e-05"] > 0


def test_an_edited_file_of_a_line_is_another_line(tmp_path, trainings):
    mixture, out = tmp_path / "mixture.json", tmp_path / "out"
    mixture.write_text('{"ia3_layers": "all"}')
    words = ["--methods", f"custom:adapter_config={mixture}", *swap(BUDGET, "--rates", "1e-2"), "--out", out]
    words = list(map(str, [*words, "--ckpt_dir", BASE]))
    study.main(words)
    study.main(words)
    assert len(trainings) == 2  # both seeds, once
    mixture.write_text('{"ia3_layers": "0-1"}')
    with pytest.raises(SystemExit, match=f"made with other --adapter_config {mixture}"):
        study.main(words)
