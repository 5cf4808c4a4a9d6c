"""Contamination: test questions are found among other rows word for word and edited, not by a shared wording alone."""

import json
import random

import pytest

from commands import refused, run, train_flags, write_rows
from corpus import contamination
from corpus.contamination import compare, find_matches, list_test_files, parse_question
from training.config import parse_flags
from training.resume import merge_with_previous_run

STAMPS = (
    "Max bought 16 snowflake stamps at the post office. He bought 3 more truck stamps than snowflake stamps, and 9 "
    "fewer rose stamps than truck stamps. How many stamps did Max buy in all?"
)
ARC = "Please choose the correct answer to the question: {}\n\nAnswer1: {} Answer2: {} Answer3: {} Answer4: {}\n\n"
ARC += "Answer format: answer1/answer2/answer3/answer4"
BOOLQ = "Please answer the following question with true or false, question: {}?\n\nAnswer format: true/false"
PIQA = "Please choose the correct solution to the question: {}\n\nSolution1: {}\n\nSolution2: {}\n\n"
PIQA += "Answer format: solution1/solution2"
AQUA = "A rectangle of {} sq m has a length 1m more than 4 times its width. How long is it? Answer Choices: {}"
LAKE = "If a lake is polluted, which {} would most likely accumulate the highest concentration of contaminants?"
PLANTS = ("Green plants get the energy they need to make food from", "water", "air", "soil", "sunlight")
FISH = ("bass", "fish", "plants", "birds")
CAGE = [
    f"Provide the cage with a few inches of bedding made of ripped {what} and with a water bottle." for what in "ab"
]
DIMES = "Sam had 9 dimes in his bank. His dad gave him 7{} dimes. How many dimes does Sam have now?"


def boolq(*questions):
    return [BOOLQ.format(question) for question in questions]


def kind(test, train):
    matches = find_matches([parse_question(test)], [parse_question(train)])
    return matches[0].kind if matches else None


@pytest.mark.parametrize(
    ("test", "train"),
    [
        (STAMPS, STAMPS.upper().replace(",", " ,").replace(".", " . ")),
        ("Sara 's cat ate 5.0 kg , or $ 1,450 worth .", "Sara's cat ate 5 kg, or $1450 worth."),
        ("He has seven pens and 2 pencils.", "he has 7 pens and two pencils"),
        (ARC.format(*PLANTS), ARC.format(PLANTS[0], *reversed(PLANTS[1:]))),
        (ARC.format(*PLANTS), ARC.format(*PLANTS).partition("\n\nAnswer format")[0].lower()),
        (AQUA.format(150, "(A) 60 m (B) 61 m"), AQUA.format("150", "(A) 61 m (B) 60 m")),
    ],
)
def test_the_same_question_is_exact(test, train):
    assert kind(test, train) == kind(train, test) == "exact"


@pytest.mark.parametrize(
    ("test", "train"),
    [
        (STAMPS, STAMPS.replace("bought 3", "purchased 3")),
        (STAMPS, STAMPS.replace("Max", "Bella")),
        (STAMPS, "Think step by step. " + STAMPS + " Give the number alone."),
        (DIMES.format(" more"), DIMES.format("")),
        ("1 worm was 0.8 inch long. How long were both?", "One worm was 0.8 inch long. How long were both?"),
        (ARC.format(LAKE.format("organism"), *FISH), ARC.format(LAKE.format("animal"), *reversed(FISH))),
        (ARC.format(*PLANTS), ARC.format(*PLANTS[:4], "the sun")),
        (PIQA.format("dresser", *CAGE), PIQA.format("wardrobe", *CAGE)),
        boolq("was ode to billy joe based on a true story", "is ode to billy joe based on a true story"),
        boolq("are ground beef and minced beef the same", "is ground beef and minced beef the same thing"),
    ],
)
def test_an_edited_question_is_near(test, train):
    assert kind(test, train) == "near"


@pytest.mark.parametrize(
    ("test", "train"),
    [
        (STAMPS, STAMPS.replace("16", "11")),
        (STAMPS, STAMPS.replace("3", "9").replace("16", "9")),  # 9 alone is there
        boolq("can you carry a concealed weapon in ohio", "can you carry a concealed weapon in utah"),
        boolq("is there a season 8 of game of thrones", "is there a season 7 of game of thrones"),
        (ARC.format(PLANTS[0], "w", "x", "y", "z"), ARC.format(*PLANTS)),
        (PIQA.format("how to clean a car", "x", "y"), PIQA.format("how to clean a car", *CAGE)),
        (
            "Polar bears live in the",
            *boolq("do polar bears live in the houses that others in the north of Canada build"),
        ),
        (STAMPS, ARC.format(*PLANTS)),
        (ARC.format("What is ice?", *FISH), ARC.format("Who swims?", *FISH)),
        ("What is 5 + 3?", "What is 5 * 3?"),
        ("What is 5 - 3?", "What is 5 / 3?"),
        ("...", "What is 5?"),
    ],
)
def test_a_shared_wording_or_form_is_no_match(test, train):
    assert kind(test, train) is None


def test_every_match_is_found_that_a_comparison_one_by_one_finds():
    """The index of rare n-grams leaves nothing out, and the best match is returned whatever else matches."""
    draw = random.Random(5)
    words = "a the cat dog ran sat on under 3 5 mat lamp house red".split()
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 14))) for _ in range(140)]
    texts += [PIQA.format(text, *draw.sample(texts, 2)) for text in texts[:40]] + texts[:5]
    questions = [parse_question(text) for text in texts]
    train, test = questions[:90], questions[90:]
    expected = {}
    for i, question in enumerate(test):
        for j, other in enumerate(train):
            for match in find_matches([question], [other]):
                rank = match._replace(other=j).rank
                expected[i] = min(expected.get(i, rank), rank)
    matches = find_matches(test, train)
    assert {match.test: match.rank for match in matches} == expected
    assert {match.kind for match in matches} == {"exact", "near"}


def test_the_question_of_a_code_task_is_its_prompt():
    prompt = "def add(x, y):\n    '''Add two numbers that somebody gives.'''\n"
    row = {"task_id": "HumanEval/1", "prompt": prompt, "instruction": f"Complete it.\n\n{prompt}", "input": ""}
    question_text = contamination.question_text
    assert question_text(row) == prompt.strip() == question_text({"prompt": prompt})
    assert question_text({"instruction": "a", "input": "b"}) == "a\nb" and question_text({"output": "a"}) is None


def write(path, texts, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"instruction": text, "input": "", "output": "5"} | more for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path):
    """Test files of two tasks and the training rows, in which two of the first task's rows stand."""
    write(tmp_path / "data/boolq/test.json", [BOOLQ.format(f"is {word} a kind of fish") for word in ("eel", "cod")])
    write(tmp_path / "data/SVAMP/test.json", [STAMPS, STAMPS + " ", STAMPS.replace("16", "8"), "What is it?"])
    write(tmp_path / "data/math/train.json", ["Something else.", STAMPS, STAMPS.replace("buy", "purchase")])
    return tmp_path / "data"


def test_files_are_compared(folder):
    svamp, boolq = compare(str(folder), folder / "math/train.json")
    assert [result.test.name for result in (svamp, boolq)] == ["SVAMP/test.json", "boolq/test.json"]
    assert [match[::2] for match in svamp.matches] == [("exact", 0), ("exact", 1)] and boolq.matches == []
    assert [match.other for match in svamp.matches] == [1, 1]
    expected = "2 of 4 rows of SVAMP/test.json are in the training rows (2 exactly, 0 nearly); "
    assert contamination.summary([svamp, boolq]) == expected + "`python -m corpus contamination` shows them"
    assert contamination.summary([boolq]) == "none of the 2 rows of boolq/test.json is in the training rows"
    assert contamination.summary([boolq, boolq]) == "none of the 4 rows of 2 files is in the training rows"


def test_files_and_folders_are_listed_with_commas(folder):
    svamp, boolq = folder / "SVAMP/test.json", folder / "boolq/test.json"
    assert list_test_files(str(folder)) == [svamp, boolq] and list_test_files(f"{boolq}, {folder}") == [boolq, svamp]
    (folder / "empty").mkdir()
    for listed, words in ((f"{svamp},{folder}/x", "x: no such"), (f"{folder}/empty", "no test.json"), (",", "no test")):
        with pytest.raises(ValueError, match=words):
            list_test_files(listed)


def test_the_command_counts_shows_and_writes(folder, tmp_path):
    flags = ("--data_path", folder / "math/train.json", "--tests", folder, "--save_path", tmp_path / "out.json")
    result = run("-m", "corpus", "contamination", *flags, "--show", 1)
    assert result.returncode == 0, result.stderr
    assert [line.split() for line in result.stdout.splitlines()[-2:]] == [
        ["SVAMP/test.json", "math/train.json", "4", "2", "0", "50.0", "%"],
        ["boolq/test.json", "math/train.json", "2", "0", "0", "0.0", "%"],
    ]
    assert result.stdout.count("exact (100%)") == 1 and "SVAMP/test.json row 1:" in result.stdout
    written = json.loads((tmp_path / "out.json").read_text())["files"][0]
    assert (written["rows"], written["exact"], written["near"]) == (4, 2, 0)
    pair = {"kind": "exact", "overlap": 1.0, "row": 2, "in_row": 2}
    assert written["pairs"][1] == pair | {"text": STAMPS, "in_text": STAMPS}


@pytest.mark.parametrize(
    ("words", "expected", "status"),
    [
        (["--data_path", "x"], ["--tests is required"], 2),
        (["--data_path", "x", "--tests", "nowhere"], ["nowhere: no such file or folder"], 1),
        (["--data_path", "README.md", "--tests", "pyproject.toml"], ["pyproject.toml: line 1: not valid JSON"], 1),
    ],
)
def test_what_is_not_right_is_refused(words, expected, status):
    refused(run("-m", "corpus", "contamination", *words), *expected, status=status)


def test_a_run_says_first_what_is_contaminated_and_records_it(tmp_path):
    train = write_rows(tmp_path / "train.json")
    write(tmp_path / "sums/test.json", ["Add 3 and 2.", "Add 20 and 20 and 20", "What is it?"], answer="5")
    short = {"max_steps": 2, "save_every": 1, "method": "lora", "p_adapter_size": None, "prompt_len": None}
    result = run("finetune.py", *train_flags(train, tmp_path / "out", **short), "--leak_tests", tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    check = "contamination check: 1 of 3 rows of sums/test.json are in the training rows (1 exactly, 0 nearly); "
    check += "`python -m corpus contamination` shows them"
    assert [line for line in lines if "contamination check" in line] == [check]
    assert lines.index(check) < next(i for i, line in enumerate(lines) if "trainable parameters" in line)
    record = json.loads((tmp_path / "out/config.json").read_text())
    assert record["settings"]["leak_tests"] == str(tmp_path)
    [counts] = record["leaks"]["tests"]
    assert (counts["rows"], counts["exact"], counts["near"]) == (3, 1, 0) and counts["file"].endswith("sums/test.json")

    # A resumed run looks again only where it is told to, and then at what it is told
    (tmp_path / "out/checkpoint-2.pth").unlink()
    resume = ["--data_path", str(train), "--output_dir", str(tmp_path / "out"), "--resume"]
    assert merge_with_previous_run(parse_flags(resume, {}, "")).train.leak_tests is None
    other = write(tmp_path / "other.jsonl", ["Nothing of the kind."])
    result = run("finetune.py", *resume, "--leak_tests", other)
    assert result.returncode == 0 and "contamination check: none of the 1 rows of" in result.stderr, result.stderr
    resumed = json.loads((tmp_path / "out/config.json").read_text())
    assert [counts["exact"] for counts in resumed.pop("leaks")["tests"]] == [0]
    assert [entry["step"] for entry in resumed.pop("resumed")] == [1]
    assert resumed == {name: value for name, value in record.items() if name != "leaks"}


def test_a_run_with_tests_that_are_not_there_does_not_begin(tmp_path):
    train = write_rows(tmp_path / "train.json")
    flags = train_flags(train, tmp_path / "out")
    refused(run("finetune.py", *flags, "--leak_tests", tmp_path / "none.json"), "none.json: no such file or folder")
    (tmp_path / "bad.json").write_text('[{"output": "5"}]')
    refused(run("finetune.py", *flags, "--leak_tests", tmp_path / "bad.json"), "bad.json: row 1", "'instruction'")
    assert not (tmp_path / "out").exists()
