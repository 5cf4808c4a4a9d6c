"""What the math tasks' two metrics extract from a text: tables of answers, here and in data/answers; published rows."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from code_rows import LISTED, RUN_ON, answers, extracted
from evaluate import TASKS
from evaluate.answer_statements import FORMS, Form, statements
from evaluate.normalize import REWRITES, Rewrite, normalize

SAMPLE = Path(__file__).resolve().parent / "data" / "math_suites"
NUMERIC = ("AddSub", "GSM8K", "MultiArith", "SingleEq", "SVAMP")
CHOICES = "How far? Answer Choices: (A) 60 m (B) 61 m (C) 62 m (D) $1,000 (E) None of these"


@pytest.mark.parametrize("rewrite", REWRITES, ids=lambda rewrite: rewrite.example)
def test_rewrites(rewrite: Rewrite) -> None:
    assert normalize(rewrite.example) == rewrite.result != rewrite.example


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.example)
def test_forms_of_statements(form: Form) -> None:
    first = statements(form.example)[0]
    assert (first.tail, first.label) == ("18", form.label)


def is_correct(task: str, metric: str, text: str, answer: object, instruction: str = "") -> bool:
    chosen = getattr(TASKS[task], metric)
    extraction = chosen.extract(text, {"instruction": instruction})
    return extraction is not None and chosen.is_correct(extraction, TASKS[task].read_answer(answer))


# (text, what the published metric extracts, what the robust one does)
NUMBERS = [
    ("The answer is 1,234.", 1234, 1234),
    ("The answer is $1,234.50.", 1234.5, 1234.5),
    ("The answer is 1 234 km.", 234, 1234),
    (r"$\boxed{1{,}234}$", 234, 1234),
    ("The area is 1,234 m^2", 2, 1234),
    ("The answer is 1,234 apples in 3 boxes.", 3, 1234),
    ("The answer is 1234 dollars and 0 cents.", 0, 1234),
    ("The answer is 5 1/2 hours.", 2, 5.5),
    ("Answer: 18", 18, 18),
    ("#### 18", 18, 18),
    (f"The answer is 18.{RUN_ON}The answer is 7.", 7, 18),
    ("The answer is 18.\nQ: Another one. The answer is 7.", 7, 18),
    ("Answer: B", None, None),
    ("", None, None),
]
LETTERS = [
    ("The answer is B.", "B", "B"),
    ("Answer: B", "A", "B"),
    ("answer: (b)", None, "B"),
    ("b", None, "B"),
    ("The answer is 1,000 km.", None, "B"),
    ("The answer is 1000.", None, "B"),
    ("The answer is the Moon.", None, "C"),
    ("As A is too small, the answer is option B.", "A", "B"),
    ("A train goes from A to B. I choose C", "A", "C"),
    ("The answer is either A or B.", "A", None),
    ("(A) or (B)", "A", None),
    (f"The answer is (B).{RUN_ON}The answer is (C).", "B", "B"),
    (f"b){RUN_ON}The answer is (C).", "C", "B"),
    ("True.", None, None),
    ("12", None, None),
    ("I don't know.", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("text", "published", "robust"), NUMBERS)
def test_numbers(text: str, published: float | None, robust: float | None) -> None:
    for task in NUMERIC:
        assert extracted(task, "published", text, "How many?") == published
        assert extracted(task, "robust", text, "How many?") == robust


@pytest.mark.parametrize(("text", "published", "robust"), LETTERS)
def test_letters(text: str, published: str | None, robust: str | None) -> None:
    choices = " ".join(f"({letter}) {value}" for letter, value in zip("ABCD", LISTED, strict=True))
    instruction = f"Which? Answer Choices: {choices}"
    assert extracted("AQuA", "published", text, instruction) == published
    assert extracted("AQuA", "robust", text, instruction) == robust


@pytest.mark.parametrize(
    ("text", "answer", "correct"),
    [
        ("4 of 5", "4", False),  # the last number, whatever it is
        ("The answer is 1,234.50.", "1234.5", True),
        ("It is 3,4", "34", True),  # commas go first
        ("The answer is 4. It took 2 steps", "4", False),
        ("7 - 3 = 4\n\n### Instruction:\nAdd 8 and 9.", "9", True),  # a run-on counts
        ("\u22125", "5", True),  # only the ASCII minus is one
        ("0.5005", "0.5", True),
        ("", "0", False),
    ],
)
def test_numbers_published(text: str, answer: str, correct: bool) -> None:
    assert is_correct("GSM8K", "published", text, answer) is correct


@pytest.mark.parametrize(("text", "answer"), answers("numbers"))
def test_numbers_robust(text: str, answer: float | None) -> None:
    extraction = TASKS["GSM8K"].robust.extract(text, {})
    assert is_correct("GSM8K", "robust", text, answer) if answer is not None else extraction is None


@pytest.mark.parametrize(
    "text", ["The answer is 50%.", "So 1/2", "The answer is $0.50 or 50 cents.", "The answer is .5"]
)
def test_a_half_in_other_words(text: str) -> None:
    assert is_correct("SVAMP", "robust", text, "0.5")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("H2O", "2"),
        ("7 - 3 = 4\n### Next\n9", "9"),
        ("5-3", "-3"),
        ("The answer is 0.502.", "0.5"),
        ("The answer is 0.01.", "0.014"),  # too short for a rounding
        ("The answer is 9.6.", "9.666666666666666"),
        ("The answer is 1e999.", "5"),
        ("The answer is 5/0.", "0"),
    ],
)
def test_numbers_robust_wrong(text: str, answer: str) -> None:
    assert not is_correct("GSM8K", "robust", text, answer)


@pytest.mark.parametrize(
    ("text", "letter"),
    [("Answer: B", "A"), ("the answer is (D).", "D"), ("10C2 is 45, so B", "C"), ("(b)", None), ("", None)],
)
def test_letters_published(text: str, letter: str | None) -> None:
    assert extracted("AQuA", "published", text, CHOICES) == letter


@pytest.mark.parametrize(("text", "letter"), answers("letters"))
def test_letters_robust(text: str, letter: str | None) -> None:
    assert extracted("AQuA", "robust", text, CHOICES) == letter


@pytest.mark.parametrize(("text", "letter"), [("The answer is E.", None), ("E", None), ("The answer is (D).", "D")])
def test_only_letters_that_the_row_lists(text: str, letter: str | None) -> None:
    assert extracted("AQuA", "robust", text, "Which? Answer Choices: (A) 1 (B) 2 (C) 3 (D) 4") == letter


def test_a_value_that_two_choices_have_names_none() -> None:
    choices = "Which? Answer Choices: (A) 5 m (B) 5 km (C) 6 m"
    assert extracted("AQuA", "robust", "The answer is 5.", choices) is None
    assert extracted("AQuA", "robust", "The answer is 5 km.", choices) == "B"


# rows, and the numbers right under (published, robust), of the stored worked answers
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("AddSub", (6, 6, 6)),
        ("AQuA", (12, 4, 6)),
        ("GSM8K", (11, 4, 5)),
        ("MultiArith", (4, 3, 3)),
        ("SingleEq", (6, 4, 5)),
    ],
)
def test_published_rows(name: str, counts: tuple[int, int, int]) -> None:
    rows = [json.loads(line) for line in (SAMPLE / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    correct = [
        sum(is_correct(name, metric, row["output"], row["answer"], row["instruction"]) for row in rows)
        for metric in ("published", "robust")
    ]
    assert (len(rows), *correct) == counts


def test_the_tasks_are_the_papers() -> None:
    sizes = {"AddSub": 395, "AQuA": 254, "GSM8K": 1319, "MultiArith": 600, "SingleEq": 508, "SVAMP": 1000}
    assert {name: task.problems for name, task in TASKS.items() if task.family == "math"} == sizes
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize("value", ["4", "-4.0", "1,450", 4, 4.5, " 4 ", "0.16666666666666666", "1e3", "4."])
def test_numeric_answers_are_read(value: object) -> None:
    assert TASKS["AddSub"].read_answer(value) == float(str(value).replace(",", ""))


@pytest.mark.parametrize(
    "value", ["", "four", "1,45", "1 4", "inf", "nan", "1e999", "9" * 5000, True, None, [4], 1e999]
)
def test_other_answers_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="a finite number, got "):
        TASKS["AddSub"].read_answer(value)


@pytest.mark.parametrize("value", ["a", "F", "AB", "", "(A)", 1, None])
def test_other_letters_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="one letter A to E, got "):
        TASKS["AQuA"].read_answer(value)


PIECES = "answer is |Answer:|####|### |\\boxed{|}|\\frac{1}{2}|1|12,345|.|-|/|^|e9"
PIECES += "|x10^|=| |\n|$|%|(A)|A|b|½|٣|²|_|**|dozen|0"


@settings(deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from([*PIECES.split("|"), "\ud800"])).map("".join)))
def test_every_text_gets_a_score(text: str) -> None:
    for name, answer in (("AddSub", 5), ("AQuA", "A")):
        for metric in ("published", "robust"):
            assert is_correct(name, metric, text, answer, CHOICES) in (True, False)


LONG = "1|1,|123,456,|-|(|\\boxed{|the answer is |#### |A |1 or 2 |the answer is 1 - 1 x |wait, |A) a B) b |18 a (b "


# int() refuses the first, float() makes it infinite; the others invite a regular expression to start over and over.
@pytest.mark.parametrize("piece", LONG.split("|"))
def test_long_texts_get_a_score(piece: str) -> None:
    for name, answer in (("AddSub", 5), ("AQuA", "B")):
        for metric in ("published", "robust"):
            assert not is_correct(name, metric, piece * ((1_000_000 if piece == "1" else 50_000) // len(piece)), answer)
