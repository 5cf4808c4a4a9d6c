"""The commonsense tasks: what their metrics extract, published rows as predictions, their names, and their mean."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from code_rows import LISTED, RUN_ON, answers, extracted, write_rows
from evaluate import TASKS, score_file
from evaluate.__main__ import main
from evaluate.report import mean
from evaluate.tasks import task_named, task_of_file

SAMPLE = Path(__file__).resolve().parent / "data" / "commonsense_suites"
SUITES = ("BoolQ", "PIQA", "SIQA", "HellaSwag", "WinoGrande", "ARC-c", "ARC-e", "OBQA")
PROBLEMS = (3270, 1838, 1954, 10042, 1267, 1172, 2376, 500)
INSTRUCTIONS = {
    "BoolQ": "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false",
    "PIQA": "Please choose the correct solution to the question: How?\n\nSolution1: Use a saw.\n\nSolution2: Use soup."
    "\n\nAnswer format: solution1/solution2",
    "SIQA": "Please choose the correct answer to the question: Why?\n\nAnswer1: make a new plan Answer2: Go home"
    " Answer3: 2\n\nAnswer format: answer1/answer2/answer3",
    "OBQA": "Please choose the correct answer to the question: Why?\n\nAnswer1: make a new plan Answer2: Go home"
    " Answer3: stay\n\nAnswer format: answer1/answer2/answer3",
    "HellaSwag": "Please choose the correct ending to complete the given sentence: He\n\nEnding1: sits. Ending2: runs."
    " Ending3: is seen. Ending4: flies.\n\nAnswer format: ending1/ending2/ending3/ending4",
    "WinoGrande": "Please choose the correct answer to fill in the blank to complete the given sentence: _ won.\n\n"
    "Option1: Sarah Option2: Maria Answer format: option1/option2",
    "ARC-e": "Please choose the correct answer to the question: What?\n\nAnswer1: 3 grams Answer2: the Moon\n\n"
    "Answer format: answer1/answer2",
}
WORDS = {  # the keyword, how many the row lists
    "PIQA": ("solution", 2),
    "SIQA": ("answer", 3),
    "HellaSwag": ("ending", 4),
    "WinoGrande": ("option", 2),
    "ARC-c": ("answer", 4),
    "ARC-e": ("answer", 4),
    "OBQA": ("answer", 4),
}
# (text, what the published metric extracts, what the robust one does)
TRUTH = [
    ("the correct answer is true", "true", "true"),
    ("True.", None, "true"),
    ("FALSE", None, "false"),
    ("Answer: B", None, None),
    ("It is not true that it is.", "true", "false"),
    ("False, as it would be true of the Moon.", "true", "false"),
    ("True or false?", "false", None),
    (f"True.{RUN_ON}the correct answer is false", "false", "true"),
    (f"the correct answer is true{RUN_ON}false", "true", "true"),
    ("untrue", "true", None),
    ("I don't know.", None, None),
    ("", None, None),
]
KEYWORDS = [  # {0} is the suite's keyword, {1} the same with a capital
    ("{1}2.", None, 2),
    ("{1} 2", None, 2),
    ("**{1} #2**", None, 2),
    ("The answer is 2.", None, 2),
    ("The answer is 1,000 km.", None, 2),
    ("The answer is 2 km.", None, None),
    ("{0}1 is wrong, so {0}2", 1, 2),
    ("I think it's {0}2, since {0}1 makes no sense", 2, 2),
    ("not {0}1 but {0}2", 1, 2),
    ("Answer: B", None, None),
    ("True.", None, None),
    ("the correct answer is {0}2" + RUN_ON + "the correct answer is {0}1", 2, 2),
    ("{1} 2" + RUN_ON + "the correct answer is {0}1", 1, 2),
    ("{1} 2\n\nPlease choose the correct answer to the question: Why? {0}1", 1, 2),
    ("the correct answer is {0}9", None, None),
    ("I don't know.", None, None),
    ("", None, None),
]


@pytest.mark.parametrize(("text", "published", "robust"), TRUTH)
def test_truth(text: str, published: str | None, robust: str | None) -> None:
    assert extracted("BoolQ", "published", text, INSTRUCTIONS["BoolQ"]) == published
    assert extracted("BoolQ", "robust", text, INSTRUCTIONS["BoolQ"]) == robust


@pytest.mark.parametrize("task", WORDS)
@pytest.mark.parametrize(("text", "published", "robust"), KEYWORDS)
def test_keywords(task: str, text: str, published: int | None, robust: int | None) -> None:
    word, count = WORDS[task]
    listed = " ".join(f"{word.capitalize()}{n}: {LISTED[n - 1]}" for n in range(1, count + 1))
    instruction = f"Which?\n\n{listed}\n\nAnswer format: {'/'.join(f'{word}{n}' for n in range(1, count + 1))}"
    for metric, number in (("published", published), ("robust", robust)):
        keyword = extracted(task, metric, text.format(word, word.capitalize()), instruction)
        assert keyword == (f"{word}{number}" if number else None)


def test_the_suites_are_the_papers() -> None:
    tasks = {name: task.problems for name, task in TASKS.items() if task.family == "commonsense"}
    assert tasks == dict(zip(SUITES, PROBLEMS, strict=True)) and set(tasks) == {"BoolQ", *WORDS}


@pytest.mark.parametrize(
    ("task", "text", "keyword"),
    [
        ("BoolQ", "the correct answer is true", "true"),
        ("BoolQ", "it is untrue, so false", "true"),  # inside a word
        ("BoolQ", "not true, so false", "true"),
        ("BoolQ", "True", None),
        ("PIQA", "solution12", "solution1"),
        ("PIQA", "answer1", None),
        ("SIQA", "not answer5 but answer2", "answer5"),  # the pattern of all suites with this word, whatever they list
        ("OBQA", "answer5", "answer5"),
        ("ARC-c", "answer6, answer5", "answer5"),
        ("HellaSwag", "ending5 ending4", "ending4"),
        ("WinoGrande", "Option1 or option2", "option2"),
        ("WinoGrande", "x\n\n### Instruction:\noption1", "option1"),  # a run-on counts
        ("WinoGrande", "option 1", None),
        ("WinoGrande", "", None),
    ],
)
def test_published(task: str, text: str, keyword: str | None) -> None:
    assert extracted(task, "published", text, INSTRUCTIONS.get(task, "")) == keyword


@pytest.mark.parametrize(("task", "text", "keyword"), answers("keywords"))
def test_robust(task: str, text: str, keyword: str | None) -> None:
    assert extracted(task, "robust", text, INSTRUCTIONS.get(task, "")) == keyword


@pytest.mark.parametrize("path", sorted(SAMPLE.glob("*.jsonl")), ids=lambda path: path.stem)
def test_published_rows(path: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    score = score_file(write_rows(tmp_path / path.name, [row | {"generate": row["output"]} for row in rows]))
    assert len(rows) >= 2 and score.task.name == path.stem
    assert score.published.percent == score.robust.percent == 100.0
    shouted = write_rows(tmp_path / path.name, [row | {"generate": row["output"].upper()} for row in rows])
    assert (score_file(shouted).published.percent, score_file(shouted).robust.percent) == (0.0, 100.0)


def test_an_option_of_a_published_row_can_be_stated_in_its_words() -> None:
    row = json.loads((SAMPLE / "WinoGrande.jsonl").read_text(encoding="utf-8").splitlines()[0])
    options = row["instruction"].split("Option1: ")[1].split(" Answer format")[0].split(" Option2: ")
    for number, words in enumerate(options, 1):
        assert extracted("WinoGrande", "robust", f"The answer is {words}.", row["instruction"]) == f"option{number}"


SPELLINGS = {
    "boolq": "BoolQ",
    "social_i_qa SocialIQA siqa": "SIQA",
    "winogrande": "WinoGrande",
    "arc_c ARC-Challenge": "ARC-c",
    "arc_e ARC-Easy arc_easy": "ARC-e",
    "obqa openbookqa": "OBQA",
}


def test_spellings() -> None:
    for spellings, name in SPELLINGS.items():
        for spelling in spellings.split():
            assert task_named(spelling).name == task_of_file(f"OUT/{spelling}.seed1.jsonl").name == name


@pytest.mark.parametrize(
    ("task", "answer", "expected"),
    [
        ("BoolQ", True, "one of true, false, got True"),
        ("BoolQ", "True", "one of true, false, got 'True'"),
        ("PIQA", "solution3", "one of solution1, solution2, got 'solution3'"),
        ("SIQA", "answer4", "one of answer1, answer2, answer3, got 'answer4'"),
        ("HellaSwag", 1, "one of ending1, ending2, ending3, ending4, got 1"),
        ("WinoGrande", "option1 ", "one of option1, option2, got 'option1 '"),
        ("ARC-c", "answer6", "answer5, got 'answer6'"),
        ("OBQA", ["answer1"], "answer4, got ['answer1']"),
    ],
)
def test_other_answers_are_refused(tmp_path: Path, task: str, answer: object, expected: str) -> None:
    path = write_rows(tmp_path / "x.jsonl", [{"answer": answer, "generate": "answer1"}])
    with pytest.raises(ValueError) as refused:
        score_file(path, task)
    assert str(refused.value).startswith(f"{path}: line 1: field 'answer': {task} expects one of ")
    assert str(refused.value).endswith(expected)


def test_families_have_means_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = {"AddSub": ("4", "4"), "BoolQ": ("true", "True"), "SVAMP": ("4", "5"), "PIQA": ("solution1", "solution1")}
    files = [
        str(write_rows(tmp_path / f"{name}.jsonl", [{"answer": answer, "generate": text}]))
        for name, (answer, text) in answers.items()
    ]
    saved = tmp_path / "scores.json"
    main(["--predict_files", *files, "--save_path", str(saved)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:7]] == [*answers, "mean, math", "mean, commonsense"]
    assert lines[5].split()[2] == lines[5].split()[5] == "50.00"  # published, robust
    assert (lines[6].split()[2], lines[6].split()[5]) == ("50.00", "100.00")
    scores = json.loads(saved.read_text(encoding="utf-8"))
    assert scores["mean"]["robust"]["percent"] == 75.0  # of all four, as its key has always been
    assert scores["families"]["math"]["suites"] == ["AddSub", "SVAMP"]
    assert scores["families"]["commonsense"]["suites"] == ["BoolQ", "PIQA"]
    assert scores["families"]["commonsense"]["mean"]["robust"]["percent"] == 100.0
    half_width = mean([score_file(files[0]), score_file(files[2])], "robust")[1]
    assert scores["families"]["math"]["mean"]["robust"] == {"percent": 50.0, "half_width": half_width}


def test_one_suite_of_a_family_has_no_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    addsub = write_rows(tmp_path / "AddSub.jsonl", [{"answer": "4", "generate": "4"}])
    boolq = write_rows(tmp_path / "boolq.jsonl", [{"answer": "true", "generate": "true"}])
    main(["--predict_files", str(addsub), str(boolq)])
    assert "mean" not in capsys.readouterr().out


PIECES = "answer is |Answer:|### |\\boxed{|}|true|False|yes|answer2|Answer 1|solution1|(2)"
PIECES += "|not | is wrong| or |, |/|.|:| |\n|3|٣|**"


@settings(deadline=None)
@given(
    st.one_of(st.text(), st.lists(st.sampled_from([*PIECES.split("|"), "\ud800", "I choose ", " than "])).map("".join))
)
def test_what_is_extracted_is_an_option(text: str) -> None:
    for name, options in (("BoolQ", ("true", "false")), ("SIQA", ("answer1", "answer2", "answer3"))):
        assert extracted(name, "robust", text, INSTRUCTIONS[name]) in (None, *options)


LONG = "answer1 or |answer9|not |n't that it |whether |the |answer is |Answer: |the answer is the |true/|(|I choose "


@pytest.mark.parametrize("piece", LONG.split("|"))
def test_long_texts_get_a_score(piece: str) -> None:
    for name in ("BoolQ", "SIQA"):
        text = piece * (50_000 // len(piece))
        assert extracted(name, "robust", text, INSTRUCTIONS[name]) in (None, "true", "answer1")
