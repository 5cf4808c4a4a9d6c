"""Tables of made-up runs: means, spreads, runs that may not be averaged, and everything that goes wrong."""

import csv
import io
import json

import pytest

from commands import run
from exps import collect as command
from run_folders import write_run


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
    write_run(tmp_path / "gsm8k/base/s0", (5.0, 6.0), "base", suites=suites)
    for seed, percent in enumerate((10.0, 20.0, 60.0)):
        write_run(tmp_path / f"gsm8k/lora/s{seed}", (percent, 30.0), seed=seed, suites=suites)
    return tmp_path


def test_mean_and_spread_over_seeds(three, collect):
    base, lora = cells(collect(three).out)
    assert base == {"model": "base", "seeds": "1", "trained": "-", "steps": "-", "training": "-"} | {
        **{"tokens/s": "-", "memory": "-", "AddSub (100 of 395)": "5.0 / 6.0", "MultiArith (100 of 395)": "6.0 / 7.0"},
        "mean, math": "5.5 / 6.5",
    }
    assert lora == {"model": "lora", "seeds": "3", "trained": "1,000,004", "steps": "4 x 32 rows"} | {
        "training": "1.4 ± 0.4 min",  # 60, 84 and 108 seconds
        "tokens/s": "15",  # the mean of 20, 14.3 and 11.1
        "memory": "2.0 GiB",
        "AddSub (100 of 395)": "30.0 ± 26.5 / 31.0 ± 26.5",  # the root of (400 + 100 + 900) / 2
        "MultiArith (100 of 395)": "30.0 ± 0.0 / 31.0 ± 0.0",
        "mean, math": "30.0 ± 13.2 / 31.0 ± 13.2",
    }


def test_csv_has_all_the_digits(three, collect):
    base, lora = csv.DictReader(io.StringIO(collect(three, "--format", "csv").out))
    assert (base["model"], base["seeds"], base["steps"], base["mean, math published sd"]) == ("base", "1", "", "")
    assert float(base["mean, math published mean"]) == 5.5
    assert (lora["dataset"], lora["trainable_parameters"], lora["seconds mean"]) == ("gsm8k", "1000004", "84.0")
    assert float(lora["AddSub (100 of 395) published sd"]) == pytest.approx(700**0.5)
    assert float(lora["AddSub (100 of 395) robust mean"]) == 31 and int(lora["peak_memory_bytes"]) == 2**31


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
def test_runs_with_other_settings_are_not_averaged(changes, told, tmp_path, collect):
    for seed in (0, 1):
        write_run(tmp_path / f"gsm8k/lora/s{seed}", (10.0,), seed=seed)
    write_run(tmp_path / "gsm8k/lora/s2", (90.0,), seed=2, **changes)
    result = collect(tmp_path)
    alike, other = cells(result.out)
    assert (alike["seeds"], other["seeds"]) == ("2", "1") and told not in alike["model"]
    assert other["model"].startswith("lora (") and told in other["model"]
    assert any("not averaged" in line and told in line and "s2" in line for line in result.err.splitlines())
    assert "10.0 ± 0.0 / 11.0 ± 0.0" in alike.values() and "90.0 / 91.0" in other.values()


def test_leaks_are_told(tmp_path, collect):
    found = {"file": "/x/data/AddSub/test.json", "rows": 395, "exact": 2, "near": 1, "other": 7}
    none = found | {"file": "/x/data/SVAMP/test.json", "exact": 0, "near": 0}
    for seed in (0, 1):
        write_run(tmp_path / f"gsm8k/lora/s{seed}", seed=seed, leaks={"ngram": 8, "tests": [found, none]})
    note = collect(tmp_path).err
    assert note.count("gsm8k: 3 of 395 rows of AddSub/test.json stand in the training rows") == 1
    assert "SVAMP" not in note


def test_what_does_not_change_the_result_may_differ(tmp_path, collect):
    write_run(tmp_path / "gsm8k/lora/s0")
    changes = {"device": "cuda", "accum_iter": 8, "save_every": 3, "data_path": "elsewhere", "leak_tests": "x"}
    write_run(tmp_path / "other/gsm8k/lora/s1", seed=1, settings=changes)
    result = collect(tmp_path / "gsm8k", tmp_path / "other")
    assert [row["seeds"] for row in cells(result.out)] == ["2"] and "not averaged" not in result.err


def test_a_setting_that_only_some_records_have_is_named(tmp_path, collect):
    write_run(tmp_path / "gsm8k/lora/s0")
    write_run(tmp_path / "gsm8k/lora/s1", seed=1, settings={"expert_num": 1})
    result = collect(tmp_path)
    assert [row["seeds"] for row in cells(result.out)] == ["2"] and "expert_num: not compared" in result.err


def test_lines_that_cannot_be_compared_are_told(tmp_path, collect):
    write_run(tmp_path / "gsm8k/lora/s0")
    write_run(tmp_path / "gsm8k/prompt/s0", method="prompt", base_fingerprint="12" * 32, answers={"temperature": 0.1})
    note = collect(tmp_path).err
    assert "gsm8k: the rows do not all have the same base_fingerprint, temperature" in note


def test_two_runs_of_a_seed_are_refused(tmp_path, collect):
    first, second = (write_run(tmp_path / place / "gsm8k/lora/s0") for place in "ab")
    printed = collect(tmp_path, status=1).err
    assert all(
        words in printed
        for words in (
            str(first),
            str(second),
            "seed 0",
        )
    )


def test_variants_data_sets_and_samples(tmp_path, collect):
    write_run(tmp_path / "gsm8k/lora-r4/s0")
    place = write_run(tmp_path / "codealpaca/lora/s0", suites=("HumanEval",))
    scores = json.loads((place / "scores.json").read_text())
    pass_at = {rule: {"1": 10.0, "5": 20.0 + i, "10": 30.0} for i, rule in enumerate(("published", "robust"))}
    scores["suites"]["HumanEval"] |= {"pass_at": pass_at, "rows": 164, "problems": 164, "samples": 1640}
    (place / "scores.json").write_text(json.dumps(scores))
    code, math = collect(tmp_path).out.split("## gsm8k")
    (row,) = cells(code)
    found = [row[f"HumanEval pass@{k} (164)"] for k in (1, 5, 10)]
    assert code.startswith("## codealpaca") and found == ["10.0 / 10.0", "20.0 / 21.0", "30.0 / 30.0"]
    assert "HumanEval (164)" not in row and cells(math)[0]["model"] == "lora-r4"


def test_a_mean_over_other_tests_has_a_column_of_its_own(tmp_path, collect):
    write_run(tmp_path / "gsm8k/lora/s0", (10.0, 20.0), suites=("AddSub", "MultiArith"))
    write_run(tmp_path / "gsm8k/prompt/s0", (10.0, 40.0), method="prompt", suites=("AddSub", "SVAMP"))
    lora, prompt = cells(collect(tmp_path).out)
    assert [name for name in lora if name.startswith("mean")] == [
        "mean, math: AddSub (100 of 395), MultiArith (100 of 395)",
        "mean, math: AddSub (100 of 395), SVAMP (100 of 395)",
    ]
    assert lora["SVAMP (100 of 395)"] == "-" and prompt["SVAMP (100 of 395)"] == "40.0 / 41.0"


@pytest.mark.parametrize("drop", ["scores.json", "log.jsonl", "a step", "half a step"])
def test_unfinished_runs_are_named_and_left_out(drop, tmp_path, collect):
    write_run(tmp_path / "gsm8k/lora/s0")
    place = write_run(tmp_path / "gsm8k/lora/s1", files={} if "step" in drop else {drop: None})
    if "step" in drop:
        log = (place / "log.jsonl").read_text().splitlines()
        (place / "log.jsonl").write_text("\n".join([*log[:3], log[3][:20]][: 4 if "half" in drop else 3]))
    result = collect(tmp_path)
    why = {"scores.json": "no scores.json", "log.jsonl": "0 of 4 steps"}.get(drop, "3 of 4 steps")
    assert f"left out, not finished: {place}: {why}" in result.err and len(cells(result.out)) == 1
    left = json.loads(collect(tmp_path, "--format", "json").out)["unfinished"]
    assert left[0]["folder"] == str(place) and why in left[0]["why"]
    printed = collect(place, status=1).err
    assert all(
        words in printed
        for words in (
            "no finished run",
            str(place),
        )
    )


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
def test_a_damaged_file_is_named(damage, tmp_path, collect):
    name, change = damage
    place = write_run(tmp_path / "gsm8k/lora/s0")
    change(place)
    output = tmp_path / "table.md"
    output.write_text("earlier")
    printed = collect(tmp_path, "--save_path", output, status=1).err
    assert all(words in printed for words in (str(place / name),))
    assert output.read_text() == "earlier"


def test_the_output_is_written_whole_or_not_at_all(three, collect):
    output = three / "table.csv"
    assert collect(three, "--format", "csv", "--save_path", output).out == ""
    assert output.read_text() == collect(three, "--format", "csv").out
    printed = collect(three, "--save_path", three / "nowhere" / "table.md", status=1).err
    assert all(words in printed for words in ("nowhere",))
    assert sorted(file.name for file in three.iterdir()) == ["gsm8k", "table.csv"]


@pytest.mark.parametrize(
    ("words", "status", "expected"),
    [
        (["x", "--formt", "csv"], 2, ["--formt"]),
        (["x", "--format", "xml"], 2, ["--format", "xml"]),
        ([], 2, ["FOLDER"]),
        (["none"], 1, ["none", "no such folder"]),
        (["docs"], 1, ["no finished run", "docs"]),
    ],
)
def test_a_wrong_call_is_refused(words, status, expected, collect):
    printed = collect(*words, status=status).err
    assert printed.count("error: ") == 1 and all(word in printed for word in expected)


def test_it_is_run_by_its_path(three):
    result = run("exps/collect.py", three / "gsm8k")
    assert result.returncode == 0 and cells(result.stdout)[1]["seeds"] == "3"
