"""Prediction files: strict reading, scores, and the command line of `evaluate`."""

import json
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from code_rows import refusal, row, write_rows
from evaluate import TASKS, score_file
from evaluate.__main__ import main
from evaluate.scoring import wilson_half_width

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = Path(__file__).resolve().parent / "data" / "math_suites"


def predictions(folder: Path, name: str) -> Path:
    """The sample's worked answers as a prediction file."""
    rows = [json.loads(line) for line in (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    return write_rows(folder / f"{name}.jsonl", [row | {"generate": row["output"]} for row in rows])


def run(*arguments: object, terminal: str = "utf-8") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", *map(str, arguments)]
    env = os.environ | {"PYTHONIOENCODING": terminal}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, encoding=terminal, timeout=60)


def test_score_file(tmp_path: Path) -> None:
    rows = [row("4", "The answer is 4. 2 steps"), row("5", "5"), row("6", "none")]
    path = write_rows(tmp_path / "AddSub.jsonl", rows)
    score = score_file(path)
    assert (score.task.name, sum(score.samples), len(score.rows)) == ("AddSub", 3, 3)
    assert score.published.percent == pytest.approx(100 / 3)
    assert score.robust.percent == pytest.approx(200 / 3)
    assert (score.published.missing, score.robust.missing) == (1, 1)
    assert [row.wrong for row in score.rows] == [True, False, True]
    assert score_file(path, "gsm8k").task is TASKS["GSM8K"]
    score = score_file(write_rows(path, [row("4", ["4", "4", "5", "no"]), row(4, "4")]), TASKS["SVAMP"])
    assert score.robust.percent == 75.0  # (1/2 + 1) / 2, not 3/5
    assert (sum(score.samples), score.robust.missing) == (5, 1)


def test_wilson_half_width_is_half_the_intervals_width() -> None:
    # The bounds solve (p - q)^2 = z^2 q (1 - q) / n: at 7 of 10 they are 0.3968 and 0.8922.
    assert wilson_half_width(0.7, 10) == pytest.approx((0.892209 - 0.396778) / 2, abs=1e-5)
    assert 0 < wilson_half_width(1.0, 10) < wilson_half_width(0.5, 10)


def test_means_are_unweighted_and_of_each_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"AddSub": [row("4", "4")], "BoolQ": [row("true", "True")], "SVAMP": [row("4", "5")] * 9}
    rows["PIQA"] = [row("solution1", "solution1")]
    files = [str(write_rows(tmp_path / f"{name}.jsonl", written)) for name, written in rows.items()]
    main(["--predict_files", *files, "--save_path", str(tmp_path / "scores.json")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:7]] == [*rows, "mean, math", "mean, commonsense"]
    assert lines[5].split()[2] == lines[5].split()[5] == "50.00"  # published, robust
    assert (lines[6].split()[2], lines[6].split()[5]) == ("50.00", "100.00")
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert scores["mean"]["robust"]["percent"] == 75.0  # of all four
    assert scores["families"]["math"]["suites"] == ["AddSub", "SVAMP"]
    assert scores["families"]["commonsense"]["mean"]["robust"]["percent"] == 100.0
    half_widths = [score_file(file).robust.half_width for file in (files[0], files[2])]
    expected = {"percent": 50.0, "half_width": pytest.approx(math.hypot(*half_widths) / 2)}
    assert scores["families"]["math"]["mean"]["robust"] == expected
    main(["--predict_files", *files[:2]])  # where a family has only one suite
    assert "\nmean" not in capsys.readouterr().out


def test_a_list_and_lines_are_read_alike(tmp_path: Path) -> None:
    rows = [row("4", "4\u2028 4"), row("5", "6", id=int("9" * 299))]
    path = write_rows(tmp_path / "AddSub.jsonl", rows)
    assert score_file(path).robust.percent == 50.0
    path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    assert score_file(path).robust.percent == 50.0


GOOD = json.dumps(row("4", "4"))
TEXTS = "field 'generate': expected a list of at least one text, got"
NUMBER = "line 1: field 'answer': AddSub expects a finite number, got"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "empty, expected rows"),
        (f"{GOOD}\n{GOOD[:-3]}", "line 2: not valid JSON ("),
        (f"[{GOOD}, 4]", "row 2: expected an object"),
        ('{"generate": "4"}', "line 1: field 'answer' is missing"),
        (f'{GOOD}\n\n{{"answer": "4"}}', "line 3: field 'generate' is missing"),
        ('{"answer": "4", "generate": null}', "field 'generate' must be text, not NoneType"),
        ('{"answer": "4", "generate": ["4", 4]}', f"{TEXTS} ['4', 4]"),
        ('{"answer": "4", "generate": []}', f"{TEXTS} []"),
        ('{"answer": "4", "generate": "4", "instruction": 3}', "field 'instruction' must be text, not int"),
        ('{"answer": "four", "generate": "4"}', f"{NUMBER} 'four'"),
        ('{"answer": 1e999, "generate": "4"}', f"{NUMBER} inf"),
        ('{"answer": ' + "9" * 400 + ', "generate": "4"}', f"{NUMBER} 9999"),
        ('{"answer": ' + "9" * 5000 + ', "generate": "4"}', "line 1: not valid JSON ("),
        (b'{"answer": "4", "generate": "\xff"}', "not UTF-8 text (byte 29)"),
    ],
)
def test_bad_input_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | bytes, message: str
) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    shown = refusal(capsys, 1, "--predict_file", path, suite="AddSub")
    assert shown.startswith(f"error: {path}: ") and message in shown and shown.count("\n") == 1 and len(shown) < 400


def test_a_file_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, why in ((tmp_path / "AddSub.jsonl", "no such file"), (tmp_path, "is not a regular file")):
        assert refusal(capsys, 1, "addsub", "--predict_file", path) == f"error: {path}: {why}\n"


SUMS = "--predict_file AddSub.jsonl"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "give one of --predict_file and --predict_files"),
        (f"{SUMS} --predict_files AQuA.jsonl", "give one of --predict_file and --predict_files"),
        ("--predict_fil x", "--predict_file"),
        (f"{SUMS} --verdict=y", "--verdicts"),
        ("adsub --predict_file x", "no suite is named 'adsub' (nearest: AddSub)"),
        ("--predict_file x.jsonl", "x.jsonl: cannot tell the suite from the file's name"),
        ("--predict_files AddSub.jsonl x.jsonl", "x.jsonl: cannot tell the suite"),
        ("--predict_files AddSub.jsonl addsub.2.jsonl", "two files of one suite"),
        ("aqua --predict_files AddSub.jsonl", "leave out 'aqua'"),
        (f"{SUMS} --show -1", "--show must be at least 0, not -1"),
        (f"{SUMS} --save_path ./AddSub.jsonl", "need files of their own"),
        (f"{SUMS} --save_path x --verdicts x", "need files of their own"),
        (f"{SUMS} --jobs 3", "--jobs is for suites that run code"),
        (f"{SUMS} --weak_sandbox", "--weak_sandbox is for suites that run code"),
        ("--predict_file HumanEval.jsonl", "HumanEval runs generated programs on this machine: allow it with "),
        ("mbpp --predict_file x --allow_code_execution False", "allow it with --allow_code_execution"),
        ("mbpp --predict_file x --allow_code_execution=perhaps", "expected True or False, got 'perhaps'"),
        ("mbpp --predict_file x --timeout nan", "--timeout: expected "),
        ("mbpp --predict_file x --timeout 1e9", "--timeout must be at most 3600"),
        ("mbpp --predict_file x --jobs 0", "--jobs must be at least 1"),
    ],
)
def test_bad_flags_are_refused_before_any_file_is_read(
    capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    assert message in refusal(capsys, 2, *line.split())  # none of these files exists


@pytest.mark.parametrize("name", TASKS)
def test_each_suite_has_its_module(name: str, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    module = f"evaluate.{TASKS[name].module}"
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(module, run_name="__main__")
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and f"usage: python -m {module} " in out and "Wilson" in out


def test_several_files_in_one_table(tmp_path: Path) -> None:
    files = [predictions(tmp_path, name) for name in ("AddSub", "AQuA", "GSM8K", "MultiArith", "SingleEq")]
    done = run("evaluate", "--predict_files", *files)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.split() for line in done.stdout.splitlines()]
    assert " ".join(line[0] for line in lines[:7]) == "suite AddSub AQuA GSM8K MultiArith SingleEq mean"
    assert " ".join(lines[1]) == "AddSub 6 of 395 100.00 ± 19.52 100.00 ± 19.52 0 / 0"
    assert lines[2][4] == "33.33" and lines[6][1] == "62.27"
    assert len({len(line) for line in done.stdout.splitlines()[:6]}) == 1
    assert "only 6 of the 395 problems of AddSub" in done.stdout


def test_a_terminal_that_lacks_a_character(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "AddSub.jsonl", [row("4", "fünf")])
    done = run("evaluate", "--predict_file", path, "--show", "1", terminal="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "f\\xfcnf" in done.stdout and "1 of 395" in done.stdout


def test_json_and_verdicts(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "AQuA.jsonl", [row("B", "Answer: B"), row("A", ["(B)", "e\ud800\u00e9"])])
    scores, verdicts = tmp_path / "scores.json", tmp_path / "verdicts.jsonl"
    scores.write_text("old", encoding="utf-8")
    main(["--predict_file", str(path), "--save_path", str(scores), "--verdicts", str(verdicts)])
    saved = json.loads(scores.read_text(encoding="utf-8"))
    suite = saved["suites"]["AQuA"]
    assert suite == suite | {"file": str(path), "rows": 2, "problems": 254, "samples": 3}
    assert suite["published"]["percent"] == 0.0
    assert suite["robust"]["percent"] == saved["mean"]["robust"]["percent"] == 50.0
    first, second = [json.loads(line) for line in verdicts.read_text(encoding="utf-8").splitlines()]
    expected = {"suite": "AQuA", "index": 0, "answer": "B", "instruction": "How many?", "generate": "Answer: B"}
    expected |= {"published": {"found": "A", "right": False}, "robust": {"found": "B", "right": True}}
    assert first == expected
    assert second["generate"] == ["(B)", "e\ud800\u00e9"]
    assert second["published"] == second["robust"] == [{"found": "B", "right": False}, {"found": None, "right": False}]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["AQuA.jsonl", "scores.json", "verdicts.jsonl"]


def test_an_unwritable_place_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, folder = write_rows(tmp_path / "AddSub.jsonl", [row("4", "4")]), tmp_path / "folder"
    folder.mkdir()
    for output in (folder, path / "x.json"):
        assert refusal(capsys, 1, "--predict_file", path, "--save_path", output).startswith(f"error: {output}: ")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["AddSub.jsonl", "folder"]
    main(["--predict_file", str(path), "--save_path", str(folder / "new" / "x.json")])
    assert (folder / "new" / "x.json").is_file()


def test_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("4", "4"), row("4", "The answer is 4. 2 steps"), row("4", "5"), row("4", "none\x1b[K"), row("4", "7")]
    path = write_rows(tmp_path / "AddSub.jsonl", rows)
    main(["--predict_file", str(path), "--show", "3"])
    out = capsys.readouterr().out
    assert re.findall("^--- (.*?):", out, re.M) == ["AddSub line 2", "AddSub line 3", "AddSub line 4"]
    assert "line 2: answer '4'; published found '2' (wrong), robust found '4' (right)\n    The answer is 4. 2" in out
    assert "robust found nothing (wrong)\n    none\\x1b[K\n" in out
    write_rows(path, [*rows * 80, row("4", ["The answer is 4. 5 x", "9" * 1_000_000])])
    main(["--predict_file", str(path), "--show", "999"])
    out = capsys.readouterr().out
    assert out.count("---") == 4 * 80 + 2 and "sample 2" in out and "(998500 characters more)" in out
    assert "401 rows, more than the 395 problems of AddSub" in out
