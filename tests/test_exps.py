"""The experiments: recipes, the scripts that follow them, and the tables of their runs."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cli import parse
from commands import REPO, refused, run, write_rows
from exps.recipe import RECIPES, generate_flags, train_flags
from generate import Flags
from moa.knobs import METHODS
from tiny import BASE
from training.schedule import make_plan
from training.settings import read_settings

NAMED = [method for method, preset in METHODS.items() if preset]  # a custom one has no adapters by itself
EIGHT_EXPERTS = {"molora", "hydralora", "topk_moelora", "adamole", "parallel_adapter_moe", "prompt_moe"}
SWI_X = {"soft_moa": 0, "soft_moa_instance": 0, "sparse_moa": 4}  # of the commonsense runs
SCRIPTS = sorted((REPO / "exps").glob("*.sh"))


def settings(method, words):
    return read_settings(["--method", method, "--data_path", "train.json", *words], {}, "")


# ---- recipes


@pytest.mark.parametrize("dataset", RECIPES)
@pytest.mark.parametrize("method", NAMED)
def test_every_recipe_is_accepted_and_is_the_published_one(method, dataset):
    found = settings(method, train_flags(method, dataset)).train
    rows = found.batch_size * found.accum_iter
    if dataset == "demo":
        assert (found.max_steps, rows, found.lr, found.warmup_epochs) == (100, 8, 2e-3, 0.04)
        return
    assert (found.weight_decay, found.bf16, found.max_steps, rows) == (0.02, True, None, 32)
    assert found.epochs == (1 if method in EIGHT_EXPERTS else 2)
    if dataset == "codealpaca":
        assert (found.lr, found.lr_schedule, found.max_seq_len) == (1e-4, "constant", 500)
        n_rows = 20_022
        plan = make_plan(n_rows, rows, found.epochs, None, found.warmup_epochs, found.lr, found.blr, 0, True)
        assert plan.warmup_steps == 200 and plan.learning_rate(plan.steps - 1) == 1e-4
        return
    assert (found.lr, found.blr, found.min_lr, found.lr_schedule) == (None, 6e-3, 0, "cosine")
    assert found.warmup_epochs == (0.4 if method in EIGHT_EXPERTS else 1)
    assert found.max_seq_len == (300 if dataset in ("math_14k", "gsm8k") else 200)


@pytest.mark.parametrize("method", NAMED)
def test_the_presets_and_recipes_together_have_the_published_sizes(method):
    from llama.args import ModelArgs

    args = ModelArgs(dim=8, n_layers=3, n_heads=2)
    for dataset, swi_x in (("math_14k", 4), ("commonsense_15k", SWI_X.get(method)), ("codealpaca", 4)):
        flat = settings(method, train_flags(method, dataset)).config(args).flat()
        rank = 16 if method == "lora" else 8
        assert (flat["lora_rank"], flat["lora_alpha"], flat["lora_targets"]) == (rank, rank, "Q,K,V,O,FFN_DOWN")
        assert (flat["p_adapter_size"], flat["prompt_len"], flat["max_threshold"]) == (16, 10, 0.5)
        assert flat["expert_num"] == (8 if method in EIGHT_EXPERTS else 1)
        assert method not in SWI_X or flat["swi_x"] == swi_x
        layers = [flat[f"{kind}_layers"] for kind in ("lora", "prompt", "p_adapter")]
        assert set(layers) <= {"", "0-3"} and any(layers)


GENERATION = {
    "math_14k": {"max_gen_len": 200, "min_gen_len": 120, "temperature": 0.1, "top_p": 0.75, "num_samples": 1},
    "commonsense_15k": {"max_seq_len": 600, "max_gen_len": 40, "min_gen_len": 10, "temperature": 0.1, "top_p": 0.75},
    "codealpaca": {"num_samples": 10, "temperature": 0.7, "top_p": 0.95, "max_gen_len": 400},
    "demo": {"temperature": 0, "max_gen_len": 100},
}


@pytest.mark.parametrize("dataset", RECIPES)
def test_generation_is_the_published_one(dataset):
    found = parse(Flags, ["--save_path", "x.jsonl", *generate_flags(dataset)])
    expected = GENERATION[{"gsm8k": "math_14k", "commonsense_15k_mixed": "commonsense_15k"}.get(dataset, dataset)]
    assert {name: getattr(found, name) for name in expected} == expected
    assert dataset == "demo" or found.bf16
    assert (
        len(RECIPES[dataset].suites)
        == {"MATH": 6, "COMM": 8, "CODE": 2, "DEMO": 1}[{"gsm8": "MATH"}.get(dataset[:4], dataset[:4].upper())]
    )


@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize(
    "typed", [[], ["--batch_size", "1"], ["--accum_iter=1"], ["--model_parallel_size", "2", "--batch_size", "2"]]
)
def test_a_step_has_32_rows_whatever_the_processes(processes, typed):
    ranks = processes // (2 if "--model_parallel_size" in typed else 1)
    if not ranks:
        with pytest.raises(ValueError, match="--model_parallel_size 2"):
            train_flags("lora", "math_14k", processes, typed)
        return
    found = settings("lora", [*train_flags("lora", "math_14k", processes, typed), *typed]).train
    assert ranks * found.batch_size * found.accum_iter == 32


def test_what_is_typed_takes_the_place_of_the_recipe():
    typed = ["--lr", "1e-3", "--max_steps=7", "--swi_x", "2", "--batch_size", "3", "--accum_iter", "5"]
    found = settings("soft_moa", [*train_flags("soft_moa", "math_14k", 4, typed), *typed])
    assert (found.train.lr, found.train.max_steps, found.adapter["swi_x"]) == (1e-3, 7, 2)
    assert (found.train.batch_size, found.train.accum_iter, found.train.warmup_epochs) == (3, 5, 1)
    found = settings("lora", [*train_flags("lora", "demo", 1, ["--epochs", "2"]), "--epochs", "2"]).train
    assert (found.max_steps, found.epochs, found.lr) == (None, 2, 2e-3)
    assert "--temperature" not in generate_flags("math_14k", ["--temperature", "0"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "sofd_moa", "math_14k", "1"], ["'sofd_moa'", "soft_moa"]),
        (["train", "lora", "math14k", "1"], ["'math14k'", "math_14k"]),
        (["train", "lora", "math_14k", "3"], ["32 rows", "3 processes"]),
        (["train", "lora", "math_14k", "two"], ["NPROC", "'two'"]),
        (["train", "lora", "math_14k", "1", "--batch_size", "0"], ["--batch_size", "'0'"]),
        (["train", "lora", "math_14k", "1", "--batch_size", "5"], ["32 rows", "--batch_size 5"]),
        (["suites", "code"], ["'code'", "codealpaca"]),
    ],
)
def test_what_has_no_recipe_is_refused(words, expected):
    refused(run("-m", "exps.recipe", *words), *expected, status=2)


# ---- scripts

# Stands in for Python: writes down the commands of the project instead of running them, and makes up scores.
PYTHON = f"""#!{sys.executable}
import json, os, sys
words = sys.argv[1:]
if words[0] in ("finetune.py", "extract_adapter.py", "generate.py"):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(words) + "\\n")
elif words[:2] == ["-m", "evaluate"]:
    at = words.index("--json")
    score = {{"percent": 50, "half_width": 1, "missing": 0}}
    suites = {{os.path.basename(file).split(".")[0]: {{"file": file, "rows": 1, "problems": 1, "samples": 1,
        "published": score, "robust": score}} for file in words[3:at]}}
    os.makedirs(os.path.dirname(words[at + 1]), exist_ok=True)
    open(words[at + 1], "w").write(json.dumps({{"suites": suites, "families": {{}}}}))
else:
    os.execv(sys.executable, [sys.executable, *words])
"""


@pytest.fixture
def script(tmp_path):
    """Runs a script of exps with the stand-in; its result and the commands that it gave (twice-made checks left out)."""
    bin_folder, calls = tmp_path / "bin", tmp_path / "calls"
    bin_folder.mkdir()
    (bin_folder / "python").write_text(PYTHON)
    (bin_folder / "python").chmod(0o755)
    for recipe in RECIPES:
        (tmp_path / "data" / recipe).mkdir(parents=True)
        (tmp_path / "data" / recipe / "train.json").write_text("[]")
        for suite in RECIPES[recipe].suites:
            (tmp_path / "data" / suite.lower()).mkdir(exist_ok=True)
            (tmp_path / "data" / suite.lower() / "test.json").write_text("[]")

    def call(name, *words, **env):
        calls.write_text("")
        env = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "CALLS": calls} | env
        env |= {"DATA": tmp_path / "data", "OUT": tmp_path / "runs"}
        result = bash(name, *words, **env)
        lines = [json.loads(line) for line in calls.read_text().splitlines()]
        return result, [words for words in lines if not any(word.endswith("/none") for word in words)]

    return call


def bash(name, *words, **env):
    command = ["bash", str(REPO / "exps" / name), *map(str, words)]
    env = os.environ | {name: str(value) for name, value in env.items()}
    return subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, timeout=240)


def flags_of(words):
    """{flag: value} of a recorded command."""
    return {name: value for name, value in zip(words[1:], [*words[2:], ""], strict=True) if name.startswith("--")}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_and_can_be_executed(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize(
    ("name", "dataset", "tests"),
    [
        ("table_math.sh", "math_14k", 6),
        ("table_commonsense.sh", "commonsense_15k", 8),
        ("table_code.sh", "codealpaca", 2),
    ],
)
def test_a_table_is_every_method_with_three_seeds(name, dataset, tests, script, tmp_path):
    result, calls = script(name, CKPT_DIR="models/base", ALLOW_CODE_EXECUTION=1)
    assert result.returncode == 0, result.stderr
    trained = [flags_of(words) for words in calls if words[0] == "finetune.py"]
    assert [(flags["--method"], flags["--seed"]) for flags in trained] == [(m, s) for m in NAMED for s in "012"]
    assert len([words for words in calls if words[0] == "generate.py"]) == 3 * tests * (1 + len(NAMED))
    for words in calls:
        if words[0] == "finetune.py":
            found = read_settings(words[1:], {}, "").train
            assert found.resume and found.data_path == str(tmp_path / "data" / dataset / "train.json")
            assert found.output_dir == str(tmp_path / "runs" / dataset / found.method / f"s{found.seed}")
            assert len(found.leak_tests.split(",")) == tests
        elif words[0] == "generate.py":
            found = parse(Flags, words[1:])
            folder = Path(found.save_path).parent
            assert folder.name == f"s{found.seed}" and found.ckpt_dir == "/models/base"
            assert found.adapter_path == (None if folder.parent.name == "base" else str(folder / "adapter.pth"))
    folder = tmp_path / "runs"
    table = (folder / f"{name[:-3]}.md").read_text()
    assert table in result.stdout and all(f"| {method} " in table for method in ["base", *NAMED])
    assert (folder / f"{name[:-3]}.csv").exists() and (folder / f"{name[:-3]}.json").exists()
    again, calls = script(name, CKPT_DIR="models/base", ALLOW_CODE_EXECUTION=1)
    assert again.returncode == 0 and not calls and again.stderr.count("complete") == 3 * (1 + len(NAMED))


def test_the_small_table(script, tmp_path):
    result, calls = script("table_small.sh", METHODS="base soft_moa molora", SEEDS="4 5")
    assert result.returncode == 0, result.stderr
    trained = [read_settings(words[1:], {}, "") for words in calls if words[0] == "finetune.py"]
    assert [(one.train.method, one.train.seed) for one in trained] == [
        *[("soft_moa", 4), ("soft_moa", 4), ("soft_moa", 5), ("soft_moa", 5)],
        *[("molora", 4), ("molora", 4), ("molora", 5), ("molora", 5)],
    ]
    for one, (batch, warmup) in zip(trained, [(2, 0.008), (4, 0.01)] * 4, strict=True):
        found = one.train
        assert (found.max_steps, found.batch_size, found.accum_iter, found.lr) == (200, batch, 1, 1e-3)
        assert (found.max_seq_len, found.warmup_epochs, found.bf16) == (200, warmup, True)
        assert one.adapter == ({"swi_x": 4} if found.method == "soft_moa" else {})
    answered = [parse(Flags, words[1:]) for words in calls if words[0] == "generate.py"]
    assert len(answered) == 5 * (4 + 6)
    for found in answered:
        lengths = (120, 120) if "/gsm8k/" in found.save_path else (16, 16)
        assert (found.max_gen_len, found.min_gen_len, found.max_seq_len, found.max_rows) == (*lengths, 512, 64)
        assert (found.temperature, found.top_p, found.bf16, found.ckpt_dir) == (0, 0.75, True, None)
    assert "## gsm8k" in result.stdout and "## commonsense_15k_mixed" in result.stdout


def test_code_is_run_only_where_that_is_allowed(script, tmp_path):
    result, calls = script("run.sh", "base", "codealpaca", 0)
    assert result.returncode == 0 and len(calls) == 2 and "ALLOW_CODE_EXECUTION=1" in result.stderr
    assert not (tmp_path / "runs/codealpaca/base/s0/scores.json").exists()
    assert script("run.sh", "base", "codealpaca", 0, ALLOW_CODE_EXECUTION=1)[0].returncode == 0
    assert (tmp_path / "runs/codealpaca/base/s0/scores.json").exists()


def test_a_variant_has_a_folder_of_its_own_and_processes_share_a_step(script, tmp_path):
    result, calls = script("run.sh", "lora", "gsm8k", 3, "--lora_rank", 4, VARIANT="r4", SUITES="AddSub")
    assert result.returncode == 0, result.stderr
    found = read_settings(calls[0][1:], {}, "")
    assert found.train.output_dir == str(tmp_path / "runs/gsm8k/lora-r4/s3") and found.adapter == {"lora_rank": 4}
    assert [words[0] for words in calls] == ["finetune.py", "extract_adapter.py", "generate.py"]


@pytest.mark.parametrize(
    ("words", "env", "expected"),
    [
        (["lora", "gsm8k", 0], {"SUITES": "AddSub mawps"}, ["mawps/test.json", "SUITES"]),
        (["lora", "demon", 0], {}, ["'demon'", "demo"]),
        (["lora", "gsm8k", 0], {"GENERATE": "--max_rowz 3"}, ["--max_rowz", "--max_rows"]),
        (["lora", "gsm8k", 0], {"GENERATE": "--seed 3"}, ["--seed", "twice"]),
        (["lora", "gsm8k", 0], {"DATA": "/nowhere"}, ["/nowhere/gsm8k/train.json"]),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_any_work(words, env, expected, tmp_path):
    write_rows(folder(tmp_path / "data/gsm8k") / "train.json")
    for suite in RECIPES["gsm8k"].suites:
        write_rows(folder(tmp_path / "data" / suite) / "test.json", 2, answer=True)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {"PATH": path, "DATA": tmp_path / "data", "OUT": tmp_path / "runs", "CKPT_DIR": BASE} | env
    result = bash("run.sh", *words, **env)
    refused(result, *expected, status=2 if "GENERATE" in env or "demon" in words else 1)
    assert not (tmp_path / "runs").exists()


def folder(path):
    path.mkdir(parents=True, exist_ok=True)
    return path


def test_a_run_from_its_rows_to_the_table_and_again(tmp_path):
    write_rows(folder(tmp_path / "data/gsm8k") / "train.json")
    write_rows(folder(tmp_path / "data/ADDSUB") / "test.json", 3, answer=True)
    out = tmp_path / "runs/gsm8k/lora/s5"
    env = {"DATA": tmp_path / "data", "OUT": tmp_path / "runs", "CKPT_DIR": BASE, "SUITES": "AddSub"}
    env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env |= {"GENERATE": "--max_gen_len 4 --min_gen_len 4 --bf16 False --device cpu"}
    words = ("lora", "gsm8k", 5, "--max_steps", 2, "--lora_rank", 2, "--bf16", "False", "--device", "cpu")
    result = bash("run.sh", *words, **env)
    assert result.returncode == 0, result.stderr
    config = json.loads((out / "config.json").read_text())
    assert config["rows_per_step"] == 24 or config["settings"]["batch_size"] * config["settings"]["accum_iter"] == 32
    table = run("exps/collect.py", tmp_path / "runs")
    assert table.returncode == 0 and "| lora  | " in table.stdout and "AddSub (3 of 395)" in table.stdout

    def written():
        return {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}

    before = written()
    again = bash("run.sh", *words, **env)
    assert again.returncode == 0 and "complete" in again.stderr and written() == before
    scores = (out / "scores.json").read_bytes()
    for name in ("scores.json", "AddSub.jsonl"):
        (out / name).unlink()
    assert bash("run.sh", *words, **env).returncode == 0  # what is missing is made again, the adapter is kept
    assert (out / "scores.json").read_bytes() == scores
    assert written()[out / "adapter.pth"] == before[out / "adapter.pth"]
    other = bash("run.sh", "lora", "gsm8k", 5, "--max_steps", 3, *words[5:], **env)
    refused(other, "--max_steps 2", "3")
    assert (out / "scores.json").read_bytes() == scores


# ---- tables


def write_run(place, percents=(10.0,), method="lora", seed=0, steps=4, suites=("AddSub",), **changes):
    """A made-up finished run. changes: of config.json's entries, settings (typed), answers (how rows were answered), rows
    (answered), drop (names of files left out)."""
    place.mkdir(parents=True)
    answers = {"temperature": 0, "data_sha256": "ab" * 32, "seed": 0, "adapter_sha256": str(place)}
    drop, rows = changes.pop("drop", ()), changes.pop("rows", 100)
    answers |= changes.pop("answers", {})
    scores = {}
    for suite, percent in zip(suites, percents, strict=True):
        both = {"published": {"percent": percent}, "robust": {"percent": percent + 1}}
        scores[suite] = {"file": f"x/{suite}.jsonl", "rows": rows, "problems": 395, "samples": rows, **both}
        (place / f"{suite}.jsonl.settings.json").write_text(json.dumps(answers))
    mean = {rule: {"percent": sum(s[rule]["percent"] for s in scores.values()) / len(scores)} for rule in both}
    files = {"scores.json": {"suites": scores, "families": {"math": {"suites": list(suites), "mean": mean}}}}
    if method != "base":
        typed = {"seed": seed, "output_dir": str(place), "batch_size": seed + 1, "weight_decay": 0.02, "lr": None}
        record = {"settings": typed | changes.pop("settings", {}), "adapter": {"method": method, "lora_rank": 8}}
        record |= {"steps": steps, "rows_per_step": 32, "trainable_parameters": 1234567, "lr": 1e-3}
        record |= {"base_fingerprint": "cd" * 32, "data_sha256": "ef" * 32, "rows": 99, "warmup_steps": 1} | changes
        files["config.json"] = record
        files["log.jsonl"] = [
            {"step": i + 1, "seconds": 15.0 + 6 * seed, "tokens": 300, "peak_memory_bytes": (i + 1) * 2**29}
            for i in range(steps)
        ]
    for name, content in files.items():
        if name not in drop:
            lines = content if isinstance(content, list) else [content]
            (place / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def collect(*words, status=0):
    result = run("exps/collect.py", *words)
    assert result.returncode == status, (result.stdout, result.stderr)
    assert "Traceback" not in result.stderr, result.stderr
    return result


def cells(text):
    """Rows of a Markdown table by column."""
    table = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if "|" in line]
    return [dict(zip(table[0], row, strict=True)) for row in table[2:]]


@pytest.fixture
def three(tmp_path):
    """The untuned model, and three seeds of one method: 10, 20, 60 and 30, 30, 30 percent on two tests."""
    suites = ("AddSub", "MultiArith")
    write_run(tmp_path / "gsm8k/base/s0", (5.0, 6.0), "base", suites=suites)
    for seed, percent in enumerate((10.0, 20.0, 60.0)):
        write_run(tmp_path / f"gsm8k/lora/s{seed}", (percent, 30.0), seed=seed, suites=suites)
    return tmp_path


def test_mean_and_spread_over_seeds(three):
    base, lora = cells(collect(three).stdout)
    assert base == {"model": "base", "seeds": "1", "trained": "-", "steps": "-", "training": "-"} | {
        **{"tokens/s": "-", "memory": "-", "AddSub (100 of 395)": "5.0 / 6.0", "MultiArith (100 of 395)": "6.0 / 7.0"},
        "mean, math": "5.5 / 6.5",
    }
    assert lora == {"model": "lora", "seeds": "3", "trained": "1,234,567", "steps": "4 x 32 rows"} | {
        "training": "1.4 ± 0.4 min",  # 60, 84 and 108 seconds
        "tokens/s": "15",  # the mean of 20, 14.3 and 11.1
        "memory": "2.0 GiB",
        "AddSub (100 of 395)": "30.0 ± 26.5 / 31.0 ± 26.5",  # the root of (400 + 100 + 900) / 2
        "MultiArith (100 of 395)": "30.0 ± 0.0 / 31.0 ± 0.0",
        "mean, math": "30.0 ± 13.2 / 31.0 ± 13.2",
    }


def test_csv_has_all_the_digits(three):
    base, lora = csv.DictReader(io.StringIO(collect(three, "--format", "csv").stdout))
    assert (base["model"], base["seeds"], base["steps"], base["mean, math published sd"]) == ("base", "1", "", "")
    assert float(base["mean, math published mean"]) == 5.5
    assert (lora["dataset"], lora["trainable_parameters"], lora["seconds mean"]) == ("gsm8k", "1234567", "84.0")
    assert float(lora["AddSub (100 of 395) published sd"]) == pytest.approx(700**0.5)
    assert float(lora["AddSub (100 of 395) robust mean"]) == 31 and int(lora["peak_memory_bytes"]) == 2**31


def test_json_holds_every_run(three):
    content = json.loads(collect(three, "--format", "json").stdout)
    base, lora = content["lines"]
    assert lora["seeds"] == [0, 1, 2] and base["runs"][0]["config"] is None and content["unfinished"] == []
    assert lora["scores"]["mean, math"]["robust"] == {"mean": 31, "sd": pytest.approx(175**0.5)}
    run = lora["runs"][2]
    assert run["folder"] == str(three / "gsm8k/lora/s2") and run["training"]["seconds"] == 108
    assert run["scores"]["suites"]["AddSub"]["published"]["percent"] == 60
    assert run["config"]["lr"] == 1e-3 and run["answers"]["AddSub"]["temperature"] == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 5}, "steps 5"),
        ({"lr": 2e-3}, "lr 0.002"),
        ({"base_fingerprint": "ba" * 32}, "base_fingerprint bababababa"),
        ({"data_sha256": "99" * 32}, "data_sha256 9999999999"),
        ({"adapter": {"method": "lora", "lora_rank": 4}}, "lora_rank 4"),
        ({"settings": {"weight_decay": 0.5}}, "weight_decay 0.5"),
        ({"trainable_parameters": 5}, "trainable_parameters 5"),
        ({"answers": {"temperature": 0.7}}, "generate: temperature 0.7"),
        ({"rows": 395}, "tests AddSub (395)"),
        ({"suites": ("MultiArith",)}, "tests MultiArith (100 of 395)"),
    ],
)
def test_runs_with_other_settings_are_not_averaged(changes, told, tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / f"gsm8k/lora/s{seed}", (10.0,), seed=seed)
    write_run(tmp_path / "gsm8k/lora/s2", (90.0,), seed=2, **changes)
    result = collect(tmp_path)
    alike, other = cells(result.stdout)
    assert (alike["seeds"], other["seeds"]) == ("2", "1") and told not in alike["model"]
    assert other["model"].startswith("lora (") and told in other["model"]
    assert any("not averaged" in line and told in line and "s2" in line for line in result.stderr.splitlines())
    assert "10.0 ± 0.0 / 11.0 ± 0.0" in alike.values() and "90.0 / 91.0" in other.values()


def test_what_does_not_change_the_result_may_differ(tmp_path):
    write_run(tmp_path / "gsm8k/lora/s0")
    changes = {"device": "cuda", "accum_iter": 8, "save_every": 3, "data_path": "elsewhere", "leak_tests": "x"}
    write_run(tmp_path / "other/gsm8k/lora/s1", seed=1, settings=changes)
    result = collect(tmp_path / "gsm8k", tmp_path / "other")
    assert [row["seeds"] for row in cells(result.stdout)] == ["2"] and "not averaged" not in result.stderr


def test_a_setting_that_only_some_records_have_is_named(tmp_path):
    write_run(tmp_path / "gsm8k/lora/s0")
    write_run(tmp_path / "gsm8k/lora/s1", seed=1, settings={"expert_num": 1})
    result = collect(tmp_path)
    assert [row["seeds"] for row in cells(result.stdout)] == ["2"] and "expert_num: not compared" in result.stderr


def test_lines_that_cannot_be_compared_are_told(tmp_path):
    write_run(tmp_path / "gsm8k/lora/s0")
    write_run(tmp_path / "gsm8k/prompt/s0", method="prompt", base_fingerprint="12" * 32, answers={"temperature": 0.1})
    note = collect(tmp_path).stderr
    assert "gsm8k: the lines do not all have the same base_fingerprint, temperature" in note


def test_two_runs_of_a_seed_are_refused(tmp_path):
    first, second = (write_run(tmp_path / place / "gsm8k/lora/s0") for place in "ab")
    refused(collect(tmp_path, status=1), str(first), str(second), "seed 0")


def test_variants_data_sets_and_samples(tmp_path):
    write_run(tmp_path / "gsm8k/lora-r4/s0")
    place = write_run(tmp_path / "codealpaca/lora/s0", suites=("HumanEval",))
    scores = json.loads((place / "scores.json").read_text())
    pass_at = {rule: {"1": 10.0, "5": 20.0 + i, "10": 30.0} for i, rule in enumerate(("published", "robust"))}
    scores["suites"]["HumanEval"] |= {"pass_at": pass_at, "rows": 164, "problems": 164, "samples": 1640}
    (place / "scores.json").write_text(json.dumps(scores))
    code, math = collect(tmp_path).stdout.split("## gsm8k")
    (row,) = cells(code)
    found = [row[f"HumanEval pass@{k} (164)"] for k in (1, 5, 10)]
    assert code.startswith("## codealpaca") and found == ["10.0 / 10.0", "20.0 / 21.0", "30.0 / 30.0"]
    assert "HumanEval (164)" not in row and cells(math)[0]["model"] == "lora-r4"


def test_a_mean_over_other_tests_has_a_column_of_its_own(tmp_path):
    write_run(tmp_path / "gsm8k/lora/s0", (10.0, 20.0), suites=("AddSub", "MultiArith"))
    write_run(tmp_path / "gsm8k/prompt/s0", (10.0, 40.0), method="prompt", suites=("AddSub", "SVAMP"))
    lora, prompt = cells(collect(tmp_path).stdout)
    assert [name for name in lora if name.startswith("mean")] == [
        "mean, math: AddSub (100 of 395), MultiArith (100 of 395)",
        "mean, math: AddSub (100 of 395), SVAMP (100 of 395)",
    ]
    assert lora["SVAMP (100 of 395)"] == "-" and prompt["SVAMP (100 of 395)"] == "40.0 / 41.0"


@pytest.mark.parametrize("drop", ["scores.json", "log.jsonl", "a step", "half a step"])
def test_unfinished_runs_are_named_and_left_out(drop, tmp_path):
    write_run(tmp_path / "gsm8k/lora/s0")
    place = write_run(tmp_path / "gsm8k/lora/s1", seed=1, drop=(drop,))
    if "step" in drop:
        log = (place / "log.jsonl").read_text().splitlines()
        (place / "log.jsonl").write_text("\n".join([*log[:3], log[3][:20]][: 4 if "half" in drop else 3]))
    result = collect(tmp_path)
    why = {"scores.json": "no scores.json", "log.jsonl": "0 of 4 steps"}.get(drop, "3 of 4 steps")
    assert f"left out, not finished: {place}: {why}" in result.stderr and len(cells(result.stdout)) == 1
    left = json.loads(collect(tmp_path, "--format", "json").stdout)["unfinished"]
    assert left[0]["folder"] == str(place) and why in left[0]["why"]
    refused(collect(place, status=1), "no finished run", str(place))


def remove(name, *keys):
    def change(place):
        content = whole = json.loads((place / name).read_text())
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]
        (place / name).write_text(json.dumps(whole))

    return name, change


def replace(name, old, new):
    def change(place):
        text = (place / name).read_text()
        assert old in text
        (place / name).write_text(text.replace(old, new, 1))

    return name, change


@pytest.mark.parametrize(
    "damage",
    [
        replace("scores.json", "{", "{,"),
        replace("scores.json", '"percent": 10.0', '"percent": "ten"'),
        replace("scores.json", '"percent": 10.0', '"percent": NaN'),
        replace("scores.json", '"percent": 10.0', '"percent": 1000'),
        remove("scores.json", "suites", "AddSub", "rows"),
        remove("scores.json", "families"),
        replace("config.json", '"steps": 4', '"steps": "4"'),
        remove("config.json", "adapter"),
        remove("config.json", "trainable_parameters"),
        ("config.json", lambda place: (place / "config.json").unlink()),
        ("config.json", lambda place: (place / "config.json").write_bytes(b"\xff")),
        replace("log.jsonl", '"seconds"', '"secs"'),
        replace("log.jsonl", "15.0", '"x"'),
        replace("AddSub.jsonl.settings.json", "{", "[{"),
    ],
)
def test_a_damaged_file_is_named(damage, tmp_path):
    name, change = damage
    place = write_run(tmp_path / "gsm8k/lora/s0")
    change(place)
    output = tmp_path / "table.md"
    output.write_text("earlier")
    refused(collect(tmp_path, "--output", output, status=1), str(place / name))
    assert output.read_text() == "earlier"


def test_the_output_is_written_whole_or_not_at_all(three):
    output = three / "table.csv"
    assert collect(three, "--format", "csv", "--output", output).stdout == ""
    assert output.read_text() == collect(three, "--format", "csv").stdout
    refused(collect(three, "--output", three / "nowhere" / "table.md", status=1), "nowhere")
    assert sorted(file.name for file in three.iterdir()) == ["gsm8k", "table.csv"]


@pytest.mark.parametrize(
    ("words", "status", "expected"),
    [
        (["--formt", "csv", "x"], 2, ["--formt"]),
        (["--format", "xml", "x"], 2, ["--format", "xml"]),
        ([], 2, ["FOLDER"]),
        (["none"], 1, ["none", "no such folder"]),
        (["docs"], 1, ["no finished run", "docs"]),
    ],
)
def test_a_wrong_call_is_refused(words, status, expected):
    refused(collect(*words, status=status), *expected, status=status)
