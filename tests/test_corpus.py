"""The public data sets: fetching, converting and checking them, against a server and folders that the tests make."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import corpus.fetch
import corpus.forms
from commands import refused, run
from corpus.catalogue import CATALOGUE, choose
from corpus.check import check_file, check_rows
from corpus.fetch import address, fetch
from corpus.rows import write_rows
from evaluate import TASKS


def one(name):
    return choose([name])[0]


def rows_of(name, **changed):
    """As many rows as the data set has."""
    row = {"instruction": "", "input": "", "output": "It is 5. The answer is 5.", "answer": "5"} | changed
    return [row | {"instruction": f"What is {i} and {i}?"} for i in range(one(name).rows)]


GSM8K = [
    {"question": f"Add {i} and 1", "answer": f"It is {i}+1 = <<{i}+1={i + 1}>>{i + 1}.\nSo.\n#### {i + 1:,}"}
    for i in range(7473)
]
HUMANEVAL = [
    {
        "task_id": f"HumanEval/{i}",
        "prompt": f"def f{i}(x):\n",
        "entry_point": f"f{i}",
        "canonical_solution": "    return x\n",
        "test": "def check(candidate): ...",
    }
    for i in range(164)
]
MBPP = [
    {
        "task_id": i,
        "text": f"Write a function to add {i}.",
        "code": "def f(x): ...",
        "test_list": ["assert f(1)", "assert f(2)"],
        "test_setup_code": "",
        "challenge_test_list": [],
    }
    for i in range(1, 975)
]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ORIGINS = {
    "AddSub/test": json.dumps(rows_of("AddSub")).encode(),
    "gsm8k/train": lines(GSM8K),
    "humaneval/test": gzip.compress(lines(HUMANEVAL)),
    "mbpp/test": lines(MBPP),
}


@pytest.fixture
def source(tmp_path):
    """A folder laid out as the data sets' repositories are."""
    folder = tmp_path / "source"
    for name, content in ORIGINS.items():
        path = Path(address(one(name), str(folder)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.fixture
def server(monkeypatch):
    """A server that answers with ORIGINS; `troubles` has what goes wrong with the next answers."""
    places = {"/" + one(name).origin: content for name, content in ORIGINS.items()}

    class Handler(BaseHTTPRequestHandler):
        troubles: list = []
        asked: list = []

        def do_GET(self):
            self.asked.append(self.path)
            content = places.get(self.path, b"")
            trouble = self.troubles.pop(0) if self.troubles else None
            status = trouble if isinstance(trouble, int) else 200 if content else 404
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(trouble if isinstance(trouble, bytes) else content)  # bytes: fewer than announced

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(corpus.fetch, "PAUSE", 0)
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    Handler.url = f"http://127.0.0.1:{running.server_address[1]}"
    yield Handler
    running.shutdown()
    thread.join()
    running.server_close()


def test_the_catalogue_agrees_with_the_suites():
    assert len({one.label for one in CATALOGUE}) == len({one.origin for one in CATALOGUE}) == len(CATALOGUE)
    tests = {one.suite: one for one in CATALOGUE if one.kind == "test"}
    for name, suite in TASKS.items():
        if name != "demo":
            assert tests[name].rows == suite.problems and tests[name].family == suite.family, name


@pytest.mark.parametrize("data_set", [one for one in CATALOGUE if one.answer], ids=lambda one: one.label)
def test_answers_are_those_that_the_suite_can_read(data_set):
    readable = set()
    for value in ("5", "1,450.5", "-3", 7, "five", "A", "F", "b", "true", "yes", "answer3", "answer6", "solution2"):
        row = {"instruction": "What?", "input": "", "output": "", "answer": value}
        accepted = not [fault for fault in check_rows(data_set, [row]).faults if fault.startswith("answer")]
        try:
            TASKS[data_set.suite].read_answer(value)
            assert accepted, value
            readable.add(value)
        except ValueError:
            assert not accepted, value
    assert readable or data_set.suite in ("HellaSwag", "WinoGrande")  # whose words are not among these


def test_names_choose_data_sets():
    assert [one.label for one in choose(["gsm8k"])] == ["gsm8k/train", "gsm8k/test"]
    assert [one.label for one in choose(["siqa", "GSM8K/test"])] == ["gsm8k/test", "social_i_qa/test"]
    assert {one.family for one in choose(["code"])} == {"code"} and choose([]) == list(CATALOGUE)
    with pytest.raises(ValueError, match="'gsm9k' .*gsm8k"):
        choose(["gsm9k"])


def test_what_is_published_becomes_rows(source, tmp_path):
    for name in ORIGINS:
        fetched = fetch(one(name), tmp_path / "data", str(source))
        assert fetched.new and check_file(one(name), fetched.file).faults == ()
    read = {name: json.loads(one(name).file(tmp_path / "data").read_text()) for name in ORIGINS}
    assert read["AddSub/test"] == rows_of("AddSub")
    assert read["gsm8k/train"][1499] == {
        "instruction": "Add 1499 and 1",
        "input": "",
        "output": "It is 1499+1 = 1500. So. The answer is 1500.",
        "answer": "1500.0",
    }
    row = read["humaneval/test"][3]
    assert {name: row[name] for name in HUMANEVAL[3]} == HUMANEVAL[3]
    assert row["output"] == "def f3(x):\n    return x\n" and row["instruction"].endswith("def f3(x):\n")
    assert [row["task_id"] for row in read["mbpp/test"]] == list(range(11, 511))
    row = read["mbpp/test"][0]
    assert all(text in row["instruction"] for text in (MBPP[10]["text"], "Python", *MBPP[10]["test_list"]))
    assert row["output"] == MBPP[10]["code"] and row["input"] == ""


def test_a_server_gives_the_same_and_what_is_there_is_not_asked_for_again(server, source, tmp_path):
    for name in ORIGINS:
        fetch(one(name), tmp_path / "web", server.url)
        fetch(one(name), tmp_path / "copied", str(source))
        assert one(name).file(tmp_path / "web").read_bytes() == one(name).file(tmp_path / "copied").read_bytes()
    before = len(server.asked)
    assert not fetch(one("AddSub"), tmp_path / "web", server.url).new
    assert len(server.asked) == before == len(ORIGINS)


@pytest.mark.parametrize(("troubles", "tries"), [([503], 2), ([b"[", 503], 3), ([429, 500], 3)])
def test_what_may_pass_is_tried_again(server, tmp_path, troubles, tries):
    server.troubles[:] = troubles
    server.asked.clear()
    assert fetch(one("AddSub"), tmp_path, server.url).rows == 395 and len(server.asked) == tries


@pytest.mark.parametrize(
    ("troubles", "tries", "words"),
    [
        ([404], 1, "HTTP status 404"),
        ([503] * 3, 3, "HTTP status 503"),
        ([b"[{"] * 3, 3, "the connection broke after 2 of"),
    ],
)
def test_a_download_that_fails_leaves_nothing(server, tmp_path, troubles, tries, words):
    server.troubles[:] = troubles
    server.asked.clear()
    with pytest.raises(OSError, match=words) as raised:
        fetch(one("AddSub"), tmp_path, server.url)
    assert address(one("AddSub"), server.url) in str(raised.value)
    assert len(server.asked) == tries and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("AddSub", json.dumps(rows_of("AddSub")[1:]), "394 rows, expected 395"),
        ("AddSub", json.dumps(rows_of("AddSub"))[:-9], "neither a JSON list nor JSON lines"),
        ("AddSub", "<html>Not found</html>", "'<html>Not found</html>'"),
        ("AddSub", json.dumps(rows_of("AddSub", answer="C")), "answer 'C', expected a number"),
        ("AddSub", "[1]", "row 1: expected an object"),
        ("AddSub", " ", "empty"),
        ("AddSub", b"\xff", "not UTF-8"),
        ("gsm8k/train", lines([{"question": "a", "answer": "5"}]), "row 1: the answer has no line '#### N'"),
        ("gsm8k/train", lines([{"question": "a"}]), "row 1: field 'answer' is missing"),
        ("humaneval", gzip.compress(lines(HUMANEVAL))[:-20], "damaged .gz"),
        ("mbpp", lines([MBPP[20] | {"test_list": None}]), "not of the expected type"),
    ],
)
def test_what_is_not_as_expected_is_not_written(source, tmp_path, name, content, words):
    Path(address(one(name), str(source))).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as raised:
        fetch(one(name), tmp_path / "data", str(source))
    assert words in str(raised.value) and one(name).origin in str(raised.value)
    assert not (tmp_path / "data").exists()


def test_too_much_is_refused(server, source, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus.fetch, "LARGEST", 10_000)
    for place in (str(source), server.url):
        with pytest.raises(ValueError, match="more than"):
            fetch(one("AddSub"), tmp_path / "data", place)
    monkeypatch.setattr(corpus.forms, "LARGEST", 10_000)
    with pytest.raises(ValueError, match="unpacks to more than"):
        fetch(one("humaneval"), tmp_path / "data", str(source))


def test_a_file_that_is_not_right_is_replaced_only_when_asked(source, tmp_path):
    write_rows(one("AddSub").file(tmp_path), rows_of("AddSub")[:7])
    before = one("AddSub").file(tmp_path).read_bytes()
    with pytest.raises(ValueError, match="7 rows, expected 395; --overwrite"):
        fetch(one("AddSub"), tmp_path, str(source))
    with pytest.raises(ValueError, match="no such file"):
        fetch(one("AddSub"), tmp_path, str(source / "none"), overwrite=True)
    assert one("AddSub").file(tmp_path).read_bytes() == before
    assert fetch(one("AddSub"), tmp_path, str(source), overwrite=True).new


def test_training_rows_without_an_answer_are_left_out(source, tmp_path):
    rows = rows_of("codealpaca")
    rows[3] |= {"output": " "}
    rows[5] |= {"instruction": ""}
    place = Path(address(one("codealpaca"), str(source)))
    place.parent.mkdir(parents=True)
    place.write_text(json.dumps(rows))
    fetched = fetch(one("codealpaca"), tmp_path, str(source))
    assert (fetched.left_out, fetched.rows) == (2, 20_020)
    assert check_file(one("codealpaca"), fetched.file).faults == ()


def test_a_command_fetches_the_others_where_one_fails(source, tmp_path):
    flags = ("--source", source, "--output", tmp_path / "data")
    result = run("-m", "corpus", "fetch", "AddSub", "AQuA", "mbpp", *flags)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    first, last = result.stderr.splitlines()
    assert first.startswith("error: AQuA/test: ") and address(one("AQuA"), str(source)) in first and "no such" in first
    assert last == "error: 1 of 3 data sets could not be fetched"
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == ["AddSub/test", "mbpp/test"]
    result = run("-m", "corpus", "check", "--data", tmp_path / "data")
    assert result.returncode == 0 and "AddSub/test   395" in result.stdout and "AQuA/test" in result.stdout
    assert run("-m", "corpus", "check", "AQuA", "--data", tmp_path / "data").returncode == 1


def test_the_check_names_what_is_wrong(tmp_path):
    rows = rows_of("AQuA", answer="B")
    rows[1] = rows[0] | {"output": ""}
    assert check_rows(one("AQuA"), rows).faults == ()
    assert (check_rows(one("AQuA"), rows).repeated, check_rows(one("AQuA"), rows).unanswered) == (1, 1)
    rows[2] = rows[2] | {"answer": "b"}
    rows[3] = rows[3] | {"answer": "b"}
    rows[4] = {name: value for name, value in rows[4].items() if name != "input"}
    rows[5] = rows[5] | {"output": 5}
    rows[6] = rows[6] | {"instruction": "\n"}
    faults = check_rows(one("AQuA"), rows[:-1]).faults
    assert faults == (
        "253 rows, expected 254",
        "answer 'b', expected a letter A to E (2 rows: 3, 4)",
        "field 'input' is missing (row 5)",
        "field 'output' must be text, not int (row 6)",
        "instruction is empty (row 7)",
    )
    write_rows(one("AQuA").file(tmp_path), rows)
    result = run("-m", "corpus", "check", "--data", tmp_path)
    assert result.returncode == 1 and "WRONG" in result.stdout
    assert len(result.stderr.splitlines()) == 4 and str(one("AQuA").file(tmp_path)) in result.stderr


@pytest.mark.parametrize(
    ("words", "expected", "status"),
    [
        (["fetsh"], ["list, fetch, check, leaks", "'fetsh'"], 2),
        ([], ["nothing was given"], 2),
        (["fetch", "gsm9k"], ["gsm9k", "gsm8k"], 2),
        (["fetch", "--timeout", "0"], ["--timeout"], 2),
        (["check", "--dta", "x"], ["--dta", "--data"], 2),
    ],
)
def test_wrong_words_are_refused(words, expected, status):
    refused(run("-m", "corpus", *words), *expected, status=status)


def test_the_list_has_every_data_set():
    result = run("-m", "corpus", "list", "--source", "https://mirror.example/raw/")
    assert result.returncode == 0 and len(result.stdout.splitlines()) == len(CATALOGUE) + 1
    assert "https://mirror.example/raw/openai/human-eval/" in result.stdout
    assert run("-m", "corpus", "--help").returncode == 0
