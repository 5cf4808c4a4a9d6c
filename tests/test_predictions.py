"""Prediction files that grow row by row and never hold a row twice."""

import json

import pytest

from commands import script, write_rows
from evaluate.rows import read_rows
from llama.predictions import Predictions
from llama.tokenizer import Tokenizer
from tiny import BASE

ROWS = [{"instruction": f"row {i}", "input": "", "answer": str(i)} for i in range(5)]
ROWS.append(ROWS[1])  # some suites hold a question twice
SETTINGS = {"seed": 0, "temperature": 0.1}


def start(path, settings=SETTINGS, rows=ROWS, overwrite=False):
    predictions = Predictions(path, rows, settings, 0, overwrite)
    predictions.start()
    return predictions


def reopen(path, settings=SETTINGS, rows=ROWS, rank=0):
    return Predictions(path, rows, settings, rank, False)


def crash(predictions):
    """Let go of the lock, as the system does when a process ends."""
    predictions._lock.release()


def finish(predictions, indices):
    for i in indices:
        predictions.add(i, f"answer {i}")
    predictions.finish()


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "AddSub.jsonl"


def test_rows_come_out_in_the_tests_order(path):
    finish(start(path), [3, 0, 5, 2, 1, 4])
    assert read(path) == [row | {"generate": f"answer {i}"} for i, row in enumerate(ROWS)]
    names = {"AddSub.jsonl", "AddSub.jsonl.settings.json", ".AddSub.jsonl.lock"}
    assert {file.name for file in path.parent.iterdir()} == names


def test_what_a_crash_left_is_kept_and_only_the_rest_is_missing(path):
    first = start(path)
    first.add(4, "answer 4")
    first.add(1, "answer 1")
    with open(f"{path}.part0", "a") as part:
        part.write('{"index": 2, "gene')  # cut short
    crash(first)
    again = start(path)
    assert again.missing == [0, 2, 3, 5]
    again.add(0, "answer 0")
    crash(again)
    last = start(path)
    assert last.missing == [2, 3, 5]
    finish(last, last.missing)
    assert [row["generate"] for row in read(path)] == [f"answer {i}" for i in range(6)]


def test_rows_that_have_an_answer_already_can_be_answered(path):
    rows = [row | {"generate": "old"} for row in ROWS]
    finish(start(path, rows=rows), range(6))
    assert [row["generate"] for row in read(path)] == [f"answer {i}" for i in range(6)]
    assert start(path, rows=rows).missing == []


def test_rows_taken_out_of_a_finished_file_are_missing_again(path):
    finish(start(path), range(6))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[5] + lines[3] + lines[2][:20])
    again = start(path)
    assert again.missing == [2, 4, 5]  # of the two equal rows the first counts as answered
    finish(again, again.missing)
    assert len(read(path)) == 6


def test_parts_of_any_number_of_ranks_are_merged(path):
    main, other = start(path), reopen(path, rank=1)
    main.add(0, "answer 0")
    other.add(1, "answer 1")
    crash(main)
    assert start(path).missing == [2, 3, 4, 5]


def test_more_rows_may_follow_later(path):
    finish(start(path, rows=ROWS[:2]), [0, 1])
    again = start(path)
    assert again.missing == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="line 1: not one of the rows"):
        reopen(path, rows=ROWS[3:4])


def test_other_settings_are_refused_and_overwrite_begins_anew(path):
    finish(start(path), range(6))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="made with seed 0, now it is 1; give --overwrite"):
        reopen(path, settings=SETTINGS | {"seed": 1})
    assert path.read_bytes() == before
    again = start(path, SETTINGS | {"seed": 1}, overwrite=True)
    assert again.missing == list(range(6)) and not path.exists()


def test_a_start_that_ended_before_the_first_answer_binds_nobody(path):
    crash(start(path))
    predictions = start(path, SETTINGS | {"seed": 1})
    predictions.add(0, "x")
    crash(predictions)
    with pytest.raises(ValueError, match="made with seed 1, now it is 0"):
        reopen(path)


def test_a_file_of_unknown_origin_is_not_added_to(path):
    path.parent.mkdir()
    path.write_text(json.dumps(ROWS[0] | {"generate": "x"}))
    with pytest.raises(ValueError, match="give --overwrite"):
        reopen(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match="expected the path of a file"):
        reopen(path)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        *(("AddSub.jsonl", line, "line 1") for line in ('{"instruction": "other", "generate": "x"}', "3", "{]")),
        ("AddSub.jsonl", '{"instruction": "row 0"}', "line 1: field 'generate' is missing"),
        ("AddSub.jsonl.settings.json", '{"seed": ', "not valid JSON"),
        *(
            ("AddSub.jsonl.part0", f'{{"index": {index}, "generate": "x"}}', "line 1")
            for index in ("true", "9", "-1", "1.0", '"1"')
        ),
    ],
)
def test_damaged_files_are_named(path, name, line, message):
    finish(start(path), range(6))
    path.with_name(name).write_text(line + "\n")
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        reopen(path)


def test_two_commands_do_not_write_one_file(path):
    first = start(path)
    with pytest.raises(ValueError, match="AddSub.jsonl: another generate.py is writing it"):
        start(path)
    first.add(0, "answer 0")
    first.release()  # it gives up; what it has stays for the next one
    assert start(path).missing == [1, 2, 3, 4, 5]


def test_half_a_surrogate_pair_can_be_read_again_by_everyone(path):
    rows = [{"instruction": "lone \ud800", "input": "", "answer": "é"}]
    finish(start(path, rows=rows), [0])
    assert "é" in path.read_text(encoding="utf-8")
    assert [row.fields["instruction"] for row in read_rows(path)] == ["lone \ud800"]
    assert start(path, rows=rows).missing == []


def test_a_folder_that_not_all_processes_see_is_told(path, tmp_path):
    start(path).require_started()
    with pytest.raises(ValueError, match=f"{tmp_path / 'elsewhere'}: not the folder that the first process writes"):
        reopen(tmp_path / "elsewhere" / path.name).require_started()


def test_the_raw_text_of_an_answer_is_kept(path, tmp_path, monkeypatch):
    """A program continues its prompt: without the spaces it begins with it is another one."""
    monkeypatch.setattr(Tokenizer, "decode", lambda self, tokens: "    return x\n")
    files = ("--ckpt_dir", BASE, "--data_path", write_rows(tmp_path / "test.json", 2), "--save_path", path)
    script("generate.py", *files, "--max_gen_len", 2, "--device", "cpu", "--bf16", False)
    assert [row.texts for row in read_rows(path)] == [("    return x\n",)] * 2
