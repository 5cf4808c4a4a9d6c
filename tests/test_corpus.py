"""The public data sets: fetching, converting and checking them, against a server and folders that the tests make."""

import gzip
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import corpus.__main__ as command
from commands import refused, run
from corpus.catalogue import CATALOGUE, select
from corpus.check import check_file, check_rows
from corpus.fetch import fetch
from evaluate import TASKS


def rows_of(name, **changed):
    """As many rows as the data set has."""
    row = {"instruction": "", "input": "", "output": "It is 5. The answer is 5.", "answer": "5"} | changed
    return [row | {"instruction": f"What is {i} and {i}?"} for i in range(select([name])[0].rows)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


GSM8K = [
    {"question": f"Add {i} and 1", "answer": f"It is {i}+1 = <<{i}+1={i + 1}>>{i + 1}.\nSo.\n#### {i + 1:,}"}
    for i in range(7473)
]
HUMANEVAL = [
    {"task_id": f"HumanEval/{i}", "prompt": f"def f{i}(x):\n", "entry_point": f"f{i}"}
    | {"canonical_solution": "    return x\n", "test": "def check(candidate): ..."}
    for i in range(164)
]
MBPP = [
    {"task_id": i, "text": f"Write a function to add {i}.", "code": "def f(x): ..."}
    | {"test_list": ["assert f(1)", "assert f(2)"], "test_setup_code": "", "challenge_test_list": []}
    for i in range(1, 975)
]
ORIGINS = {
    "AddSub/test": json.dumps(rows_of("AddSub")).encode(),
    "gsm8k/train": lines(GSM8K),
    "humaneval/test": gzip.compress(lines(HUMANEVAL), mtime=0),
    "mbpp/test": lines(MBPP),
}


def data_set(name, content=None):
    """A data set of the catalogue, with the hash of this content instead of the published file's."""
    entry = select([name])[0]
    content = ORIGINS.get(entry.label, b"") if content is None else content
    return entry._replace(sha256=hashlib.sha256(content).hexdigest())


@pytest.fixture
def source(tmp_path):
    """A folder laid out as the data sets' repositories are."""
    folder = tmp_path / "source"
    for name, content in ORIGINS.items():
        put(folder, name, content)
    return folder


def put(folder, name, content):
    path = Path(data_set(name).address(str(folder)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.fixture
def server(monkeypatch):
    """A server that answers with ORIGINS; `troubles` has what goes wrong with the next answers."""
    contents = {"/" + data_set(name).origin: content for name, content in ORIGINS.items()}

    class Handler(BaseHTTPRequestHandler):
        troubles: list = []
        requests: list = []

        def do_GET(self):
            self.requests.append(self.path)
            content = contents.get(self.path, b"")
            trouble = self.troubles.pop(0) if self.troubles else None
            self.send_response(trouble if isinstance(trouble, int) else 200 if content else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(trouble if isinstance(trouble, bytes) else content)  # bytes: fewer than announced

        def log_message(self, *args):
            pass

    monkeypatch.setenv("no_proxy", "*")
    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    Handler.url = f"http://127.0.0.1:{running.server_address[1]}"
    yield Handler
    running.shutdown()
    thread.join()
    running.server_close()


def test_the_catalogue_agrees_with_the_tasks():
    assert len({entry.label for entry in CATALOGUE}) == len({entry.origin for entry in CATALOGUE}) == len(CATALOGUE)
    assert [entry.label for entry in CATALOGUE if len(entry.sha256) != 64] == ["codealpaca/train"]
    tests = {entry.task: entry for entry in CATALOGUE if entry.split == "test"}
    for name, task in TASKS.items():
        if name != "demo":
            assert tests[name].rows == task.problems and tests[name].family == task.family, name


def test_names_select_data_sets():
    assert [entry.label for entry in select(["gsm8k"])] == ["gsm8k/train", "gsm8k/test"]
    assert [entry.label for entry in select(["siqa", "GSM8K/test"])] == ["gsm8k/test", "social_i_qa/test"]
    assert {entry.family for entry in select(["code"])} == {"code"} and select([]) == list(CATALOGUE)
    with pytest.raises(ValueError, match="'gsm9k' .*gsm8k"):
        select(["gsm9k"])


def test_what_is_published_becomes_rows(server, source, tmp_path):
    """The same from a folder and from a server, which is not asked for what is there already."""
    read = {}
    for name in ORIGINS:
        fetched = fetch(data_set(name), tmp_path / "data", str(source))
        assert fetched.new and check_file(data_set(name), fetched.file).faults == ()
        by_web = fetch(data_set(name), tmp_path / "web", server.url)
        assert by_web.file.read_bytes() == fetched.file.read_bytes()
        read[name] = json.loads(fetched.file.read_text())
    assert not fetch(data_set("AddSub"), tmp_path / "web", server.url).new and len(server.requests) == len(ORIGINS)
    assert read["AddSub/test"] == rows_of("AddSub")
    assert read["gsm8k/train"][1499] == {
        "instruction": "Add 1499 and 1",
        "input": "",
        "output": "It is 1499+1 = 1500. So. The answer is 1500.",
        "answer": "1500.0",
    }
    row = read["humaneval/test"][3]
    assert {name: row[name] for name in HUMANEVAL[3]} == HUMANEVAL[3]
    assert row["output"] == "def f3(x):\n    return x\n" and row["instruction"] == "def f3(x):\n"
    assert [row["task_id"] for row in read["mbpp/test"]] == list(range(11, 511))
    row = read["mbpp/test"][0]
    assert row["instruction"] == "Write a function to add 11.\nExamples:\nassert f(1)\nassert f(2)"
    assert row["output"] == MBPP[10]["code"] and row["input"] == ""


@pytest.mark.parametrize(
    ("trouble", "tries", "words"),
    [
        (503, 1, ""),
        (429, 1, ""),
        (b"[", 1, ""),
        (404, 1, "HTTP status 404"),
        (503, 2, "HTTP status 503"),
        (b"[", 2, "broken"),
    ],
)
def test_what_may_pass_is_tried_again_and_what_fails_leaves_nothing(server, tmp_path, trouble, tries, words):
    server.troubles[:] = [trouble] * tries
    if not words:
        assert fetch(data_set("AddSub"), tmp_path, server.url, retries=1).rows == 395 and len(server.requests) == 2
        return
    with pytest.raises(OSError, match=f"{server.url}/{data_set('AddSub').origin}: .*{words}"):
        fetch(data_set("AddSub"), tmp_path, server.url, retries=1)
    assert len(server.requests) == tries and not list(tmp_path.iterdir())


def test_without_a_network_a_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(OSError, match="http://127.0.0.1:9/.*: the server cannot be reached; is there a network?"):
        fetch(data_set("AddSub"), tmp_path, "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("AddSub", json.dumps(rows_of("AddSub")[1:]), "394 rows, expected 395"),
        ("AddSub", json.dumps(rows_of("AddSub"))[:-9], "not valid JSON"),
        ("AddSub", json.dumps([{"instruction": "a"}]), "1 rows, expected 395"),
        ("AddSub", "[1]", "row 1: expected an object"),
        ("AddSub", " ", "empty"),
        ("AddSub", b"\xff", "neither UTF-8 text"),
        (
            "gsm8k/train",
            lines([{"question": "a", "answer": "5"}]),
            "row 1: not of the published form (ValueError: the answer has no line '#### N')",
        ),
        ("gsm8k/train", lines([{"question": "a"}]), "row 1: not of the published form (KeyError: 'answer')"),
        ("humaneval", ORIGINS["humaneval/test"][:-20], "nor a whole .gz file"),
        ("mbpp", lines([MBPP[20] | {"test_list": None}]), "row 1: not of the published form (TypeError"),
    ],
)
def test_what_is_not_as_expected_is_not_written(source, tmp_path, name, content, words):
    content = content if isinstance(content, bytes) else content.encode()
    put(source, name, content)
    with pytest.raises(ValueError) as raised:
        fetch(data_set(name, content), tmp_path / "data", str(source))
    assert words in str(raised.value) and data_set(name).origin in str(raised.value)
    with pytest.raises(ValueError, match=f"{data_set(name).origin}: SHA-256 is not {data_set(name).sha256}"):
        fetch(data_set(name), tmp_path / "data", str(source))
    assert not (tmp_path / "data").exists()


def test_a_file_that_is_not_right_is_replaced_only_when_asked(source, tmp_path):
    entry = data_set("AddSub")
    fetch(entry, tmp_path, str(source)).file.write_text(before := json.dumps(rows_of("AddSub")[:7]))
    with pytest.raises(ValueError, match="7 rows, expected 395; --overwrite"):
        fetch(entry, tmp_path, str(source))
    with pytest.raises(ValueError, match="no such file"):
        fetch(entry, tmp_path, str(source / "none"), overwrite=True)
    assert entry.file(tmp_path).read_text() == before
    assert fetch(entry, tmp_path, str(source), overwrite=True).new


def test_training_rows_without_an_answer_are_left_out(source, tmp_path):
    rows = rows_of("codealpaca")
    rows[3] |= {"output": " "}
    rows[5] |= {"instruction": ""}
    put(source, "codealpaca", json.dumps(rows).encode())
    fetched = fetch(select(["codealpaca"])[0], tmp_path, str(source))
    assert (fetched.left_out, fetched.rows) == (2, 20_020)
    assert check_file(data_set("codealpaca"), fetched.file).faults == ()


def test_the_command_fetches_the_others_where_one_fails(source, tmp_path, capsys, monkeypatch):
    entries = [data_set(name) for name in ("AddSub", "AQuA", "mbpp")]
    monkeypatch.setattr(command, "select", lambda names: entries)
    with pytest.raises(SystemExit) as ended:
        command.main(["fetch", "--source", str(source), "--output_dir", str(tmp_path / "data")])
    printed = capsys.readouterr()
    first, last = printed.err.splitlines()
    assert ended.value.code == 1 and first.startswith("error: AQuA/test: ") and "no such file" in first
    assert entries[1].address(str(source)) in first and last == "error: 1 of 3 data sets could not be fetched"
    assert [line.split(":")[0] for line in printed.out.splitlines()] == ["AddSub/test", "mbpp/test"]
    result = run("-m", "corpus", "check", "--data_path", tmp_path / "data")
    assert result.returncode == 0 and "AQuA/test" in result.stdout
    assert ["AddSub/test", "395", "395", "0", "0", "ok"] in [line.split()[:6] for line in result.stdout.splitlines()]
    assert run("-m", "corpus", "check", "AQuA", "--data_path", tmp_path / "data").returncode == 1


def test_the_check_names_what_is_wrong(tmp_path):
    entry, rows = data_set("AQuA"), rows_of("AQuA", answer="B")
    rows[1] = rows[0] | {"output": ""}
    checked = check_rows(entry, rows)
    assert (checked.faults, checked.repeated, checked.unanswered) == ((), 1, 1)
    rows[2] = {name: value for name, value in rows[2].items() if name != "answer"}
    rows[3] = {name: value for name, value in rows[3].items() if name != "answer"}
    rows[5] = rows[5] | {"output": 5}
    rows[6] = rows[6] | {"instruction": "\n"}
    assert check_rows(entry, rows[:-1]).faults == (
        "253 rows, expected 254",
        "field 'answer' is missing (rows: 3, 4)",
        "field 'output' must be text, not int (rows: 6)",
        "instruction is empty (rows: 7)",
    )
    entry.file(tmp_path).parent.mkdir()
    entry.file(tmp_path).write_bytes(lines(rows))
    result = run("-m", "corpus", "check", "--data_path", tmp_path)
    assert result.returncode == 1 and "WRONG" in result.stdout
    assert len(result.stderr.splitlines()) == 3 and str(entry.file(tmp_path)) in result.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fetsh"], ["list, fetch, check, contamination", "'fetsh'"]),
        ([], ["nothing was given"]),
        (["fetch", "gsm9k"], ["gsm9k", "gsm8k"]),
        (["fetch", "--timeout", "0"], ["--timeout"]),
        (["check", "--dta_path", "x"], ["--dta_path", "--data_path"]),
    ],
)
def test_wrong_words_are_refused(words, expected):
    refused(run("-m", "corpus", *words), *expected, status=2)


def test_the_list_has_every_data_set():
    result = run("-m", "corpus", "list", "--source", "https://mirror.example/raw/")
    assert result.returncode == 0 and len(result.stdout.splitlines()) == len(CATALOGUE) + 1
    assert "https://mirror.example/raw/openai/human-eval/" in result.stdout and "SHA-256 not known" in result.stdout
    assert run("-m", "corpus", "--help").returncode == 0
