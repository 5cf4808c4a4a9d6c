"""Tables of made-up runs: means, spreads, runs that may not be averaged, and everything that goes wrong."""

import csv
import io
import json

import pytest

from exps import collect as command
from run_folders import log, write_run


@pytest.fixture
def collect(capsys):
    """Runs the command; the texts that it printed on stdout and stderr."""

    def call(*words, status=0):
        try:
            command.main(list(map(str, words)))
            code = 0
        except SystemExit as end:
            code = end.code
        printed = capsys.readouterr()
        assert code == status, printed
        return printed

    return call


def cells(text):
    """Rows of a Markdown table by column."""
    table = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if "|" in line]
    return [dict(zip(table[0], row, strict=True)) for row in table[2:]]


@pytest.fixture
def three(tmp_path):
    """The untuned model, and three seeds of one method: 10, 20, 60 and 30, 30, 30 percent on two tests."""
    suites = ("AddSub", "MultiArith")
    write_run(tmp_path / "gsm8k/base/s0", (5.0, 6.0), suites=suites)
    for seed, percent in enumerate((10.0, 20.0, 60.0)):
        write_run(tmp_path / f"gsm8k/lora/s{seed}", (percent, 30.0), suites=suites)
    return tmp_path


def test_mean_and_spread_over_seeds(three, collect):
    base, lora = cells(collect(three).out)
    assert base == {"model": "base", "seeds": "1", "trained parameters": "–", "steps": "–", "training, min": "–"} | {
        **{"tokens/s": "–", "peak memory, GB": "–"},
        **{"AddSub (100 of 395)": "5.0 / 6.0", "MultiArith (100 of 395)": "6.0 / 7.0", "mean, math": "5.5 / 6.5"},
    }
    assert lora == {"model": "lora", "seeds": "3", "trained parameters": "1,000,004", "steps": "4 x 32 rows"} | {
        "training, min": "1.4 ± 0.4",  # 60, 84 and 108 seconds
        "tokens/s": "15 ± 5",  # 20, 14.3 and 11.1
        "peak memory, GB": "2.15",
        "AddSub (100 of 395)": "30.0 ± 26.5 / 31.0 ± 26.5",  # the root of (400 + 100 + 900) / 2
        "MultiArith (100 of 395)": "30.0 / 31.0",
        "mean, math": "30.0 ± 13.2 / 31.0 ± 13.2",
    }


def test_csv_has_all_the_digits(three, collect):
    base, lora = csv.DictReader(io.StringIO(collect(three, "--format", "csv").out))
    assert (base["model"], base["seeds"], base["steps"], base["mean, math published sd"]) == ("base", "1", "", "")
    assert float(base["mean, math published mean"]) == 5.5
    assert (lora["dataset"], lora["trainable_parameters"], lora["seconds mean"]) == ("gsm8k", "1000004", "84.0")
    assert float(lora["AddSub (100 of 395) published sd"]) == pytest.approx(700**0.5)
    assert float(lora["AddSub (100 of 395) robust mean"]) == 31 and float(lora["peak_memory_bytes mean"]) == 2**31


def test_json_holds_every_run(three, collect):
    content = json.loads(collect(three, "--format", "json").out)
    base, lora = content["lines"]
    assert lora["seeds"] == [0, 1, 2] and base["runs"][0]["config"] is None and content["unfinished"] == []
    assert lora["scores"]["mean, math"]["robust"] == {"mean": 31, "sd": pytest.approx(175**0.5)}
    run = lora["runs"][2]
    assert run["folder"] == str(three / "gsm8k/lora/s2") and run["training"]["seconds"] == 108
    assert run["scores"]["suites"]["AddSub"]["published"]["percent"] == 60
    assert run["config"]["lr"] == 1e-3 and run["answers"]["AddSub"]["temperature"] == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 5}, "steps 5"),
        ({"lr": 2e-3}, "lr 0.002"),
        ({"base_fingerprint": "ba" * 32}, "base_fingerprint bababa"),
        ({"data_sha256": "99" * 32}, "data_sha256 999999"),
        ({"adapter": {"method": "lora", "lora_rank": 4}}, "lora_rank 4"),
        ({"settings": {"weight_decay": 0.5}}, "weight_decay 0.5"),
        ({"trainable_parameters": 5}, "trainable_parameters 5"),
        ({"answers": {"temperature": 0.7}}, "temperature 0.7"),
        ({"rows": 395}, "tests AddSub (395)"),
        ({"suites": ("MultiArith",)}, "tests MultiArith (100 of 395)"),
    ],
)
def test_runs_with_other_settings_are_not_averaged(changes, words, tmp_path, collect):
    for seed in (0, 1):
        write_run(tmp_path / f"gsm8k/lora/s{seed}", (10.0,))
    write_run(tmp_path / "gsm8k/lora/s2", (90.0,), **changes)
    result = collect(tmp_path)
    alike, other = cells(result.out)
    assert (alike["seeds"], other["seeds"]) == ("2", "1") and words not in alike["model"]
    assert other["model"].startswith("lora (") and words in other["model"]
    assert any("not averaged" in line and words in line and "s2" in line for line in result.err.splitlines())
    assert "10.0 / 11.0" in alike.values() and "90.0 / 91.0" in other.values()


def test_leaks_are_named(tmp_path, collect):
    leak = {"file": "/x/data/AddSub/test.json", "rows": 395, "exact": 2, "near": 1, "other": 7}
    none = leak | {"file": "/x/data/SVAMP/test.json", "exact": 0, "near": 0}
    for seed in (0, 1):
        write_run(tmp_path / f"gsm8k/lora/s{seed}", leaks={"ngram": 8, "tests": [leak, none]})
    note = collect(tmp_path).err
    assert note.count("gsm8k: 3 of 395 rows of AddSub/test.json stand in the training rows") == 1
    assert "SVAMP" not in note


def test_what_does_not_change_the_result_may_differ(tmp_path, collect):
    write_run(tmp_path / "gsm8k/lora/s0")
    settings = {"device": "cuda", "accum_iter": 8, "save_every": 3, "data_path": "elsewhere", "leak_tests": "x"}
    write_run(tmp_path / "other/gsm8k/lora/s1", settings=settings | {"expert_num": 1})
    result = collect(tmp_path / "gsm8k", tmp_path / "other")
    assert [row["seeds"] for row in cells(result.out)] == ["2"] and "not averaged" not in result.err


def test_lines_that_cannot_be_compared_are_named(tmp_path, collect):
    write_run(tmp_path / "gsm8k/lora/s0")
    write_run(tmp_path / "gsm8k/prompt/s0", base_fingerprint="12" * 32, answers={"temperature": 0.1})
    note = collect(tmp_path).err
    assert "gsm8k: the rows do not all have the same base_fingerprint, temperature" in note


def test_two_runs_of_a_seed_are_refused(tmp_path, collect):
    folders = [str(write_run(tmp_path / parent / "gsm8k/lora/s0")) for parent in "ab"]
    assert f"{' and '.join(folders)}: two runs of seed 0" in collect(tmp_path, status=1).err


def test_variants_data_sets_and_samples(tmp_path, collect):
    write_run(tmp_path / "gsm8k/lora-r4/s0")
    folder = write_run(tmp_path / "codealpaca/lora/s0", suites=("HumanEval",))
    scores = json.loads((folder / "scores.json").read_text())
    pass_at = {rule: {"1": 10.0, "5": 20.0 + i, "10": 30.0} for i, rule in enumerate(("published", "robust"))}
    scores["suites"]["HumanEval"] |= {"pass_at": pass_at, "rows": 164, "problems": 164, "samples": 1640}
    (folder / "scores.json").write_text(json.dumps(scores))
    code, math = collect(tmp_path).out.split("## gsm8k")
    (row,) = cells(code)
    percents = [row[f"HumanEval pass@{k} (164)"] for k in (1, 5, 10)]
    assert code.startswith("## codealpaca") and percents == ["10.0 / 10.0", "20.0 / 21.0", "30.0 / 30.0"]
    assert "HumanEval (164)" not in row and cells(math)[0]["model"] == "lora-r4"


def test_a_mean_over_other_tests_has_a_column_of_its_own(tmp_path, collect):
    write_run(tmp_path / "gsm8k/lora/s0", (10.0, 20.0), suites=("AddSub", "MultiArith"))
    write_run(tmp_path / "gsm8k/prompt/s0", (10.0, 40.0), suites=("AddSub", "SVAMP"))
    lora, prompt = cells(collect(tmp_path).out)
    assert [name for name in lora if name.startswith("mean")] == [
        "mean, math: AddSub (100 of 395), MultiArith (100 of 395)",
        "mean, math: AddSub (100 of 395), SVAMP (100 of 395)",
    ]
    assert lora["SVAMP (100 of 395)"] == "–" and prompt["SVAMP (100 of 395)"] == "40.0 / 41.0"


def test_unfinished_runs_are_named_and_left_out(tmp_path, collect):
    write_run(tmp_path / "gsm8k/lora/s0")
    folder = write_run(tmp_path / "gsm8k/lora/s1", files={"log.jsonl": log(4, 1)[:-20]})
    result = collect(tmp_path)
    assert f"left out, not finished: {folder}: 3 of 4 steps" in result.err and len(cells(result.out)) == 1
    (unfinished,) = json.loads(collect(tmp_path, "--format", "json").out)["unfinished"]
    assert unfinished["folder"] == str(folder) and "3 of 4 steps" in unfinished["why"]
    assert f"no finished run (a folder with scores.json) in {folder}" in collect(folder, status=1).err


@pytest.mark.parametrize("name", ["scores.json", "config.json", "AddSub.jsonl.settings.json"])
def test_a_damaged_file_is_named(name, tmp_path, collect):
    file = write_run(tmp_path / "gsm8k/lora/s0", files={name: "{,"}) / name
    output = tmp_path / "table.md"
    output.write_text("earlier")
    assert f"{file}: not valid JSON" in collect(tmp_path, "--save_path", output, status=1).err
    assert output.read_text() == "earlier"


def test_the_output_is_written_whole_or_not_at_all(three, collect):
    output = three / "table.csv"
    assert collect(three, "--format", "csv", "--save_path", output).out == ""
    assert output.read_text() == collect(three, "--format", "csv").out
    assert "table.csv/table.md" in collect(three, "--save_path", output / "table.md", status=1).err
    assert sorted(file.name for file in three.iterdir()) == ["gsm8k", "table.csv"]


@pytest.mark.parametrize(
    ("words", "status", "expected"),
    [
        (["x", "--formt", "csv"], 2, ["--formt"]),
        (["x", "--format", "xml"], 2, ["--format", "xml"]),
        ([], 2, ["FOLDER"]),
        (["none"], 1, ["none", "no such folder"]),
        (["docs"], 1, ["docs: no run in it"]),
    ],
)
def test_a_wrong_call_is_refused(words, status, expected, collect):
    printed = collect(*words, status=status).err
    assert printed.count("error: ") == 1 and all(word in printed for word in expected)
