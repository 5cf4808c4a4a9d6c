"""The experiments: recipes, the scripts that follow them, and the tables of their runs."""

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
from moa.methods import METHODS
from tiny import BASE
from training.config import parse_flags
from training.schedule import Schedule

NAMED = [method for method, preset in METHODS.items() if preset]  # a custom one has no adapters by itself
EIGHT_EXPERTS = {"molora", "hydralora", "topk_moelora", "adamole", "parallel_adapter_moe", "prompt_moe"}
SWI_X = {"soft_moa": 0, "soft_moa_instance": 0, "sparse_moa": 4}  # of the commonsense runs
SCRIPTS = sorted((REPO / "exps").glob("*.sh"))


def settings(method, words):
    return parse_flags(["--method", method, "--data_path", "train.json", *words], {}, "")


# ---- recipes


@pytest.mark.parametrize("dataset", RECIPES)
@pytest.mark.parametrize("method", NAMED)
def test_every_recipe_is_accepted_and_is_the_published_one(method, dataset):
    found = settings(method, train_flags(method, dataset)).train
    rows = found.batch_size * found.accum_iter
    if dataset == "demo":
        assert (found.max_steps, rows, found.lr, found.warmup_epochs) == (100, 8, 2e-3, 0.04)
        return
    assert (found.weight_decay, found.bf16, found.max_steps, rows) == (0.02, None, None, 32)
    assert found.epochs == (1 if method in EIGHT_EXPERTS else 2)
    if dataset == "codealpaca":
        assert (found.lr, found.lr_schedule, found.max_seq_len) == (1e-4, "constant", 500)
        schedule = Schedule.from_config(found, n_rows=20_022, rows_per_step=rows)
        assert schedule.warmup_steps == 200 and schedule.learning_rate(schedule.steps - 1) == 1e-4
        return
    assert (found.lr, found.blr, found.min_lr, found.lr_schedule) == (None, 6e-3, 0, "cosine")
    assert found.warmup_epochs == (0.4 if method in EIGHT_EXPERTS else 1)
    assert found.max_seq_len == (300 if dataset in ("math_14k", "gsm8k") else 200)


@pytest.mark.parametrize("method", NAMED)
def test_the_presets_and_recipes_together_have_the_published_sizes(method):
    from llama.args import ModelArgs

    args = ModelArgs(dim=8, n_layers=3, n_heads=2)
    for dataset, swi_x in (("math_14k", 4), ("commonsense_15k", SWI_X.get(method)), ("codealpaca", 4)):
        flat = settings(method, train_flags(method, dataset)).adapter_config(args).to_dict()
        rank = 16 if method == "lora" else 8
        assert (flat["lora_rank"], flat["lora_alpha"], flat["lora_targets"]) == (rank, rank, "Q,K,V,O,FFN_DOWN")
        assert (flat["p_adapter_size"], flat["prompt_len"], flat["max_threshold"]) == (16, 10, 0.5)
        assert flat["expert_num"] == (8 if method in EIGHT_EXPERTS else 1)
        assert method not in SWI_X or flat["swi_x"] == swi_x
        layers = [flat[f"{kind}_layers"] for kind in ("lora", "prompt", "p_adapter")]
        assert set(layers) <= {"", "0-3"} and any(layers)


SUITES = {"math_14k": 6, "gsm8k": 6, "commonsense_15k": 8, "commonsense_15k_mixed": 8, "codealpaca": 2, "demo": 1}
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
    assert found.bf16 is None  # where the hardware multiplies it
    assert len(RECIPES[dataset].suites) == SUITES[dataset]


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


def test_the_methods_of_a_table_are_all_that_have_adapters_by_themselves():
    assert run("-m", "exps.recipe", "methods").stdout.split() == NAMED
    assert EIGHT_EXPERTS | set(SWI_X) | {"unipeft", "lora", "prompt", "parallel_adapter"} == set(NAMED)


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
    at = words.index("--save_path")
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
    """Runs a script of exps with the stand-in: its result and the commands that it gave, without checks of flags."""
    bin_folder, calls = tmp_path / "bin", tmp_path / "calls"
    bin_folder.mkdir()
    (bin_folder / "python").write_text(PYTHON)
    (bin_folder / "python").chmod(0o755)
    for recipe in RECIPES:
        (folder(tmp_path / "data" / recipe) / "train.json").write_text("[]")
        for suite in RECIPES[recipe].suites:
            (folder(tmp_path / "data" / suite.lower()) / "test.json").write_text("[]")

    def call(name, *words, **env):
        calls.write_text("")
        env = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "CALLS": calls} | env
        env |= {"DATA": tmp_path / "data", "OUT": tmp_path / "runs"}
        result = bash(name, *words, **env)
        lines = [json.loads(line) for line in calls.read_text().splitlines()]
        return result, [words for words in lines if not any(word.endswith("/none") for word in words)]

    return call


def folder(path):
    path.mkdir(parents=True, exist_ok=True)
    return path


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
def test_a_table_is_all_methods_with_three_seeds(name, dataset, tests, script, tmp_path):
    env = {"CKPT_DIR": "models/base", "METHODS": "lora", "ALLOW_CODE_EXECUTION": 1}
    result, calls = script(name, **env)
    assert result.returncode == 0, result.stderr
    trained = [flags_of(words) for words in calls if words[0] == "finetune.py"]
    assert [(flags["--method"], flags["--seed"]) for flags in trained] == [("lora", seed) for seed in "012"]
    assert len([words for words in calls if words[0] == "generate.py"]) == 3 * tests
    for words in calls:
        if words[0] == "finetune.py":
            found = parse_flags(words[1:], {}, "").train
            assert found.resume and found.data_path == str(tmp_path / "data" / dataset / "train.json")
            assert found.output_dir == str(tmp_path / "runs" / dataset / found.method / f"s{found.seed}")
            assert len(found.leak_tests.split(",")) == tests
        elif words[0] == "generate.py":
            found = parse(Flags, words[1:])
            place = Path(found.save_path).parent
            assert place.name == f"s{found.seed}" and found.ckpt_dir == "/models/base"
            assert found.adapter_path == str(place / "adapter.pth")
    out = tmp_path / "runs"
    table = (out / f"{name[:-3]}.md").read_text()
    assert table in result.stdout and "| lora " in table
    assert (out / f"{name[:-3]}.csv").exists() and (out / f"{name[:-3]}.json").exists()
    again, calls = script(name, **env)
    assert again.returncode == 0 and not calls and again.stderr.count("complete") == 3


def test_the_small_table(script, tmp_path):
    result, calls = script("table_small.sh", METHODS="base soft_moa molora", SEEDS="4 5")
    assert result.returncode == 0, result.stderr
    trained = [parse_flags(words[1:], {}, "") for words in calls if words[0] == "finetune.py"]
    assert [(one.train.method, one.train.seed) for one in trained] == [
        *[("soft_moa", 4), ("soft_moa", 4), ("soft_moa", 5), ("soft_moa", 5)],
        *[("molora", 4), ("molora", 4), ("molora", 5), ("molora", 5)],
    ]
    for one, (batch, warmup) in zip(trained, [(2, 0.008), (4, 0.01)] * 4, strict=True):
        found = one.train
        assert (found.max_steps, found.batch_size, found.accum_iter, found.lr) == (200, batch, 1, 1e-3)
        assert (found.max_seq_len, found.warmup_epochs, found.bf16) == (200, warmup, None)
        assert one.adapter == ({"swi_x": 4} if found.method == "soft_moa" else {})
    answered = [parse(Flags, words[1:]) for words in calls if words[0] == "generate.py"]
    assert len(answered) == 5 * (4 + 6)
    for found in answered:
        lengths = (120, 120) if "/gsm8k/" in found.save_path else (16, 16)
        assert (found.max_gen_len, found.min_gen_len, found.max_seq_len, found.max_rows) == (*lengths, 512, 64)
        assert (found.temperature, found.top_p, found.bf16, found.ckpt_dir) == (0, 0.75, None, None)
        place = Path(found.save_path).parent
        assert found.adapter_path == (None if place.parent.name == "base" else str(place / "adapter.pth"))
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
    found = parse_flags(calls[0][1:], {}, "")
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
    assert (config["settings"]["batch_size"], config["settings"]["accum_iter"], config["steps"]) == (8, 4, 2)
    table = run("exps/collect.py", tmp_path / "runs")
    assert table.returncode == 0 and "| lora " in table.stdout and "AddSub (3 of 395)" in table.stdout

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
