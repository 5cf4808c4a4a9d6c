"""The experiments: recipes, the scripts that follow them, and the tables of their runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli import parse
from commands import REPO, refused, run, write_rows
from exps.recipe import PUBLISHED, RECIPES, generate_flags, train_flags
from generate import Flags
from llama.args import ModelArgs
from moa.methods import METHODS
from tiny import BASE
from training.config import BATCH_SIZE, parse_flags
from training.schedule import Schedule

LORA_MIXTURES = {"molora", "hydralora", "topk_moelora", "adamole"}
EIGHT_EXPERTS = LORA_MIXTURES | {"parallel_adapter_moe", "prompt_moe"}
SCRIPTS = sorted((REPO / "exps").glob("*.sh"))
DATASETS = {"math_14k": 6, "gsm8k": 6, "commonsense_15k": 8, "commonsense_15k_mixed": 8, "codealpaca": 2, "demo": 1}
ARGS = ModelArgs(dim=8, n_layers=3, n_heads=2)
# Published, by the first word of the data set's name
TRAINED = {
    "codealpaca": {"lr": 1e-4, "lr_schedule": "constant", "max_seq_len": 500, "weight_decay": 0, "beta2": 0.999}
    | {"grad_clip": 1, "train_on_input": True, "epochs": 1},
    "demo": {"max_steps": 100, "lr": 2e-3, "warmup_epochs": 0.04},
} | {
    name: {"lr": None, "blr": 6e-3, "min_lr": 0, "lr_schedule": "cosine", "max_seq_len": length, "weight_decay": 0.02}
    | {"beta2": 0.95, "grad_clip": None, "train_on_input": False, "max_steps": None}
    for name, length in (("math", 300), ("gsm8k", 300), ("commonsense", 200))
}
MATH = {"max_seq_len": 300, "max_gen_len": 200, "min_gen_len": 120, "temperature": 0.1, "top_p": 0.75, "num_samples": 1}
ANSWERED = {
    "math": MATH,
    "gsm8k": MATH,
    "commonsense": {"max_seq_len": 600, "max_gen_len": 40, "min_gen_len": 10, "temperature": 0.1, "top_p": 0.75},
    "codealpaca": {"num_samples": 10, "temperature": 0.7, "top_p": 0.95, "max_gen_len": 400},
    "demo": {"temperature": 0, "max_gen_len": 100},
}


def settings(method, words):
    return parse_flags(["--method", method, "--data_path", "train.json", *words], {}, "")


def fields(config, names):
    return {name: getattr(config, name) for name in names}


# ---- recipes


@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("method", PUBLISHED)
def test_every_recipe_is_accepted_and_is_the_published_one(method, dataset):
    train, kind = settings(method, train_flags(method, dataset)).train, dataset.partition("_")[0]
    assert fields(train, TRAINED[kind]) == TRAINED[kind] and train.bf16 is None
    assert train.batch_size * train.accum_iter == {"codealpaca": 16, "demo": 8}.get(dataset, 32)
    if dataset == "codealpaca":
        schedule = Schedule.from_config(train, n_rows=20_022)
        assert schedule.warmup_steps == 200 and schedule.learning_rate(schedule.steps - 1) == 1e-4
    elif dataset != "demo":
        short = method in LORA_MIXTURES and kind != "commonsense"
        assert (train.epochs, train.warmup_epochs) == ((1, 0.4) if short else (2, 1))


@pytest.mark.parametrize("method", PUBLISHED)
def test_the_presets_and_recipes_together_have_the_published_sizes(method):
    for dataset in ("math_14k", "commonsense_15k", "codealpaca"):
        flat = settings(method, train_flags(method, dataset)).adapter_config(ARGS).to_dict()
        rank = 16 if method == "lora" else 8
        assert (flat["lora_rank"], flat["lora_alpha"], flat["lora_targets"]) == (rank, rank, "Q,K,V,O,FFN_DOWN")
        assert (flat["p_adapter_size"], flat["prompt_len"], flat["max_threshold"]) == (16, 10, 0.5)
        assert (flat["expert_num"], flat["lb_loss_coeff"]) == (8 if method in EIGHT_EXPERTS else 1, 0)
        assert flat["p_adapter_hydra"] == (method == "parallel_adapter_moe")
        linear = dataset == "commonsense_15k" and method in ("soft_moa", "soft_moa_instance")
        assert flat["swi_x"] == (0 if linear else 4)
        layers = {kind: flat[f"{kind}_layers"] for kind in ("lora", "prompt", "p_adapter")}
        assert set(layers.values()) <= {"", "0-3"} and any(layers.values())
        assert method != "soft_moa" or bool(layers["prompt"]) == (dataset != "codealpaca")


@pytest.mark.parametrize("dataset", DATASETS)
def test_generation_is_the_published_one(dataset):
    flags, expected = (
        parse(Flags, ["--save_path", "x.jsonl", *generate_flags(dataset)]),
        ANSWERED[dataset.split("_")[0]],
    )
    assert fields(flags, expected) == expected and flags.bf16 is None  # where the hardware multiplies it
    assert len(RECIPES[dataset].suites) == DATASETS[dataset]


@pytest.mark.parametrize("processes", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize(
    "typed",
    [
        *([], ["--batch_size", "1"], ["--accum_iter=1"], ["--model_parallel_size", "2", "--batch_size", "2"]),
        ["--batch_size", "auto"],
    ],
)
def test_a_step_has_32_rows_whatever_the_processes(processes, typed):
    ranks = processes // (2 if "--model_parallel_size" in typed else 1)
    if not ranks or ranks * BATCH_SIZE * ("auto" in typed) > 32:
        with pytest.raises(ValueError, match="--model_parallel_size 2|--batch_size 4"):
            train_flags("lora", "math_14k", processes, typed)
        return
    train = settings("lora", [*train_flags("lora", "math_14k", processes, typed), *typed]).train
    assert ranks * train.rows_per_rank == 32


def test_what_is_typed_takes_the_place_of_the_recipe():
    typed = ["--lr", "1e-3", "--max_steps=7", "--swi_x", "2", "--batch_size", "3", "--accum_iter", "5"]
    config = settings("soft_moa", [*train_flags("soft_moa", "math_14k", 4, typed), *typed])
    assert (config.train.lr, config.train.max_steps, config.adapter["swi_x"]) == (1e-3, 7, 2)
    assert (config.train.batch_size, config.train.accum_iter, config.train.warmup_epochs) == (3, 5, 1)
    train = settings("lora", [*train_flags("lora", "demo", 1, ["--epochs", "2"]), "--epochs", "2"]).train
    assert (train.max_steps, train.epochs, train.lr) == (None, 2, 2e-3)
    assert "--temperature" not in generate_flags("math_14k", ["--temperature", "0"])


def test_the_methods_of_a_table_are_the_published_ones():
    assert run("-m", "exps.recipe", "methods").stdout.split() == [m for m in METHODS if m in PUBLISHED]


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

# Stands in for Python: writes down the commands of the project instead of running them, and makes up scores. (To tell
# bases apart the real one loads torch.)
PYTHON = f"""#!{sys.executable}
import json, os, pathlib, sys
words = sys.argv[1:]
if {{"finetune.py", "extract_adapter.py", "generate.py"}} & set(words):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(words) + "\\n")
elif words[:3] == ["-m", "exps.recipe", "fingerprint"]:
    print(hash(pathlib.Path(words[3], "consolidated.00.pth").read_bytes()))
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
        env = {"PATH": f"{bin_folder}:{os.environ['PATH']}", "CALLS": calls, "PYTHONHASHSEED": 0} | env
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


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash_and_can_be_executed(path):
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    assert os.access(path, os.X_OK)


@pytest.mark.parametrize(
    ("dataset", "tests", "seeds"),
    [("math_14k", 6, (0, 125, 1225)), ("commonsense_15k", 8, (0,)), ("codealpaca", 2, (7,))],
)
def test_a_table_is_all_methods_with_three_seeds(dataset, tests, seeds, script, tmp_path):
    env = {"CKPT_DIR": BASE, "METHODS": "lora", "ALLOW_CODE_EXECUTION": 1}
    env |= {} if len(seeds) == 3 else {"SEEDS": seeds[0]}
    result, calls = script("table.sh", dataset, **env)
    assert result.returncode == 0, result.stderr
    trained = [parse_flags(words[1:], {}, "").train for words in calls if words[0] == "finetune.py"]
    answered = [parse(Flags, words[1:]) for words in calls if words[0] == "generate.py"]
    assert [(flags.method, flags.seed) for flags in trained] == [("lora", seed) for seed in seeds]
    assert len(answered) == len(seeds) * tests
    for flags in trained:
        assert flags.resume and flags.data_path == str(tmp_path / "data" / dataset / "train.json")
        assert flags.output_dir == str(tmp_path / "runs" / dataset / "lora" / f"s{flags.seed}")
        assert len(flags.leak_tests.split(",")) == tests
    for flags in answered:
        out = Path(flags.save_path).parent
        assert (out.name, flags.ckpt_dir) == (f"s{flags.seed}", str(BASE))
        assert flags.adapter_path == str(out / "adapter.pth")
    table = tmp_path / "runs" / f"table_{dataset}"
    assert table.with_suffix(".md").read_text() in result.stdout and "| lora " in result.stdout
    assert table.with_suffix(".csv").exists() and table.with_suffix(".json").exists()
    again, calls = script("table.sh", dataset, **env)
    assert again.returncode == 0 and not calls and again.stderr.count("complete") == len(seeds)


@pytest.mark.parametrize(("method", "processes"), [("soft_moa", 1), ("lora", 4)])
def test_qwen3_runs_as_published(method, processes, script):
    result, calls = script("qwen3.sh", method, 125, CKPT_DIR=BASE, NPROC=processes)
    assert result.returncode == 0, result.stderr
    trained = [
        parse_flags(words[words.index("finetune.py") + 1 :], {}, "") for words in calls if "finetune.py" in words
    ]
    (config,) = trained
    expected = {"epochs": 1, "lr": 1e-4, "lr_schedule": "constant", "weight_decay": 0, "max_seq_len": 300, "seed": 125}
    assert fields(config.train, expected) == expected
    assert config.train.batch_size * config.train.accum_iter * processes == 16
    assert round(config.train.warmup_epochs * 13_921 / 16) == 200
    assert config.adapter == ({"prompt_layers": "0-0"} if method == "soft_moa" else {"lora_rank": 8, "lora_alpha": 8.0})
    answered = [parse(Flags, words[words.index("generate.py") + 1 :]) for words in calls if "generate.py" in words]
    assert {(flags.temperature, flags.max_gen_len) for flags in answered} == {(0, 300)} and len(answered) == 6


def test_code_is_run_only_where_that_is_allowed(script, tmp_path):
    result, calls = script("run.sh", "base", "codealpaca", 0, CKPT_DIR=BASE)
    assert result.returncode == 0 and len(calls) == 2 and "ALLOW_CODE_EXECUTION=1" in result.stderr
    assert not (tmp_path / "runs/codealpaca/base/s0/scores.json").exists()
    assert script("run.sh", "base", "codealpaca", 0, CKPT_DIR=BASE, ALLOW_CODE_EXECUTION=1)[0].returncode == 0
    assert (tmp_path / "runs/codealpaca/base/s0/scores.json").exists()


def test_a_variant_has_a_folder_of_its_own_and_processes_share_a_step(script, tmp_path):
    env = {"VARIANT": "r4", "SUITES": "AddSub", "CKPT_DIR": BASE}
    result, calls = script("run.sh", "lora", "gsm8k", 3, "--lora_rank", 4, **env)
    assert result.returncode == 0, result.stderr
    config = parse_flags(calls[0][1:], {}, "")
    assert config.train.output_dir == str(tmp_path / "runs/gsm8k/lora-r4/s3") and config.adapter == {"lora_rank": 4}
    assert [words[0] for words in calls] == ["finetune.py", "extract_adapter.py", "generate.py"]


def test_complete_is_what_has_been_made_of_the_same_contents(script, tmp_path):
    """... wherever they lie: not another model, other rows or another adapter in the place of what was there."""
    base, data, out = tmp_path / "base", tmp_path / "data", tmp_path / "runs/gsm8k/lora/s0"
    shutil.copytree(BASE, base)
    (data / "addsub" / "test.json").write_text("[1]")

    def complete(ckpt_dir=base):
        result, calls = script("run.sh", "lora", "gsm8k", 0, SUITES="AddSub", CKPT_DIR=ckpt_dir)
        assert result.returncode == 0, result.stderr
        assert ("complete" in result.stderr) == (not calls)
        return not calls

    assert [complete(), complete(), complete(BASE)] == [False, True, True]
    for file, content in (
        (base / "consolidated.00.pth", b"another model"),
        (data / "gsm8k" / "train.json", b"[2]"),
        (data / "addsub" / "test.json", b"[3]"),
        (out / "adapter.pth", b"another adapter"),
    ):
        file.write_bytes(content)
        assert [complete(), complete()] == [False, True], file


@pytest.mark.parametrize(
    ("words", "env", "expected"),
    [
        (["lora", "gsm8k", 0], {"CKPT_DIR": "/nowhere"}, ["/nowhere"]),
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
    refused(result, *expected, status=1 if "SUITES" in env or env["DATA"] == "/nowhere" else 2)
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
