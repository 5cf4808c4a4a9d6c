"""Damaged and hostile files: mutations of valid ones, drawn by hypothesis, and what a command may do with them.

The property of every test: either one sentence that names a file and no traceback, or a right result; and no file is
changed, made or removed beside what a success writes.
"""

import copy
import hashlib
import io
import json
import os
import pickle
import runpy
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from commands import REPO


def hostile(examples: int) -> settings:
    """The same inputs in every run, and nothing timed."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=checks)


# What a command did


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder, with what it holds or where it leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path.relative_to(folder))] = "folder" if path.is_dir() else "special"
    return found


def sentence_of(call: Callable[[], Any], *names: str) -> str | None:
    """The one sentence with which a reading function refuses what it was given, and which has one of the names in it;
    None where it does not refuse."""
    try:
        call()
    except ValueError as error:
        sentence = str(error)
        assert "\n" not in sentence and len(sentence) < 1000 and any(name in sentence for name in names), sentence
        return sentence
    return None


MAINS = {name: runpy.run_path(str(REPO / f"{name}.py"))["main"] for name in ("finetune", "extract_adapter", "generate")}


def refusal(main: Callable[[list[str]], None], words: list[Any], *names: str) -> str | None:
    """The same of a command's main function, in this process."""
    stderr = io.StringIO()
    with redirect_stderr(stderr), redirect_stdout(io.StringIO()):
        try:
            main([str(word) for word in words])
            status = 0
        except SystemExit as end:
            status = end.code or 0
    said = stderr.getvalue()
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said and len(errors) == (status != 0) and status in (0, 1, 2), (status, said)
    if not errors:
        return None
    assert len(errors[0]) < 1000 and any(name in errors[0] for name in names), errors[0]
    return errors[0]


# Text

_DEEP = tuple("[" * depth + "]" * depth for depth in (50, 900, 990, 100_000))
_RAW = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 5000, "0x10", "01", "'a'", "", "}", *_DEEP)
_VALUES = (
    *(None, True, False, 0, 1, -1, 2, 3, 1.0, 1.5, -0.0, 1e308, 5e-324, 10**7, 10**19, 2**63, -(10**30), 10**400, []),
    *({}, [1], {"a": 1}, [[]], "", "x", "1", "0-3", "0-9999999999", "-", "\ud800", "a" * 5000, "\x00", "/etc/passwd"),
    *("../../x", "a\nerror: b", "\x1b[2J", "None", "nan", "all", "softmax", "lora", "custom", "Q,Q", ","),
)


def _places(value: Any, at: tuple = ()) -> list[tuple]:
    """The ways to every value inside a JSON value."""
    inside = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [])
    return [at] + [place for key, one in inside for place in _places(one, (*at, key))]


@st.composite
def json_texts(draw, valid: Any) -> bytes:
    """A JSON file like a valid one, with a fault: another value, key or spelling somewhere, or damaged bytes."""
    value = copy.deepcopy(valid)
    way = draw(st.sampled_from(("value", "value", "value", "raw", "raw", "key", "missing", "twice", "bytes")))
    place = draw(st.sampled_from([p for p in _places(value) if p or way in ("value", "raw")]))
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    if way == "bytes":
        return draw(damaged(json.dumps(value).encode()))
    if way == "value":
        new = copy.deepcopy(draw(st.sampled_from(_VALUES)))
        if not place:
            return json.dumps(new).encode()
        holder[place[-1]] = new
    elif way == "raw":
        raw = draw(st.sampled_from(_RAW))
        if not place:
            return raw.encode()
        holder[place[-1]] = "@raw@"
        return json.dumps(value).replace('"@raw@"', raw).encode()
    elif isinstance(holder, list):
        holder.pop(place[-1]) if way == "missing" else holder.append(holder[place[-1]])
    elif way == "key":
        holder[draw(st.sampled_from(("", "x", "\ud800", "method", "a\nerror: b", "k" * 5000)))] = holder.pop(place[-1])
    elif way == "missing":
        del holder[place[-1]]
    else:  # one that differs, under the same name
        holder[place[-1]], holder["@twice@"] = 7, holder[place[-1]]
        return json.dumps(value).replace('"@twice@"', json.dumps(place[-1])).encode()
    return json.dumps(value).encode()


@st.composite
def json_lines(draw, valid: list[Any]) -> bytes:
    """JSON lines with a fault in one of them, or between them."""
    lines = [json.dumps(row).encode() for row in valid]
    place = draw(st.integers(0, len(lines) - 1))
    way = draw(st.sampled_from(("line", "line", "line", "missing", "twice", "bytes")))
    if way == "bytes":
        return draw(damaged(b"".join(line + b"\n" for line in lines)))
    new = {"line": [draw(json_texts(valid[place]))], "missing": [], "twice": [lines[place]] * 2}[way]
    return b"".join(line + b"\n" for line in lines[:place] + new + lines[place + 1 :])


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """A file that is cut short, has a bit flipped, a piece taken out, overwritten or put in, or something behind it."""
    way, at = draw(st.sampled_from(("cut", "flip", "flip", "flip", "out", "over", "in", "behind"))), 0
    if data:
        at = draw(st.integers(0, len(data) - 1))
    piece = draw(st.sampled_from((b"\0", b"\xff\xfe", b"PK\5\6", b"\n", b"[" * 3000, b"\x80\x02", b"\0" * 64)))
    return {
        "cut": data[:at],
        "flip": data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :] if data else b"",
        "out": data[:at] + data[at + 1 + len(piece) :],
        "over": data[:at] + piece + data[at + len(piece) :],
        "in": data[:at] + piece + data[at:],
        "behind": data + piece,
    }[way]


# Files of torch


def saved(value: Any) -> bytes:
    """What torch.save writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


class _Call:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable, *given: Any):
        self.function, self.given = function, given

    def __reduce__(self):
        return self.function, self.given


class _Storage:
    """Where a tensor's numbers are: record `key`, said to hold `n` of them."""

    def __init__(self, key: str, n: int):
        self.key, self.n = key, n


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Storage):
            return ("storage", torch.FloatStorage, value.key, "cpu", value.n)
        return None


def forged(value: Any, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive that says whatever `value` pickles to, with correct checksums."""
    file, pickled = io.BytesIO(), io.BytesIO()
    _Pickler(pickled, 2).dump(value)
    with zipfile.ZipFile(file, "w", compression) as archive:
        ends = {"byteorder": b"little", "version": b"3\n"}
        for name, content in ({"data.pkl": pickled.getvalue()} | records | ends).items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def _tensor(n: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> _Call:
    rebuild = torch._utils._rebuild_tensor_v2
    return _Call(rebuild, _Storage("0", n), offset, shape, strides, False, OrderedDict())


def _bomb() -> list:
    """Few bytes that hold 2**60 numbers."""
    value: list = [1] * 20
    for _ in range(60):
        value = [value, value]
    return value


def _itself() -> dict:
    value: dict = {}
    value["itself"] = value
    return value


def evil_values(shape: tuple[int, ...], trace: Path) -> dict[str, Any]:
    """What can stand in a tensor's place, for `forged`; what would be executed makes the file `trace`."""
    size = torch.Size(shape).numel()
    return {
        "no numbers, any size": _tensor(4, (2**40,), (0,)),
        "one number for all": _tensor(4, shape, (0,) * len(shape)),
        "more than there is": _tensor(2**20, shape, (1,) * len(shape)),
        "before the beginning": _tensor(4, (2,), (1,), -3),
        "strides backwards": _tensor(size, shape, (-1,) * len(shape)),
        "a terabyte": _Call(torch.Tensor, 2**38),
        "a command": _Call(os.system, f"touch {trace}"),
        "a program": _Call(exec, f"open({str(trace)!r}, 'w')"),
        "a function": os.system,
        "text": "numbers",
        "a number": 3,
        "nothing": None,
        "bytes": bytearray(100),
        "a set": {1, 2},
        "very deep": _bomb(),
        "itself": _itself(),
        "a key with an error in it": {"a\nerror: b": 1},
        "a type": torch.float32,
    }


def odd_tensors(tensor: Tensor) -> dict[str, Tensor]:
    """Tensors that are not the one that belongs there."""
    attribute = tensor.clone()
    attribute.numel = 5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that this may change
        nested = torch.nested.nested_tensor([tensor, tensor])
    return {
        "longer": torch.cat([tensor, tensor]),
        "flat": tensor.flatten(),
        "deeper": tensor[None],
        "empty": tensor[:0].clone(),
        "of nothing": torch.zeros(0, 2**40),
        "a scalar": torch.tensor(1.0),
        "whole numbers": tensor.long(),
        "truth": tensor > 0,
        "complex": tensor + 1j,
        "sparse": tensor.to_sparse(),
        "without numbers": tensor.to("meta"),
        "repeated": tensor[:1].clone().expand(3, *tensor.shape[1:]),
        "NaN": tensor.clone().index_fill_(0, torch.tensor(0), torch.nan),
        "infinite": tensor.clone().index_fill_(0, torch.tensor(0), torch.inf),
        "beyond float32": tensor.double() * 1e300,
        "bytes": tensor.to(torch.float8_e4m3fn),
        "with an attribute": attribute,
        "nested": nested,
    }


@st.composite
def torch_files(draw, valid: dict[str, Any], trace: Path) -> bytes:
    """A file like what torch.save writes of `valid`, a (nested) dictionary of tensors, with a fault."""
    way = draw(st.sampled_from(("bytes", "bytes", "tensor", "forged", "key", "compressed", "other")))
    data = saved(valid)
    if way == "bytes":
        return draw(damaged(data))
    if way == "compressed":
        return compressed(data, zipfile.ZIP_DEFLATED)
    if way == "other":
        others = (b"", b"hello", pickle.dumps({"a": 1}), pickle.dumps(_Call(os.system, f"touch {trace}")), data[::-1])
        old = io.BytesIO()
        torch.save(valid, old, _use_new_zipfile_serialization=False)
        return draw(st.sampled_from((*others, old.getvalue(), saved([1]), saved({}), saved({1: 2}))))
    value = copy.deepcopy(valid)
    holder = value
    while True:
        key = draw(st.sampled_from(sorted(holder, key=str)))
        if not isinstance(holder[key], dict) or not holder[key] or draw(st.integers(0, 5)) == 0:
            break
        holder = holder[key]
    tensor = holder[key] if isinstance(holder[key], Tensor) else torch.ones(4, 3)
    if way == "key":
        new = draw(st.sampled_from(("", "x", 5, None, (1, 2), "a\nerror: b", "\x1b[2J", "k" * 5000)))
        holder[new] = holder.pop(key) if draw(st.booleans()) else holder[key]
        return saved(value)
    if way == "tensor":
        odd = odd_tensors(tensor)
        holder[key] = odd[draw(st.sampled_from(sorted(odd)))]
        return saved(value)
    evil = evil_values(tuple(tensor.shape), trace)
    holder[key] = evil[draw(st.sampled_from(sorted(evil)))]
    return forged(*_without_tensors(value))


def _without_tensors(value: Any) -> tuple[Any, dict[str, bytes]]:
    """The same with its tensors as `forged` takes them, and their records."""
    records = {"data/0": b"\0" * 16}

    def walk(one: Any) -> Any:
        if isinstance(one, Tensor):
            key = str(len(records))
            records[f"data/{key}"] = one.contiguous().numpy().tobytes()
            shape, strides = tuple(one.shape), one.contiguous().stride()
            rebuild = torch._utils._rebuild_tensor_v2
            return _Call(rebuild, _Storage(key, one.numel()), 0, shape, strides, False, OrderedDict())
        if type(one) is dict and "itself" not in one:
            return {key: walk(inside) for key, inside in one.items()}
        return one

    return walk(value), records


def compressed(data: bytes, compression: int, more: int = 2**21) -> bytes:
    """The same archive, compressed, one record of it blown up by `more` zeros."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(file, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name) + (b"\0" * more if name.endswith("data/0") else b""))
    return file.getvalue()
