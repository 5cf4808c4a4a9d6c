"""HumanEval and MBPP: how a program is read from a text, what it scores, pass@k, and the consent that running takes."""

import itertools
import json
import re
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
from evaluate.scoring import Score, pass_at
from evaluate.tasks import Task

ROOT = Path(__file__).resolve().parent.parent
RUN = ["--allow_code_execution", "--weak_sandbox"]
Problem = dict[str, Any]


@pytest.fixture(scope="module")
def box() -> Sandbox:
    return Sandbox(timeout=20, jobs=2, weak=True)


@pytest.fixture
def scored(box: Sandbox, tmp_path: Path) -> Callable[..., Score]:
    def score(*rows: Problem, suite: str = "HumanEval") -> Score:
        return score_file(write_rows(tmp_path / "x.jsonl", list(rows)), suite, box)

    return score


def verdicts(score: Score) -> list[tuple[bool, bool]]:
    """(published, robust) of each row's first sample."""
    return [(row.published[0].is_correct, row.robust[0].is_correct) for row in score.rows]


def whole(problem: Problem) -> str:
    return problem["prompt"] + problem["canonical_solution"]


def without_imports(problem: Problem) -> str:
    """The function alone: no import, no other function of the prompt."""
    return whole(problem)[whole(problem).index(f"def {problem['entry_point']}(") :]


def block(code: str) -> str:
    return f"```python\n{code}```\n"


# Right answers under the robust rule. The published one takes the text untouched: these four alone are right there.
RAW = ("whole", "whole, stripped", "without imports", "continuation")
FORMS: dict[str, Callable[[Problem], str]] = {
    "whole": whole,
    "whole, stripped": lambda p: whole(p).strip(),
    "without imports": without_imports,
    "continuation": lambda p: p["canonical_solution"],
    "continuation, stripped": lambda p: p["canonical_solution"].strip(),
    "block": lambda p: f"Here it is:\n\n{block(whole(p))}It works.",
    "block without imports": lambda p: block(without_imports(p)),
    "block of a continuation": lambda p: f"```\n{p['canonical_solution']}```",
    "unclosed block": lambda p: f"Sure!\n```py\n{whole(p)}",
    "continuation, then another function": lambda p: p["canonical_solution"] + "\ndef g(:\n",
    "continuation, then a call": lambda p: p["canonical_solution"] + "\nprint(1 / 0)\n",
    "second block": lambda p: f"```bash\npip install x\n```\n{block(whole(p))}",
    "words around": lambda p: f"Sure! That's it:\n\n{whole(p)}\nIt isn't hard.",
    "words after a continuation": lambda p: f"{p['canonical_solution']}\nThat's it.",
    "continuation, then a fence": lambda p: f"{p['canonical_solution']}```\nThat's it.",
    "dedented": lambda p: textwrap.dedent(p["canonical_solution"]),
    "other indentation": lambda p: textwrap.indent(textwrap.dedent(p["canonical_solution"]), " "),
    "run-on": lambda p: f"{whole(p)}\n### Instruction:\nAdd.\n\n### Response:\nx = 1 +",
    "run-on of a continuation": lambda p: p["canonical_solution"] + "\n### Input:\nprint(",
    "a chat's end": lambda p: f"{whole(p).rstrip()}<|eot_id|>user",
    "a demonstration": lambda p: f"{whole(p)}\nprint({p['entry_point']}(input()))\nassert False\n",
    "cut off": lambda p: f"{whole(p)}\n\ndef main():\n    print('a",
    "windows": lambda p: block(whole(p)).replace("\n", "\r\n").replace("\r\r", "\r"),
    "stub": lambda p: f"{block(p['prompt'] + '    pass')}Filled in:\n{block(whole(p))}",
    "dots": lambda p: block(p["prompt"] + "    ...") + block(whole(p)),
    "docstring": lambda p: block(p["prompt"]) + block(whole(p)),
    "docstring, then a continuation": lambda p: block(p["prompt"]) + block(p["canonical_solution"]),
    "not implemented": lambda p: block(p["prompt"] + "    raise NotImplementedError('yet')") + block(whole(p)),
    "stub behind": lambda p: block(whole(p)) + f"for\n{block(p['prompt'])}",
    "stub in the same block": lambda p: block(f"{p['prompt']}    pass\n\n\n{whole(p)}"),
    "correction": lambda p: f"{block(broken(p['prompt'] + p['canonical_solution']))}No:\n{block(whole(p))}",
    "correction, then cut off": lambda p: block(whole(p)) + f"Shorter:\n```\n{p['prompt']}    return 1 +",
    "thinking": lambda p: f"<think>\n{block(broken(whole(p))) * 100}no</think>\n<think></think>{block(whole(p))}",
    "indented block": lambda p: f"Solution:\n\n{textwrap.indent(whole(p), '    ')}\nIt works.",
    "quoted block": lambda p: "Solution:\n" + textwrap.indent(whole(p), "> ", lambda line: True),
    "a fence on a code line": lambda p: f"```python\n{whole(p).rstrip()}```\nIt works.",
    "fences on code lines": lambda p: f"It is ```{whole(p).strip()}```.",
}


def broken(code: str) -> str:
    """A function whose last line raises an error instead of returning."""
    return code.rpartition("return")[0] + "raise KeyError('broken')\n"


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_right_answer(scored: Callable[..., Score], form: str) -> None:
    score = scored(*(predicted(problem, FORMS[form](problem)) for problem in PROBLEMS[:3]))
    assert verdicts(score) == [(form in RAW, True)] * 3


@pytest.mark.parametrize(
    ("text", "why"),  # under the robust rule; "" where no answer is seen
    [
        ("", ""),
        (" \n\t", ""),
        ("<think>\n    return 6", ""),
        ("I cannot do that.", "SyntaxError: "),
        ("    return None", "AssertionError"),
        (broken("    return 6"), "KeyError: 'broken'"),
        (broken(whole(PROBLEMS[0])), "KeyError: 'broken'"),
        ("pass", "AssertionError"),
        ("return None or", "SyntaxError: invalid syntax"),
        ("def other(values):\n    return 6", "AssertionError"),
        ("    import os\n    os._exit(0)", "ended before the tests did: exit status 0"),
        ("import sys\nsys.exit()", "SystemExit"),
        ("def check(candidate):\n    pass\ndef total(values):\n    return 0", "AssertionError"),
        ("def total(values):\n    return Total()\nclass Total:\n    pass", "AssertionError"),
        ("\0", "SyntaxError: source code string cannot contain null bytes"),
        ("\ud800", "UnicodeEncodeError: 'utf-8' codec can't encode character '\\ud800'"),
    ],
)
def test_wrong_answers(scored: Callable[..., Score], text: str, why: str) -> None:
    score = scored(predicted(PROBLEMS[0], text))
    assert verdicts(score) == [(False, False)] and score.rows[0].robust[0].why.startswith(why)
    assert (score.robust.missing, score.published.missing) == (why == "", not text.strip())


def test_what_is_run() -> None:
    total = PROBLEMS[0]
    text = f"Sure:\n{without_imports(total)}\nresult = total([2])\nprint(result)\n### Response:\nmore"
    assert extract_code.published(text, total["prompt"], "total") == (total["prompt"] + text,)
    assert extract_code.robust(text, total["prompt"], "total") == (
        "from typing import List\n",
        without_imports(total).rstrip("\n"),
    )
    # What a function uses stays, calls included, and comes from other blocks.
    text = "import random\ndef f(x):\n    return TABLE[x] + random.random()\n"
    used = "random.seed(3)\nTABLE = dict()\nfor n in range(9):\n    TABLE[n] = f(n)\n"
    shown = "print(f(3))\nassert TABLE\nresult = f(1)\n"
    assert extract_code.robust(text + used + shown, "", "f") == ((text + used).rstrip("\n"),)
    blocks = ["import math", "def g(x):\n    return math.floor(x)", "def f(x):\n    return g(x) % MOD", "y = f(1)"]
    [code] = extract_code.robust("MOD = 7\nA constant.\n" + "So\n".join(map(block, blocks)), "", "f")
    assert re.findall(r"^\w.*", code, re.M) == ["MOD = 7", "import math", "def g(x):", "def f(x):"]


def test_mbpp(scored: Callable[..., Score]) -> None:
    answers: dict[tuple[bool, bool], Callable[[str], str]] = {
        (True, True): lambda code: code,
        (False, True): lambda code: f"Sure!\n{block(f'{code}print(input())')}",
        (False, False): lambda code: code.replace("def ", "def x"),
    }
    for expected, answer in answers.items():
        rows = [predicted(problem, answer(problem["code"])) for problem in MBPP]
        assert verdicts(scored(*rows, suite="MBPP")) == [expected] * 3


def test_the_published_time_limit(scored: Callable[..., Score], monkeypatch: pytest.MonkeyPatch) -> None:
    assert TASKS["HumanEval"].published("x", PROBLEMS[0]).candidates[0].seconds == 3
    slow = "import time\nwhile time.process_time() < 2.2:\n    pass\n" + MBPP[0]["code"]
    monkeypatch.setattr(extract_code, "PUBLISHED_SECONDS", 1)
    monkeypatch.setitem(TASKS, "MBPP", Task("MBPP", 500, "code", *extract_code.rules(extract_code.read_mbpp)))
    score = scored(predicted(MBPP[0], slow), suite="MBPP")
    assert verdicts(score) == [(False, True)] and score.rows[0].published[0].why == "timeout"


def test_pass_at_k_is_the_share_of_draws_with_a_passing_sample() -> None:
    for samples, passed in itertools.product(range(1, 7), range(7)):
        for k in range(1, samples + 1) if passed <= samples else ():
            draws = list(itertools.combinations(range(samples), k))
            share = sum(any(sample < passed for sample in draw) for draw in draws) / len(draws)
            assert pass_at(k, samples, passed) == pytest.approx(share)


def test_samples(scored: Callable[..., Score], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    right, wrong = "    return max(words, key=len) if words else None", "    return 1"
    rows = [predicted(PROBLEMS[3], [right] * n + [wrong] * (10 - n)) for n in (0, 1, 10)]
    path, saved = write_rows(tmp_path / "HumanEval.jsonl", rows), tmp_path / "scores.json"
    main(["--predict_file", str(path), *RUN, "--save_path", str(saved)])
    suite = json.loads(saved.read_text())["suites"]["HumanEval"]
    expected = {"1": 1.1 / 3, "5": 1.5 / 3, "10": 2 / 3}
    for rule in ("published", "robust"):
        assert suite["pass_at"][rule] == pytest.approx({k: 100 * share for k, share in expected.items()})
        assert suite[rule]["percent"] == pytest.approx(suite["pass_at"][rule]["1"])
        assert set(suite[rule]) == {"percent", "half_width", "missing"}
    out = capsys.readouterr().out.splitlines()
    shares = [line.split() for line in out[2:5]]
    assert shares == [[f"pass@{k}", f"{100 * share:.2f}", f"{100 * share:.2f}"] for k, share in expected.items()]
    assert out[2].index("36.67") == out[1].index("36.67")
    uneven = [predicted(PROBLEMS[3], [right] * n) for n in (5, 6)]
    assert scored(*uneven).pass_at("robust") == {1: 100.0}
    main(["--predict_file", str(write_rows(tmp_path / "x.jsonl", uneven)), *RUN], "HumanEval")
    assert "not as many samples in every row, so that only pass@1 is known" in capsys.readouterr().out


def test_verdicts_and_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [predicted(PROBLEMS[3], "    return 1"), predicted(PROBLEMS[0], [whole(PROBLEMS[0]), ""])]
    path, saved = write_rows(tmp_path / "humaneval.jsonl", rows), tmp_path / "verdicts.jsonl"
    main(["--predict_file", str(path), *RUN, "--show", "2", "--verdicts", str(saved)])
    out = capsys.readouterr().out
    assert "--- HumanEval line 1: task_id 'Made/3'; published AssertionError (wrong), robust AssertionError (w" in out
    assert "  ran\n    def longest(words):\n" in out and "        return 1\n" in out
    assert "sample 1: task_id 'Made/0'; published passed (right), robust passed (right)" in out
    first, second = [json.loads(line) for line in saved.read_text().splitlines()]
    assert first["task_id"] == "Made/3" and "answer" not in first and first["generate"] == "    return 1"
    code = PROBLEMS[3]["prompt"] + "    return 1"
    assert first["published"] == {"found": code, "right": False, "why": "AssertionError"}
    assert second["robust"][1] == {"found": None, "right": False}
    assert (second["robust"][0]["right"], second["robust"][0]["why"]) == (True, "passed")


def test_nothing_is_run_without_consent(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "HumanEval.jsonl", [predicted(problem, whole(problem)) for problem in PROBLEMS])
    with pytest.raises(ValueError, match="HumanEval runs generated code: allow it by score_file.*sandbox=Sandbox"):
        score_file(path)
    # Consent on a suite that runs nothing is no mistake: one command line serves all.
    sums = write_rows(tmp_path / "AddSub.jsonl", [{"answer": "4", "generate": "4"}])
    main(["--predict_file", str(sums), "--allow_code_execution"], "AddSub")
    command = [sys.executable, "-W", "error", "-m", "evaluate.humaneval", "--predict_file", str(path)]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (refused.returncode, refused.stdout) == (2, "") and "allow it with --allow_code" in refused.stderr
    done = subprocess.run([*command, *RUN], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1].split()[:5] == ["HumanEval", "5", "of", "164", "100.00"]


TEXT, TEXTS = "must be text, not", "expected a list of at least one text, got"


@pytest.mark.parametrize(
    ("suite", "field", "value", "message"),  # a value of ... : the field is missing
    [
        ("HumanEval", "prompt", None, f"{TEXT} NoneType"),
        ("HumanEval", "prompt", ..., "is missing"),
        ("HumanEval", "test", 3, f"{TEXT} int"),
        ("HumanEval", "entry_point", "f(x); import os", "expected the name of a function, got 'f("),
        ("HumanEval", "generate", 4, f"{TEXT} int"),
        ("MBPP", "code", ..., "is missing"),
        ("MBPP", "test_list", "assert True", f"{TEXTS} 'assert True'"),
        ("MBPP", "test_list", [], f"{TEXTS} []"),
        ("MBPP", "test_list", ..., f"{TEXTS} None"),
        ("MBPP", "test_imports", "import re", f"{TEXTS} 'import re'"),
        ("MBPP", "test_setup_code", [], f"{TEXT} list"),
    ],
)
def test_bad_rows_are_named(scored: Callable[..., Score], suite: str, field: str, value: Any, message: str) -> None:
    good = predicted((PROBLEMS if suite == "HumanEval" else MBPP)[0], "")
    bad = {name: value for name, value in (good | {field: value}).items() if value is not ...}
    with pytest.raises(ValueError, match=rf"x\.jsonl: line 2: field '{field}'.*{re.escape(message)}"):
        scored(good, bad, suite=suite)


PIECES = (
    "def total(x):\n|    return x\n|return x|```|```python\n|\n| |    |\t|print(1)\n|### Response:\n|class A:\n|'''"
)
PIECES += "|\"|(|#|\\|\r\n|\0|import os\n|x = 1\n|if __name__ == '__main__':\n|@x\n|\ud800|<think>|</think>|> "
PIECES += "|for i in x:\n|from x|async |½|Here it is:\n|total = 1|total = lambda x: x\n|global y\n|pass"


@settings(deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES.split("|"))).map("".join)))
def test_every_text_is_read(text: str) -> None:
    for prompt, name in ((PROBLEMS[0]["prompt"], "total"), ("", "total"), ("", None)):
        assert extract_code.published(text, prompt, name) == ((prompt + text,) if text.strip() else ())
        assert extract_code.robust(text, prompt, name) or not text.strip() or "<" in text or "#" in text


@pytest.mark.parametrize(
    "piece",
    ["(", "[", "-", "x.", "```\n", "```\nx\n", " ", "\n", "def f(x):\n", "a = 1\n", "'''", "lambda:", "@x\n", "> "],
)
def test_long_texts_are_read(piece: str) -> None:
    for name in ("f", "g", None):
        extract_code.robust(piece * (50_000 // len(piece)), "def f(x):\n", name)
