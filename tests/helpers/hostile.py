"""Damaged files: mutations of valid ones, drawn by hypothesis, and what a command may do with them.

The property of every test: either one sentence that names a file and no traceback, or a right result; and no file is
changed, made or removed beside what a success writes.
"""

import copy
import hashlib
import io
import json
import runpy
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from commands import REPO

MAINS = {name: runpy.run_path(str(REPO / f"{name}.py"))["main"] for name in ("finetune", "extract_adapter", "generate")}


def hostile(examples: int) -> settings:
    """The same inputs in every run, and nothing timed."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=checks)


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder, with a hash of its content."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def sentence_of(call: Callable[[], Any], *names: str) -> str | None:
    """The one sentence with which a reading function refuses its input, which has one of the names in it; else None."""
    try:
        call()
    except ValueError as error:
        sentence = str(error)
        assert "\n" not in sentence and len(sentence) < 1000 and any(name in sentence for name in names), sentence
        return sentence
    return None


def refusal(main: Callable[[list[str]], None], words: list[Any], *names: str) -> str | None:
    """The same of a command's main function, in this process."""
    stderr = io.StringIO()
    with redirect_stderr(stderr), redirect_stdout(io.StringIO()):
        try:
            main([str(word) for word in words])
            status = 0
        except SystemExit as end:
            status = end.code or 0
    errors = [line for line in stderr.getvalue().splitlines() if line.startswith("error: ")]
    assert "Traceback" not in stderr.getvalue() and len(errors) == (status != 0) and status in (0, 1, 2), stderr
    assert not errors or (len(errors[0]) < 1000 and any(name in errors[0] for name in names)), errors
    return errors[0] if errors else None


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """A file that is empty, cut short, has a bit flipped, a piece taken out or overwritten, or is of another kind."""
    at, kind = (
        draw(st.integers(0, len(data) - 1)),
        draw(st.sampled_from(("cut", "flip", "flip", "out", "over", "other"))),
    )
    return {
        "cut": data[:at],
        "flip": data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :],
        "out": data[:at] + data[at + 8 :],
        "over": data[:at] + b"\0" * 64 + data[at + 64 :],
        "other": draw(st.sampled_from((b"", b"hello\n", b"\xff\xfe", b"[]", saved([1]), saved({})))),
    }[kind]


VALUES = (None, True, 0, 1, -1, 2, 3, 1.5, 1e308, 10**19, [], {}, [1], "", "x", "0-3", "None", "a\nerror: b", "é" * 999)


@st.composite
def json_texts(draw, valid: dict[str, Any]) -> bytes:
    """A JSON object with another value or without a key, with an unknown or a doubled one, or damaged bytes."""
    value = copy.deepcopy(valid)
    kind, key = draw(st.sampled_from(("value", "value", "missing", "unknown", "twice", "bytes"))), draw(keys(value))
    if kind == "bytes":
        return draw(damaged(json.dumps(value).encode()))
    if kind == "twice":
        return json.dumps(value | {"@": 7}).replace('"@"', json.dumps(key)).encode()
    if kind == "value":
        value[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    else:
        removed = value.pop(key)
        value |= {f"{key}x": removed} if kind == "unknown" else {}
    return json.dumps(value).encode()


@st.composite
def json_lines(draw, valid: list[dict[str, Any]]) -> bytes:
    """JSON lines with a fault in one of them, or between them."""
    lines = [json.dumps(row).encode() for row in valid]
    if draw(st.booleans()):
        return draw(damaged(b"".join(line + b"\n" for line in lines)))
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = draw(json_texts(valid[at]))
    return b"".join(line + b"\n" for line in lines)


def keys(value: dict[str, Any]) -> st.SearchStrategy[str]:
    return st.sampled_from(sorted(value))


def saved(value: Any) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@st.composite
def torch_files(draw, valid: dict[str, Tensor]) -> bytes:
    """What torch.save writes of `valid`, damaged, or with a tensor that is missing, renamed, or another one."""
    state, key = dict(valid), draw(keys(valid))
    if draw(st.booleans()):
        return draw(damaged(saved(valid)))
    tensor = state.pop(key)
    odd = (
        {"renamed": tensor},
        {},
        {key: tensor.flatten()},
        {key: torch.cat([tensor, tensor])},
        {key: tensor[:0].clone()},
        {key: tensor.long()},
        {key: tensor + 1j},
        {key: tensor.to_sparse()},
        {key: tensor.to("meta")},
        {key: tensor * torch.nan},
        {key: tensor.double() * 1e300 + 1e300},
        {key: "text"},
        {key: None},
        {key: [tensor]},
    )
    return saved(state | draw(st.sampled_from(odd)))
