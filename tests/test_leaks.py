"""Test rows that stand among training rows: found word for word and edited, and not where only the wording is alike."""

import json
import random

import pytest

from commands import refused, run, train_flags, write_rows
from corpus.compare import compare, compare_within, files_of, read_asked, summary
from corpus.leaks import KINDS, find_pairs
from corpus.questions import parse_question, question_text
from training.config import continued, read_settings

STAMPS = (
    "Max bought 16 snowflake stamps at the post office. He bought 3 more truck stamps than snowflake stamps, and 9 "
)
STAMPS += "fewer rose stamps than truck stamps. How many stamps did Max buy in all?"
ARC = "Please choose the correct answer to the question: {}\n\nAnswer1: {} Answer2: {} Answer3: {} Answer4: {}\n\n"
ARC += "Answer format: answer1/answer2/answer3/answer4"
BOOLQ = "Please answer the following question with true or false, question: {}?\n\nAnswer format: true/false"
PIQA = "Please choose the correct solution to the question: {}\n\nSolution1: {}\n\nSolution2: {}\n\n"
PIQA += "Answer format: solution1/solution2"
AQUA = "A rectangle of {} sq m has a length 1m more than 4 times its width. How long is it? Answer Choices: {}"
LAKE = "If a lake is polluted, which {} would most likely accumulate the highest concentration of contaminants?"
PLANTS = ("Green plants get the energy they need to make food from", "water", "air", "soil", "sunlight")
CAGE = [
    f"Provide the cage with a few inches of bedding made of ripped {what} and with a water bottle." for what in "ab"
]


def kind(test, train):
    pairs = find_pairs([parse_question(train)], [parse_question(test)])
    return pairs[0].kind if pairs else None


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
        ("Sam had 9 dimes in his bank. His dad gave him 7 more dimes. How many dimes does Sam have now?",)
        + ("Sam had 9 dimes in his bank. His dad gave him 7 dimes. How many dimes does Sam have now?",),
        (ARC.format(LAKE.format("organism"), "bass", "fish", "plants", "birds"),)
        + (ARC.format(LAKE.format("animal"), "fish", "bass", "birds", "plants"),),
        (ARC.format(LAKE.format("organism"), "bass", "fish", "plants", "birds"), LAKE.format("organism")),
        (ARC.format(*PLANTS), ARC.format(*PLANTS[:4], "the sun")),
        (PIQA.format("dresser", *CAGE), PIQA.format("wardrobe", *CAGE)),
        (BOOLQ.format("was ode to billy joe based on a true story"),)
        + (BOOLQ.format("is ode to billy joe based on a true story"),),
        (BOOLQ.format("are ground beef and minced beef the same"),)
        + (BOOLQ.format("is ground beef and minced beef the same thing"),),
    ],
)
def test_an_edited_question_is_near(test, train):
    assert kind(test, train) == "near"


@pytest.mark.parametrize(
    ("test", "train"),
    [
        (STAMPS, STAMPS.replace("16", "11")),
        (STAMPS, STAMPS.replace("3", "9").replace("16", "9")),  # 9 alone is there
        (BOOLQ.format("can you carry a concealed weapon in ohio"),)
        + (BOOLQ.format("can you carry a concealed weapon in utah"),),
        (BOOLQ.format("is there a season 8 of game of thrones"),)
        + (BOOLQ.format("is there a season 7 of game of thrones"),),
        (ARC.format(PLANTS[0], "w", "x", "y", "z"), ARC.format(*PLANTS)),
        (PIQA.format("how to clean a car", "x", "y"), PIQA.format("how to clean a car", *CAGE)),
        (
            "Polar bears live in the",
            BOOLQ.format("do polar bears live in the houses that other people in the north of Canada build"),
        ),
    ],
)
def test_the_same_wording_about_something_else_is_a_template(test, train):
    assert kind(test, train) == "template"


@pytest.mark.parametrize(
    ("test", "train"),
    [
        (STAMPS, ARC.format(*PLANTS)),
        (
            ARC.format("What is ice?", "gas", "air", "water", "fire"),
            ARC.format("Who swims?", "gas", "air", "water", "fire"),
        ),
        ("What is 5 + 3?", "What is 5 * 3?"),
        ("What is 5 - 3?", "What is 5 / 3?"),
        ("...", "What is 5?"),
    ],
)
def test_what_only_shares_a_form_is_nothing(test, train):
    assert kind(test, train) is None


def test_every_pair_is_found_that_a_comparison_one_by_one_finds():
    """The index of rare n-grams leaves nothing out, and the best match is told whatever else matches."""
    draw = random.Random(5)
    words = "a the cat dog ran sat on under 3 5 mat lamp house red".split()
    texts = [" ".join(draw.choices(words, k=draw.randint(1, 14))) for _ in range(140)]
    texts += [PIQA.format(text, *draw.sample(texts, 2)) for text in texts[:40]] + texts[:5]
    questions = [parse_question(text) for text in texts]
    train, test = questions[:90], questions[90:]
    expected = {}
    for i, one in enumerate(test):
        for j, other in enumerate(train):
            for pair in find_pairs([other], [one], overlap=0.55):
                rank = (KINDS.index(pair.kind), -pair.overlap, j)
                expected[i] = min(expected.get(i, rank), rank)
    found = find_pairs(train, test, overlap=0.55)
    assert {pair.test: pair.rank for pair in found} == expected
    assert {pair.kind for pair in found} == set(KINDS)


def test_a_row_of_a_code_task_is_told_by_its_prompt():
    prompt = "def add(x, y):\n    '''Add two numbers that somebody gives.'''\n"
    row = {"task_id": "HumanEval/1", "prompt": prompt, "instruction": f"Complete it.\n\n{prompt}", "input": ""}
    assert question_text(row) == prompt.strip() == question_text({"prompt": prompt})
    assert question_text({"instruction": "a", "input": "b"}) == "a\nb" and question_text({"output": "a"}) is None


def write(path, texts, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps({"instruction": text, "input": "", "output": "5"} | more) + "\n" for text in texts)
    )
    return path


@pytest.fixture
def folder(tmp_path):
    """Test files of two suites and the training rows that two of the first suite's rows stand in."""
    write(tmp_path / "data/boolq/test.json", [BOOLQ.format(f"is {word} a kind of fish") for word in ("eel", "cod")])
    write(tmp_path / "data/SVAMP/test.json", [STAMPS, STAMPS + " ", STAMPS.replace("16", "8"), "What is it?"])
    texts = ["Something else.", STAMPS, STAMPS.replace("buy", "purchase")]
    write(tmp_path / "data/math/train.json", texts)
    return tmp_path / "data"


def test_files_are_compared(folder):
    train = read_asked(folder / "math/train.json")
    svamp, boolq = compare(train, [read_asked(file) for file in files_of(str(folder))])
    assert [one.test.name for one in (svamp, boolq)] == ["SVAMP/test.json", "boolq/test.json"]
    assert [(pair.kind, pair.test, pair.train) for pair in svamp.pairs] == [
        ("exact", 0, 1),
        ("exact", 1, 1),
        ("template", 2, 1),
    ]
    assert boolq.pairs == []
    expected = (
        "2 of 4 rows of SVAMP/test.json are in the training rows (2 exactly, 0 nearly); `python -m corpus leaks` "
    )
    assert summary([svamp, boolq]) == expected + "shows them"
    assert summary([boolq]) == "none of the 2 rows of boolq/test.json is in the training rows"
    assert summary([boolq, boolq]) == "none of the 4 rows of 2 files is in the training rows"


def test_files_are_compared_with_one_another(folder, tmp_path):
    first, second = read_asked(folder / "SVAMP/test.json"), read_asked(folder / "math/train.json")
    own, other = compare_within([first, second])
    assert (own.test, own.other, other.test, other.other) == (first, first, second, first)
    assert [(pair.kind, pair.test, pair.train) for pair in own.pairs] == [("exact", 1, 0), ("template", 2, 0)]
    assert [(pair.kind, pair.test, pair.train) for pair in other.pairs] == [("exact", 1, 0), ("near", 2, 0)]


def test_files_and_folders_are_named_with_commas(folder):
    svamp, boolq = folder / "SVAMP/test.json", folder / "boolq/test.json"
    assert files_of(str(folder)) == [svamp, boolq] and files_of(f"{boolq}, {folder}") == [boolq, svamp]
    assert files_of(f"{folder / 'math'}") == [folder / "math/train.json"]
    (folder / "empty").mkdir()
    for named, words in (
        (f"{svamp},{folder}/x", "x: no such"),
        (str(folder / "empty"), "no test.json"),
        (",", "no test"),
    ):
        with pytest.raises(ValueError, match=words):
            files_of(named)


def test_the_command_counts_shows_and_writes(folder, tmp_path):
    train = ("--train", folder / "math/train.json")
    flags = (*train, "--tests", folder, "--json", tmp_path / "out.json", "--show", 1)
    result = run("-m", "corpus", "leaks", *flags)
    assert result.returncode == 0, result.stderr
    table = [line.split() for line in result.stdout.splitlines()[-2:]]
    assert table == [
        ["SVAMP/test.json", "math/train.json", "4", "2", "0", "50.0", "%", "1"],
        ["boolq/test.json", "math/train.json", "2", "0", "0", "0.0", "%", "0"],
    ]
    assert result.stdout.count("exact (100%)") == 1 and "SVAMP/test.json row 1:" in result.stdout
    written = json.loads((tmp_path / "out.json").read_text())["files"][0]
    assert (written["rows"], written["exact"], written["near"], written["template"]) == (4, 2, 0, 1)
    assert written["pairs"][1] == {
        "kind": "exact",
        "overlap": 1.0,
        "row": 2,
        "in_row": 2,
        "text": STAMPS,
        "in_text": STAMPS,
    }
    result = run("-m", "corpus", "leaks", "--within", folder / "SVAMP")
    assert result.returncode == 0 and result.stdout.splitlines()[-1].split()[2:6] == ["4", "1", "0", "25.0"]


@pytest.mark.parametrize(
    ("words", "expected", "status"),
    [
        (["--train", "x"], ["--train and --tests"], 2),
        (["--train", "x", "--tests", "y", "--within", "z"], ["--within alone"], 2),
        (["--within", "x", "--overlap", "0"], ["--overlap"], 2),
        (["--within", "x", "--ngram", "0"], ["--ngram"], 2),
        (["--within", "nowhere"], ["nowhere: no such file or folder"], 1),
        (["--train", "README.md", "--tests", "pyproject.toml"], ["README.md", "neither a JSON list nor JSON lines"], 1),
    ],
)
def test_what_is_not_right_is_refused(words, expected, status):
    refused(run("-m", "corpus", "leaks", *words), *expected, status=status)


def test_a_run_tells_of_leaks_first_and_records_them(tmp_path):
    train = write_rows(tmp_path / "train.json")
    write(tmp_path / "sums/test.json", ["Add 3 and 2.", "Add 20 and 20 and 20", "What is it?"], answer="5")
    flags = train_flags(
        train, tmp_path / "out", max_steps=2, save_every=1, method="lora", p_adapter_size=None, prompt_len=None
    )
    result = run("finetune.py", *flags, "--leak_tests", tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stderr.splitlines()
    told = [line for line in lines if line.startswith("leak check: ")]
    assert told == [
        "leak check: 1 of 3 rows of sums/test.json are in the training rows (1 exactly, 0 nearly); "
        "`python -m corpus leaks` shows them"
    ]
    assert lines.index(told[0]) < next(i for i, line in enumerate(lines) if "trainable parameters" in line)
    record = json.loads((tmp_path / "out/config.json").read_text())
    assert record["settings"]["leak_tests"] == str(tmp_path)
    [found] = record["leaks"]["tests"]
    assert (found["rows"], found["exact"], found["near"]) == (3, 1, 0) and found["file"].endswith("sums/test.json")

    # A resumed run looks again only where it is told to, and then at what it is told
    (tmp_path / "out/checkpoint-2.pth").unlink()
    resume = ["--data_path", str(train), "--output_dir", str(tmp_path / "out"), "--resume"]
    assert continued(read_settings(resume, {}, "")).train.leak_tests is None
    other = write(tmp_path / "other.jsonl", ["Nothing of the kind."])
    result = run("finetune.py", *resume, "--leak_tests", other)
    assert result.returncode == 0 and "leak check: none of the 1 rows of" in result.stderr, result.stderr
    resumed = json.loads((tmp_path / "out/config.json").read_text())
    assert [found["exact"] for found in resumed.pop("leaks")["tests"]] == [0]
    assert [entry["step"] for entry in resumed.pop("resumed")] == [1]
    assert resumed == {name: value for name, value in record.items() if name != "leaks"}


def test_a_run_with_tests_that_are_not_there_does_not_begin(tmp_path):
    train = write_rows(tmp_path / "train.json")
    flags = train_flags(train, tmp_path / "out")
    refused(run("finetune.py", *flags, "--leak_tests", tmp_path / "none.json"), "none.json: no such file or folder")
    (tmp_path / "bad.json").write_text('[{"output": "5"}]')
    refused(run("finetune.py", *flags, "--leak_tests", tmp_path / "bad.json"), "bad.json: row 1", "'instruction'")
    assert not (tmp_path / "out").exists()
