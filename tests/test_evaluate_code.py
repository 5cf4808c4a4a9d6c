"""HumanEval and MBPP: how a program is read from a text, what it scores, pass@k, and the consent that running takes."""

import itertools
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from code_rows import MBPP, PROBLEMS, predicted, write_rows
from evaluate import TASKS, Sandbox, extract_code, score_file
from evaluate.__main__ import main
from evaluate.scoring import pass_at

ROOT = Path(__file__).resolve().parent.parent
Problem = dict[str, Any]


@pytest.fixture(scope="module")
def box() -> Sandbox:
    return Sandbox(timeout=20, jobs=2, weak=True)


def scored(box: Sandbox, path: Path, rows: list[Problem], suite: str = "HumanEval") -> list[tuple[bool, bool]]:
    """(published, robust) of each row's first sample."""
    score = score_file(write_rows(path, rows), suite, box)
    return [(row.published[0].is_correct, row.robust[0].is_correct) for row in score.rows]


def whole(problem: Problem) -> str:
    return problem["prompt"] + problem["canonical_solution"]


def without_imports(problem: Problem) -> str:
    """The function alone: no import, no other function of the prompt."""
    return whole(problem)[whole(problem).index(f"def {problem['entry_point']}(") :]


FORMS: dict[str, tuple[Callable[[Problem], str], bool]] = {  # name: (text, right under the published rule)
    "whole": (whole, True),
    "whole, stripped": (lambda p: whole(p).strip(), True),
    "continuation": (lambda p: p["canonical_solution"], True),
    "continuation, stripped": (lambda p: p["canonical_solution"].strip(), True),
    "block": (lambda p: f"Here it is:\n\n```python\n{whole(p)}```\nIt works.", True),
    "block of a continuation": (lambda p: f"```\n{p['canonical_solution']}```", True),
    "unclosed block": (lambda p: f"Sure!\n```py\n{whole(p)}", True),
    "continuation, then another function": (lambda p: p["canonical_solution"] + "\ndef g(:\n", True),
    "continuation, then a call": (lambda p: p["canonical_solution"] + "\nprint(1 / 0)\n", True),
    "second block": (lambda p: f"```bash\npip install x\n```\n```python\n{whole(p)}```", False),
    "words around": (lambda p: f"Sure! That's it:\n\n{whole(p)}\nIt isn't hard.", False),
    "words after a continuation": (lambda p: f"{p['canonical_solution']}\nThat's it.", False),
    "continuation, then a fence": (lambda p: f"{p['canonical_solution']}```\nThat's it.", False),
    "dedented": (lambda p: textwrap.dedent(p["canonical_solution"]), False),
    "other indentation": (lambda p: textwrap.indent(textwrap.dedent(p["canonical_solution"]), " "), False),
    "run-on": (lambda p: f"{whole(p)}\n### Instruction:\nAdd.\n\n### Response:\nx = 1 +", False),
    "run-on of a continuation": (lambda p: p["canonical_solution"] + "\n### Input:\nprint(", True),
    "a demonstration": (lambda p: f"{whole(p)}\nprint({p['entry_point']}(input()))\nassert False\n", False),
    "cut off": (lambda p: f"{whole(p)}\n\ndef main():\n    print('a", False),
    "windows": (lambda p: f"```python\r\n{whole(p)}```".replace("\n", "\r\n").replace("\r\r", "\r"), True),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_right_answer(box: Sandbox, tmp_path: Path, form: str) -> None:
    text, published = FORMS[form]
    got = scored(box, tmp_path / "x.jsonl", [predicted(problem, text(problem)) for problem in PROBLEMS[:3]])
    # a body of one line cannot be indented wrongly
    assert got == [(published or form == "dedented" and index == 1, True) for index in range(3)]


def test_the_prompts_imports_and_functions_are_the_robust_rules(box: Sandbox, tmp_path: Path) -> None:
    rows = [predicted(problem, without_imports(problem)) for problem in PROBLEMS]
    # List is missing in the first, shift in the second, math in the third
    expected = [(False, True)] * 3 + [(True, True)] * 2
    assert scored(box, tmp_path / "x.jsonl", rows) == expected


def broken(problem: Problem) -> str:
    head, _, _ = problem["canonical_solution"].rpartition("return")
    return head + "raise KeyError('broken')\n"


def test_broken_answers(box: Sandbox, tmp_path: Path) -> None:
    texts = [(p, text) for p in PROBLEMS for text in (broken(p), p["prompt"] + broken(p))]
    rows = [predicted(p, text) for p, text in texts]
    score = score_file(write_rows(tmp_path / "x.jsonl", rows), "HumanEval", box)
    assert (score.published.percent, score.robust.percent, score.robust.missing) == (0, 0, 0)
    assert {row.robust[0].why for row in score.rows} == {"KeyError: 'broken'"}


@pytest.mark.parametrize(
    ("text", "why"),  # of both rules, or of each
    [
        ("", ("",)),
        (" \n\t", ("",)),
        ("I cannot do that.", ("SyntaxError: invalid syntax",)),
        ("    return None", ("AssertionError",)),
        ("pass", ("AssertionError",)),
        ("return None or", ("SyntaxError: invalid syntax",)),
        ("def other(values):\n    return 6", ("IndentationError: expected an indented block", "AssertionError")),
        ("    import os\n    os._exit(0)", ("ended before the tests did: exit status 0",)),
        ("import sys\nsys.exit()", ("NameError: name 'sys' is not defined", "AssertionError")),
        ("def check(candidate):\n    pass\ndef total(values):\n    return 0", ("AssertionError",)),
        ("def total(values):\n    return Total()\nclass Total:\n    pass", ("AssertionError",)),
        ("\0", ("SyntaxError: source code string cannot contain null bytes",)),
        ("\ud800", ("UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800'",)),
    ],
)
def test_wrong_answers(box: Sandbox, tmp_path: Path, text: str, why: tuple[str, ...]) -> None:
    score = score_file(write_rows(tmp_path / "x.jsonl", [predicted(PROBLEMS[0], text)]), "HumanEval", box)
    for sample, reason in zip((score.rows[0].published[0], score.rows[0].robust[0]), why * 2, strict=False):
        assert not sample.is_correct and sample.why.startswith(reason)
        assert (sample.extraction is None) == (reason == "")
    assert score.robust.missing == score.published.missing == (why[0] == "")


def test_what_is_run(box: Sandbox) -> None:
    total = PROBLEMS[0]
    text = f"Sure:\n{without_imports(total)}\nresult = total([2])\nprint(result)\n### Response:\nmore"
    published = extract_code.published(text, total["prompt"], "total")
    robust = extract_code.robust(text, total["prompt"], "total")
    assert published is not None and robust is not None
    assert published.text == text.rstrip("\n") + "\n"
    assert robust.text == f"from typing import List\n\n\n{without_imports(total)}"
    body = extract_code.published("return 1\nprint(2)", total["prompt"], "total")
    assert body is not None and body.text == total["prompt"] + "    return 1\n"


def test_mbpp(box: Sandbox, tmp_path: Path) -> None:
    rows = [predicted(problem, problem["code"]) for problem in MBPP]
    assert scored(box, tmp_path / "MBPP.jsonl", rows, "MBPP") == [(True, True)] * 3
    rows = [predicted(problem, f"Sure!\n```python\n{problem['code']}\nprint(input())\n```") for problem in MBPP]
    assert scored(box, tmp_path / "MBPP.jsonl", rows, "MBPP") == [(False, True)] * 3
    rows = [predicted(problem, f"Here:\n{problem['code']}\nThat's all.\n### Instruction:\nx") for problem in MBPP]
    assert scored(box, tmp_path / "MBPP.jsonl", rows, "MBPP") == [(False, True)] * 3
    rows = [predicted(problem, problem["code"].replace("def ", "def x")) for problem in MBPP]
    assert scored(box, tmp_path / "MBPP.jsonl", rows, "MBPP") == [(False, False)] * 3


def test_pass_at_k_is_the_share_of_draws_with_a_passing_sample() -> None:
    for samples, passed in itertools.product(range(1, 7), range(7)):
        for k in range(1, samples + 1) if passed <= samples else ():
            draws = list(itertools.combinations(range(samples), k))
            share = sum(any(sample < passed for sample in draw) for draw in draws) / len(draws)
            assert pass_at(k, samples, passed) == pytest.approx(share)


def test_samples(box: Sandbox, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right, wrong = "    return max(words, key=len) if words else None", "    return 1"
    rows = [predicted(PROBLEMS[3], [right] * n + [wrong] * (10 - n)) for n in (0, 1, 10)]
    path, saved = write_rows(tmp_path / "HumanEval.jsonl", rows), tmp_path / "scores.json"
    main(["--predict_file", str(path), "--allow_code_execution", "--weak_sandbox", "--save_path", str(saved)])
    suite = json.loads(saved.read_text())["suites"]["HumanEval"]
    expected = {"1": 1.1 / 3, "5": 1.5 / 3, "10": 2 / 3}
    for rule in ("published", "robust"):
        assert suite["pass_at"][rule] == pytest.approx({k: 100 * share for k, share in expected.items()})
        assert suite[rule]["percent"] == pytest.approx(suite["pass_at"][rule]["1"])
        assert set(suite[rule]) == {"percent", "half_width", "missing"}
    out = capsys.readouterr().out.splitlines()
    assert [line.split() for line in out[2:5]] == [
        ["pass@1", "36.67", "36.67"],
        ["pass@5", "50.00", "50.00"],
        ["pass@10", "66.67", "66.67"],
    ]
    assert out[2].index("36.67") == out[1].index("36.67")
    uneven = write_rows(tmp_path / "x.jsonl", [predicted(PROBLEMS[3], [right] * n) for n in (5, 6)])
    assert score_file(uneven, "HumanEval", box).pass_at("robust") == {1: 100.0}
    main(["--predict_file", str(uneven), "--allow_code_execution", "--weak_sandbox"], "HumanEval")
    assert "not as many samples in every row, so that only pass@1 is known" in capsys.readouterr().out


def test_verdicts_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [predicted(PROBLEMS[3], "return 1"), predicted(PROBLEMS[0], [whole(PROBLEMS[0]), ""])]
    path, saved = write_rows(tmp_path / "humaneval.jsonl", rows), tmp_path / "verdicts.jsonl"
    flags = ["--allow_code_execution", "true", "--weak_sandbox", "--show", "2", "--verdicts", str(saved)]
    main(["--predict_file", str(path), *flags])
    out = capsys.readouterr().out
    assert "--- HumanEval line 1: task Made/3; published AssertionError (wrong), robust AssertionError (wrong)\n" in out
    assert "  published and robust ran\n    def longest(words):\n" in out and "        return 1\n" in out
    assert "sample 1: task Made/0; published passed (right), robust passed (right)" in out
    first, second = [json.loads(line) for line in saved.read_text().splitlines()]
    assert first["task_id"] == "Made/3" and "answer" not in first and first["generate"] == "return 1"
    code = PROBLEMS[3]["prompt"].lstrip() + "    return 1\n"
    assert first["published"] == {"found": code, "right": False, "why": "AssertionError"}
    assert second["robust"][1] == {"found": None, "right": False}
    assert (second["robust"][0]["right"], second["robust"][0]["why"]) == (True, "passed")


def test_families(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = write_rows(tmp_path / "HumanEval.jsonl", [predicted(problem, whole(problem)) for problem in PROBLEMS[:2]])
    mbpp = write_rows(tmp_path / "MBPP.jsonl", [predicted(MBPP[0], "")])
    sums = write_rows(tmp_path / "AddSub.jsonl", [{"answer": "4", "generate": "4"}])
    files = ["--predict_files", str(sums), str(code), str(mbpp)]
    main([*files, "--allow_code_execution", "--jobs", "1", "--timeout", "30", "--weak_sandbox"])
    out = capsys.readouterr().out
    assert "mean, code" in out and "mean, math" not in out
    assert out.splitlines()[2].split()[:5] == ["HumanEval", "2", "of", "164", "100.00"]
    assert "MBPP" in out and "1 of 500" in out


def test_nothing_is_run_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "HumanEval.jsonl", [predicted(PROBLEMS[0], "")])
    with pytest.raises(ValueError, match="HumanEval runs generated code: allow it by score_file.*sandbox=Sandbox"):
        score_file(path)
    # the word on a suite that runs nothing is no mistake: one command line serves all
    sums = write_rows(tmp_path / "AddSub.jsonl", [{"answer": "4", "generate": "4"}])
    main(["--predict_file", str(sums), "--allow_code_execution"], "AddSub")


def test_as_a_module(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "HumanEval.jsonl", [predicted(problem, whole(problem)) for problem in PROBLEMS])
    command = [sys.executable, "-W", "error", "-m", "evaluate.humaneval", "--predict_file", str(path)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
    command += ["--allow_code_execution", "--weak_sandbox"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"X": "1"}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].split()[:5] == ["HumanEval", "5", "of", "164", "100.00"]


@pytest.mark.parametrize(
    ("suite", "change", "message"),
    [
        ("HumanEval", {"prompt": None}, "field 'prompt': expected a text, got None"),
        ("HumanEval", {"test": 3}, "field 'test': expected a text, got 3"),
        (
            "HumanEval",
            {"entry_point": "f(x); import os"},
            "field 'entry_point': expected the name of a function, got 'f(",
        ),
        ("HumanEval", {"generate": 4}, "field 'generate': expected a text, got 4"),
        (
            "MBPP",
            {"test_list": "assert True"},
            "field 'test_list': expected a list of at least one text, got 'assert True'",
        ),
        ("MBPP", {"test_list": []}, "field 'test_list': expected a list of at least one text, got []"),
        ("MBPP", {"test_imports": "import re"}, "field 'test_imports': expected a list of at least one text, got"),
        ("MBPP", {"test_setup_code": []}, "field 'test_setup_code': expected a text, got []"),
    ],
)
def test_bad_rows_are_named(box: Sandbox, tmp_path: Path, suite: str, change: dict[str, Any], message: str) -> None:
    good = predicted((PROBLEMS if suite == "HumanEval" else MBPP)[0], "")
    path = write_rows(tmp_path / "x.jsonl", [good, good | change])
    with pytest.raises(ValueError) as refused:
        score_file(path, suite, box)
    assert str(refused.value).startswith(f"{path}: line 2: {message}")


@pytest.mark.parametrize(
    ("suite", "field"), [("HumanEval", "prompt"), ("HumanEval", "test"), ("MBPP", "code"), ("MBPP", "test_list")]
)
def test_missing_fields_are_named(box: Sandbox, tmp_path: Path, suite: str, field: str) -> None:
    row = predicted((PROBLEMS if suite == "HumanEval" else MBPP)[0], "")
    del row[field]
    with pytest.raises(ValueError, match=f"line 1: field '{field}' is missing"):
        score_file(write_rows(tmp_path / "x.jsonl", [row]), suite, box)


def test_the_code_suites_are_the_papers() -> None:
    sizes = {name: task.problems for name, task in TASKS.items() if task.family == "code"}
    assert sizes == {"HumanEval": 164, "MBPP": 500}


PIECES = (
    "def total(x):\n|    return x\n|return x|```|```python\n|\n| |    |\t|print(1)\n|### Response:\n|class A:\n|'''"
)
PIECES += "|\"|(|#|\\|\r\n|\0|import os\n|x = 1\n|if __name__ == '__main__':\n|@x\n"
PIECES += "|for i in x:\n|from x|async |½|Here it is:\n|total = 1"


@settings(deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from([*PIECES.split("|"), "\ud800"])).map("".join)))
def test_every_text_is_read(text: str) -> None:
    for start, name in ((PROBLEMS[0]["prompt"], "total"), ("", "total"), ("", None)):
        published, robust = extract_code.published(text, start, name), extract_code.robust(text, start, name)
        assert (published is None) == (not text.strip() or "```" in text and published is None)
        assert robust is not None or published is None or "```" in text or "###" in text


@pytest.mark.parametrize(
    "piece",
    ["(", "[", "-", "x.", "```\n", " ", "\n", "def f(x):\n", "a = 1\n", "'''", "lambda:", "@x\n", "x = 1\n@x\n"],
)
def test_long_texts_are_read(piece: str) -> None:
    for name in ("f", "g", None):
        extract_code.published(piece * (50_000 // len(piece)), "def f(x):\n", name)
        extract_code.robust(piece * (50_000 // len(piece)), "def f(x):\n", name)
