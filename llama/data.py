"""Rows of instruction data: reading them, the prompt template, and the tokens and labels they become."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llama.tokenizer import Tokenizer
from moa.reading import parse_json, read_text

IGNORE_INDEX = -100  # label of a position that is not learned


def format_prompt(instruction: str, input: str = "") -> str:
    """Alpaca's template; the parts about an input stand only where there is one."""
    pairing = ", paired with an input that provides further context" if input else ""
    return (
        f"Below is an instruction that describes a task{pairing}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{input}\n\n" if input else "") + "### Response:"
    )


class Example(NamedTuple):
    """One row to learn: tokens from BOS to EOS, labels aligned with them (IGNORE_INDEX on the prompt)."""

    tokens: list[int]
    labels: list[int]
    prompt_len: int


def read_rows(path: str | Path, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of a JSON list or of JSON lines, each with these text fields. ValueError names the file, row and field.

    Rows count from 1 (JSON lines: the line's number).
    """
    path = Path(path)
    text = read_text(path)
    numbered = _parse_list(path, text) if text.lstrip().startswith("[") else _parse_lines(path, text)
    if not numbered:
        raise ValueError(f"{path}: empty, expected rows of {', '.join(fields)}")
    for place, row in numbered:
        if not isinstance(row, dict):
            raise ValueError(f"{path}: {place}: expected an object, found {type(row).__name__}")
        for field in fields:
            if field not in row:
                raise ValueError(f"{path}: {place}: field {field!r} is missing")
            if not isinstance(row[field], str):
                raise ValueError(f"{path}: {place}: field {field!r} must be text, not {type(row[field]).__name__}")
    return [row for _, row in numbered]


def _parse_list(path: Path, text: str) -> list[tuple[str, Any]]:
    return [(f"row {i}", row) for i, row in enumerate(parse_json(text, str(path)), 1)]


def _parse_lines(path: Path, text: str) -> list[tuple[str, Any]]:
    # Not splitlines(): that also cuts at characters which JSON allows inside a text
    lines = [(f"line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(place, parse_json(line, f"{path}: {place}")) for place, line in lines]


def encode_prompt(tokenizer: Tokenizer, row: dict[str, Any], room: int) -> list[int]:
    """BOS and the prompt of a row. Its input is cut from its end until the prompt has at most `room` tokens; the result
    is longer where even the prompt without an input is."""
    instruction, input = row["instruction"], row["input"]
    tokens = tokenizer.encode(format_prompt(instruction, input), bos=True)
    kept = tokenizer.encode(input) if len(tokens) > room else []
    while len(tokens) > room and input:
        kept = kept[: max(0, len(kept) - (len(tokens) - room))]
        input = tokenizer.decode(kept).rstrip("\ufffd")  # half a character may be left at the cut
        tokens = tokenizer.encode(format_prompt(instruction, input), bos=True)
    return tokens


def encode_example(tokenizer: Tokenizer, row: dict[str, Any], max_seq_len: int) -> Example | None:
    """Tokens and labels of a training row; None where it does not fit `max_seq_len` even without its input.

    Prompt and answer are tokenised apart: the boundary seen in training is the one met in generation.
    """
    answer = tokenizer.encode(row["output"], eos=True)
    prompt = encode_prompt(tokenizer, row, max_seq_len - len(answer))
    if len(prompt) + len(answer) > max_seq_len:
        return None
    return Example(prompt + answer, [IGNORE_INDEX] * len(prompt) + answer, len(prompt))
