"""Rows, the prompt template and label masks."""

import json

import pytest

from llama.data import IGNORE_INDEX, encode_example, encode_prompt, format_prompt
from llama.tokenizer import Tokenizer
from moa.reading import read_rows
from tiny import BASE

FIELDS = ("instruction", "input", "output")
ROW = {"instruction": "Add 1 and 2", "input": "", "output": "3"}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(BASE / "tokenizer.model")


def test_template_without_input():
    assert format_prompt("Do it") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo it\n\n### Response:"
    )


def test_template_with_input():
    assert format_prompt("Do it", "on this") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nDo it\n\n### Input:\non this\n\n### Response:"
    )


def test_example_is_bos_prompt_answer_eos_with_labels_on_the_answer(tokenizer):
    example = encode_example(tokenizer, ROW, 300)
    prompt = tokenizer.encode(format_prompt("Add 1 and 2"))
    answer = tokenizer.encode("3")
    assert example.tokens == [tokenizer.bos_id, *prompt, *answer, tokenizer.eos_id]
    assert example.labels == [IGNORE_INDEX] * (len(prompt) + 1) + answer + [tokenizer.eos_id]
    assert example.prompt_len == len(prompt) + 1
    assert encode_prompt(tokenizer, ROW, 300) == example.tokens[: example.prompt_len]


@pytest.mark.parametrize("text", ["x" * 200, "äöü€" * 60])
def test_input_is_cut_from_its_end_to_fit(tokenizer, text):
    row = ROW | {"input": "begin " + text}
    for limit in (260, 281, 302):
        example = encode_example(tokenizer, row, limit)
        assert limit - 4 < len(example.tokens) <= limit  # up to a character's bytes are given up
        shown = tokenizer.decode(example.tokens)
        kept = shown.split("### Input:\n")[1].split("\n\n### Response:")[0]
        assert row["input"].startswith(kept) and kept.startswith("begin") and "\ufffd" not in kept
        assert shown.endswith("### Response:3<|end_of_text|>")


def test_input_can_vanish_and_then_its_heading_does(tokenizer):
    bare = encode_example(tokenizer, ROW, 300)
    example = encode_example(tokenizer, ROW | {"input": "y" * 300}, len(bare.tokens))
    assert example.tokens == bare.tokens


def test_what_does_not_fit_is_left_out(tokenizer):
    whole = len(encode_example(tokenizer, ROW, 300).tokens)
    assert encode_example(tokenizer, ROW, whole) is not None
    assert encode_example(tokenizer, ROW, whole - 1) is None
    assert encode_example(tokenizer, ROW | {"output": "z" * 400}, 300) is None


def test_json_list_and_json_lines_are_read(tmp_path):
    rows = [ROW, ROW | {"output": "\u2028 line separators inside a text are no line ends", "extra": 1}]
    as_list, as_lines = tmp_path / "a.json", tmp_path / "a.jsonl"
    as_list.write_text(json.dumps(rows, indent=1))
    as_lines.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", encoding="utf-8")
    assert read_rows(as_list, FIELDS) == read_rows(as_lines, FIELDS) == rows


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty"),
        ("[]", "empty"),
        ("[{]", "not valid JSON"),
        ('{\n "data": []\n}', "one JSON value over several lines, not a list of rows nor a row on each"),
        ('{"instruction": "a", "input": "", "output": "b"}\n{"instr', "line 2: not valid JSON"),
        ('[{"instruction": "a", "input": "", "output": "b"}, {"instruction": "a", "input": ""}]', "row 2.*'output'"),
        ('[{"instruction": "a", "output": "b"}]', "row 1.*'input' is missing"),
        ('[{"instruction": 7, "input": "", "output": "b"}]', "row 1.*'instruction' must be text, not int"),
        ('{"instruction": "a", "input": "", "output": "b"}\n\n[1]', "line 3.*expected an object"),
        ("[" * 100_000, "not valid JSON"),
        ('{"instruction": "a", "input": "", "output": "b", "n": 1' + "0" * 5000 + "}", "line 1: .*Exceeds the limit"),
    ],
)
def test_bad_rows_are_named(tmp_path, content, words):
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=words) as error:
        read_rows(path, FIELDS)
    assert str(path) in str(error.value)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "latin.json").write_bytes('[{"instruction": "é"}]'.encode("latin-1"))
    for path, words in (("none.json", "no such file"), ("latin.json", "not UTF-8"), (".", "not a regular file")):
        with pytest.raises(ValueError, match=words):
            read_rows(tmp_path / path, FIELDS)
