"""What both rules take from a text in words: tables of answers (data/answers), and the rows of published suites."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from code_rows import answers, write_rows
from evaluate import TASKS, score_file
from evaluate.statements import FORMS, REWRITES, normalize, statements
from evaluate.tasks import task_named, task_of_file

DATA = Path(__file__).resolve().parent / "data"
INSTRUCTIONS = json.loads((DATA / "answers" / "instructions.json").read_text(encoding="utf-8"))
BOTH = json.loads((DATA / "answers" / "both_rules.json").read_text(encoding="utf-8"))


def extracted(task: str, rule: str, text: str, instruction: str | None = None) -> Any:
    """The first candidate that a rule takes from a text, None where it sees no answer."""
    row = {"instruction": INSTRUCTIONS.get(task, "") if instruction is None else instruction}
    extraction = getattr(TASKS[task], rule)(text, row)
    return extraction.candidates[0] if extraction else None


def is_correct(task: str, rule: str, text: str, answer: object) -> bool:
    extraction = getattr(TASKS[task], rule)(text, {"instruction": INSTRUCTIONS.get(task, "")})
    return extraction is not None and extraction.is_correct(TASKS[task].read_answer(answer))


@pytest.mark.parametrize(("pattern", "replacement", "example", "result"), REWRITES)
def test_rewrites(pattern: str, replacement: str, example: str, result: str) -> None:
    assert normalize(example) == result != example


@pytest.mark.parametrize(("rank", "label", "pattern", "example"), FORMS)
def test_forms_of_statements(rank: int, label: bool, pattern: str, example: str) -> None:
    first = statements(example)[0]
    assert (first.tail, first.label) == ("18", label)


@pytest.mark.parametrize(("task", "text", "answer"), answers("published"))
def test_published(task: str, text: str, answer: object) -> None:
    assert extracted(task, "published", text) == answer


@pytest.mark.parametrize("table", BOTH, ids=lambda table: " ".join(table["suites"]))
def test_both_rules(table: dict[str, Any]) -> None:
    for task in table["suites"]:
        for text, *both in table["answers"]:
            taken = [extracted(task, rule, text, table["instruction"]) for rule in ("published", "robust")]
            assert taken == both, (task, text)


@pytest.mark.parametrize(("text", "answer"), answers("numbers"))
def test_numbers(text: str, answer: float | None) -> None:
    is_right = (
        extracted("GSM8K", "robust", text) is None if answer is None else is_correct("GSM8K", "robust", text, answer)
    )
    assert is_right


@pytest.mark.parametrize(
    ("task", "text", "answer"), [*(("AQuA", text, letter) for text, letter in answers("letters")), *answers("keywords")]
)
def test_choices(task: str, text: str, answer: str | None) -> None:
    assert extracted(task, "robust", text) == answer


@pytest.mark.parametrize(
    ("text", "answer", "correct"),
    [
        ("The answer is 50%.", "0.5", True),
        ("So 1/2", "0.5", True),
        ("The answer is $0.50 or 50 cents.", "0.5", True),
        ("The answer is .5", "0.5", True),
        ("The answer is 0.502.", "0.5", False),
        ("The answer is 0.01.", "0.014", False),  # too short for a rounding
        ("The answer is 9.6.", "9.666666666666666", False),
        ("The answer is 1e999.", "5", False),
        ("The answer is 5/0.", "0", False),
        ("7 - 3 = 4\n### Next\n9", "9", False),
        ("H2O", "2", False),
        ("5-3", "-3", False),
    ],
)
def test_what_a_number_is_compared_with(text: str, answer: str, correct: bool) -> None:
    assert is_correct("SVAMP", "robust", text, answer) is correct


# rows, and the numbers right under (published, robust), of the stored worked answers; commonsense's are all right
COUNTS = {"AddSub": (6, 6, 6), "AQuA": (12, 4, 6), "GSM8K": (11, 4, 5), "MultiArith": (4, 3, 3), "SingleEq": (6, 4, 5)}


@pytest.mark.parametrize("path", sorted(DATA.glob("*_suites/*.jsonl")), ids=lambda path: path.stem)
def test_published_rows(path: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    score = score_file(write_rows(tmp_path / path.name, [row | {"generate": row["output"]} for row in rows]))
    assert len(rows) >= 2 and score.task.name == path.stem
    shares = [round(rule.percent * len(rows) / 100, 9) for rule in (score.published, score.robust)]
    assert (len(rows), *shares) == COUNTS.get(path.stem, (len(rows), len(rows), len(rows)))
    if path.stem not in COUNTS:
        score = score_file(
            write_rows(tmp_path / path.name, [row | {"generate": row["output"].upper()} for row in rows])
        )
        assert (score.published.percent, score.robust.percent) == (0.0, 100.0)
    if path.stem == "WinoGrande":  # an option can be stated in its words
        options = rows[0]["instruction"].split("Option1: ")[1].split(" Answer format")[0].split(" Option2: ")
        for number, words in enumerate(options, 1):
            text = f"The answer is {words}."
            assert extracted("WinoGrande", "robust", text, rows[0]["instruction"]) == f"option{number}"


PROBLEMS = {"AddSub": 395, "AQuA": 254, "GSM8K": 1319, "MultiArith": 600, "SingleEq": 508, "SVAMP": 1000}
PROBLEMS |= {"BoolQ": 3270, "PIQA": 1838, "SIQA": 1954, "HellaSwag": 10042, "WinoGrande": 1267, "ARC-c": 1172}
PROBLEMS |= {"ARC-e": 2376, "OBQA": 500, "HumanEval": 164, "MBPP": 500}
SPELLINGS = {"BoolQ": "boolq", "SIQA": "social_i_qa SocialIQA siqa", "ARC-c": "arc_c ARC-Challenge"}
SPELLINGS |= {"ARC-e": "arc_e ARC-Easy arc_easy", "OBQA": "obqa openbookqa"}


def test_the_suites_are_the_papers() -> None:
    assert {name: task.problems for name, task in TASKS.items() if name != "demo"} == PROBLEMS
    for name, spellings in SPELLINGS.items():
        for spelling in spellings.split():
            assert task_named(spelling).name == task_of_file(f"OUT/{spelling}.seed1.jsonl").name == name


@pytest.mark.parametrize("value", ["4", "-4.0", "1,450", 4, 4.5, " 4 ", "0.16666666666666666", "1e3", "4."])
def test_numeric_answers_are_read(value: object) -> None:
    assert TASKS["AddSub"].read_answer(value) == float(str(value).replace(",", ""))


NO_NUMBERS = ("", "four", "1,45", "1 4", "inf", "nan", "1e999", "9" * 5000, int("9" * 400), True, None, [4], 1e999)


@pytest.mark.parametrize(
    ("task", "values", "expected"),
    [
        ("AddSub", NO_NUMBERS, "a finite number, got "),
        ("AQuA", ("a", "F", "AB", "", "(A)", 1, None), "one of A, B, C, D, E, got "),
        ("BoolQ", (True, "True"), "one of true, false, got "),
        ("PIQA", ("solution3",), "one of solution1, solution2, got 'solution3'"),
        ("SIQA", ("answer4",), "one of answer1, answer2, answer3, got 'answer4'"),
        ("HellaSwag", (1,), "one of ending1, ending2, ending3, ending4, got 1"),
        ("WinoGrande", ("option1 ",), "one of option1, option2, got 'option1 '"),
        ("ARC-c", ("answer6",), "answer5, got 'answer6'"),
        ("OBQA", (["answer1"],), r"answer4, got \['answer1'\]"),
    ],
)
def test_other_answers_are_refused(task: str, values: tuple, expected: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=f"^line 3: field 'answer': {task} expects .*{expected}"):
            TASKS[task].answer_of({"answer": value}, "line 3")


PIECES = "answer is |Answer:|####|### |\\boxed{|}|\\frac{1}{2}|1|12,345|.|-|/|^|e9|x10^|=| |\n|$|%|(A)|A|b|½|٣|²|_|**"
PIECES += "|dozen|0|true|False|yes|answer2|Answer 1|solution1|(2)|not | is wrong| or |, |:|\ud800|I choose | than "


@settings(deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES.split("|"))).map("".join)))
def test_every_text_gets_a_score(text: str) -> None:
    for task, answer in (("AddSub", 5), ("AQuA", "A"), ("BoolQ", "true"), ("SIQA", "answer1")):
        for rule in ("published", "robust"):
            assert is_correct(task, rule, text, answer) in (True, False)
    assert extracted("SIQA", "robust", text) in (None, "answer1", "answer2", "answer3")


LONG = "1|1,|123,456,|-|(|\\boxed{|the answer is |#### |A |1 or 2 |the answer is 1 - 1 x |wait, |A) a B) b |18 a (b "
LONG_WORDS = (
    "answer1 or |answer9|not |n't that it |whether |the |answer is |Answer: |the answer is the |true/|(|I choose "
)
ANSWERS, WORDS = {"AddSub": 5, "AQuA": "B"}, {"BoolQ": "false", "SIQA": "answer3"}


# int() refuses the first, float() makes it infinite; the others invite a regular expression to start over and over.
@pytest.mark.parametrize(
    ("piece", "wrong"), [(p, ANSWERS) for p in LONG.split("|")] + [(p, WORDS) for p in LONG_WORDS.split("|")]
)
def test_long_texts_get_a_score(piece: str, wrong: dict[str, object]) -> None:
    text = piece * ((1_000_000 if piece == "1" else 50_000) // len(piece))
    for task, answer in wrong.items():
        for rule in ("published", "robust"):
            assert not is_correct(task, rule, text, answer)
