"""Reading and writing files: damaged ones, locks, leftovers of killed processes, values in messages."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moa.files import atomic_write, file_hash, load_tensors, lock, read_json, remove_stale_temp_files
from moa.reading import parse_json, read_text, safe_name, short_repr

REPO = Path(__file__).resolve().parents[1]
VALID = {"a": torch.tensor([1.5, -2.0]), "b": torch.arange(3.0)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.pth"
    torch.save(VALID, path)
    return path


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any):
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple:
        return self.function, self.arguments


def test_one_flipped_bit_anywhere_is_noticed_or_harmless(file: Path) -> None:
    content, refused = file.read_bytes(), 0
    for i in range(0, len(content), 3):
        file.write_bytes(content[:i] + bytes([content[i] ^ 1 << i % 8]) + content[i + 1 :])
        try:
            loaded = load_tensors(file)
        except ValueError as error:
            assert str(error).startswith(f"{file}: ") and "\n" not in str(error)
            refused += 1
        else:
            assert loaded.keys() == VALID.keys() and all(torch.equal(loaded[k], VALID[k]) for k in VALID), i
    assert refused > len(content) // 12


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("what", ["empty", "cut short", "text", "pickle", "old format", "a list"])
def test_what_is_no_file_of_tensors_is_named(file: Path, what: str, mmap: bool) -> None:
    if what in ("old format", "a list"):
        torch.save([1] if what == "a list" else VALID, file, _use_new_zipfile_serialization=what == "a list")
    else:
        contents = {"empty": b"", "cut short": file.read_bytes()[:-100], "text": b"x" * 99, "pickle": pickle.dumps({})}
        file.write_bytes(contents[what])
    words = "expected a dictionary, found list" if what == "a list" else "damaged, cut short or not what torch.save"
    with pytest.raises(ValueError, match=f"^{file}: {words}"):
        load_tensors(file, mmap)


@pytest.mark.parametrize("mmap", [False, True])
def test_nothing_in_a_file_is_executed(file: Path, tmp_path: Path, mmap: bool) -> None:
    trace = tmp_path / "trace"
    for call in (Call(os.system, f"touch {trace}"), Call(exec, f"open({str(trace)!r}, 'w')")):
        torch.save(VALID | {"c": call}, file)
        with pytest.raises(ValueError, match=f"^{file}: damaged, cut short or not what torch.save"):
            load_tensors(file, mmap)
        assert not trace.exists()
        torch.load(file, weights_only=False)  # would have worked
        trace.unlink()


def test_parameters_come_back_as_tensors_without_gradients(file: Path) -> None:
    torch.save({"a": torch.nn.Parameter(torch.ones(2)), "betas": [(0.9, 0.95)]}, file)
    loaded = load_tensors(file)
    assert loaded["betas"] == [(0.9, 0.95)] and type(loaded["a"]) is torch.Tensor and not loaded["a"].requires_grad


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    code = "import sys; from pathlib import Path; from moa.files import lock; lock(Path(sys.argv[1]), 'taken')"
    other = [sys.executable, "-c", code, str(path)]
    with lock(path, "taken"):
        result = subprocess.run(other, capture_output=True, text=True, cwd=REPO)
        assert result.returncode == 1 and result.stderr.endswith("ValueError: taken\n")
    assert subprocess.run(other, cwd=REPO).returncode == 0  # and lets go of it at its end
    with lock(path, "taken"), pytest.raises(ValueError, match="^taken$"), lock(path, "taken"):
        pass


def test_leftovers_of_killed_processes_go_and_nothing_else(tmp_path: Path) -> None:
    leftover, other = tmp_path / ".a.json.12.tmp", tmp_path / ".b.12.tmp"
    kept = {tmp_path / name for name in (".a.json.x.tmp", "a.json.12.tmp", "a.json")}
    for path in (leftover, other, *kept):
        path.touch()
    remove_stale_temp_files(tmp_path, "a.json")
    assert set(tmp_path.iterdir()) == {other, *kept}
    remove_stale_temp_files(tmp_path)
    assert set(tmp_path.iterdir()) == kept


def test_a_missing_folder_is_made(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a" / "b" / "c.json", b"{}")
    assert read_json(tmp_path / "a" / "b" / "c.json") == {}
    with pytest.raises(OSError) as caught:
        atomic_write(tmp_path / "a" / "b" / "c.json" / "d.json", b"{}")
    assert caught.value.filename == str(tmp_path / "a" / "b" / "c.json" / "d.json")


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    atomic_write(path, b"{}")
    with pytest.raises(TypeError):
        atomic_write(path, "not bytes")
    assert read_json(path) == {} and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError) as caught:
        atomic_write(Path("/dev/full/a.json"), b"{}")
    assert caught.value.filename == "/dev/full/a.json"


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"a": ' + "1" * 5000 + "}", "Exceeds the limit"),
        ("[" * 200_000, "maximum recursion depth"),
        ('{"a": 1,}', "Illegal trailing comma|Expecting property name"),
    ],
)
def test_what_is_no_json_is_named(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^here: not valid JSON \(({words}).*\)$"):
        parse_json(text, "here")


def test_json_is_read() -> None:
    value = {"a": [1, 2.5, None, True, {"b": "\ud800"}]}
    assert parse_json(json.dumps(value), "here") == value


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (read_text, read_json, load_tensors, file_hash):
        with pytest.raises(ValueError, match="pipe: (is not a regular file|no such file)"):
            read(tmp_path / "pipe")


def test_values_are_cut_in_messages() -> None:
    for value in ("x" * 10**4, [[1]] * 10**4, torch.zeros(3, 3)):
        assert len(short_repr(value)) <= 60 and "\n" not in short_repr(value)
    assert [short_repr(v) for v in (7, None, [1, "b"], "a\n")] == ["7", "None", "[1, 'b']", r"'a\n'"]
    assert safe_name("lora_rank") == "lora_rank" and safe_name("a\x1b[2J") == r"'a\x1b[2J'"
