"""Reading and writing files: locks, leftovers, checksums, JSON that readers do not agree about, values in messages."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from hostile import compressed, saved
from moa.archive import checksum_problem, require_intact
from moa.files import atomic_write, claim, file_hash, load_tensors, read_json, release, remove_stale_temp_files
from moa.reading import parse_json, read_text, safe_name, short_repr

VALID = {"small": torch.arange(4.0), "large": torch.zeros(2**19)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.pth"
    path.write_bytes(saved(VALID))
    return path


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit_in_a_tensor_is_named(file: Path) -> None:
    require_intact(file)
    flip(file, file.read_bytes().index(VALID["small"].numpy().tobytes()) + 5)
    with pytest.raises(ValueError, match=r"file.pth: damaged \(checksum of archive/data/0 does not match\)"):
        load_tensors(file)
    with pytest.raises(ValueError, match="checksum of archive/data/0"):
        load_tensors(file, mmap=True)  # small enough to be looked at all the same


def test_large_tensors_that_stay_in_the_file_are_not_looked_at(file: Path) -> None:
    flip(file, file.stat().st_size // 2)
    assert checksum_problem(file) == "damaged (checksum of archive/data/1 does not match)"
    assert checksum_problem(file, whole=False) is None
    assert load_tensors(file, mmap=True).keys() == VALID.keys()


@pytest.mark.parametrize("mmap", [False, True])
def test_compressed_archives_are_refused_however_they_are_read(file: Path, mmap: bool) -> None:
    file.write_bytes(compressed(saved(VALID), zipfile.ZIP_DEFLATED))
    with pytest.raises(ValueError, match="is compressed, which torch.save does not do"):
        load_tensors(file, mmap)


def test_a_member_that_poses_as_a_folder_is_refused(file: Path) -> None:
    # Torch gives it memory that nobody has filled: whatever this process had there before
    data = file.read_bytes()
    entry = data.rindex(b"PK\1\2", 0, data.rindex(b"archive/data/0"))
    file.write_bytes(data[: entry + 38] + b"\x10" + data[entry + 39 :])
    with pytest.raises(ValueError, match="archive/data/0 is a folder"):
        load_tensors(file)


def test_a_second_directory_does_not_count(file: Path) -> None:
    hidden = compressed(saved(VALID), zipfile.ZIP_DEFLATED)
    for content in (saved(VALID) + hidden, hidden + saved(VALID), saved(VALID) + b"\0"):
        file.write_bytes(content)
        assert "damaged" in checksum_problem(file)


def test_what_torch_wrote_before_its_archives(file: Path) -> None:
    torch.save(VALID, file, _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="load and save it with a newer one"):
        load_tensors(file)


def test_trees_of_tensors_are_read_and_lose_their_gradients(file: Path) -> None:
    pair = (0.9, 0.95)
    value = {"a": torch.nn.Parameter(torch.ones(2)), "groups": [{"betas": pair}, {"betas": pair}], 7: None}
    torch.save(value, file)
    found = load_tensors(file)
    assert found["groups"] == value["groups"] and not found["a"].requires_grad


def test_a_lock_is_held_by_one_and_may_be_removed_by_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    held = claim(path, "taken")
    with pytest.raises(ValueError, match="^taken$"):
        claim(path, "taken")
    release(held)
    assert not path.exists()
    again = claim(path, "taken")
    with pytest.raises(ValueError, match="^taken$"):
        claim(path, "taken")
    again.close()  # as when the process ends: the file stays, and says nothing
    release(claim(path, "taken"))


def test_a_lock_that_its_holder_removes_meanwhile_is_not_held(tmp_path: Path, monkeypatch) -> None:
    path, opened = tmp_path / "lock", []

    def removed_after_opening(name: Path) -> object:
        file = open(name, "ab")  # noqa: SIM115
        if not opened:
            os.unlink(name)
        opened.append(file)
        return file

    monkeypatch.setattr("moa.files.open_to_append", removed_after_opening)
    held = claim(path, "taken")
    assert len(opened) == 2 and opened[0].closed and os.path.samestat(os.fstat(held.fileno()), os.stat(path))


def test_leftovers_of_killed_processes_go_and_nothing_else(tmp_path: Path) -> None:
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    names = {
        "dead": f".a.json.{int(gone.stdout)}.tmp",
        "my own": f".a.json.{os.getpid()}.tmp",
        "of another file": f".b.{int(gone.stdout)}.tmp",
        "one that runs": f".a.json.{os.getppid()}.tmp",
        "no number": ".a.json.x.tmp",
        "no temporary file": "a.json.12.tmp",
    }
    for name in names.values():
        (tmp_path / name).write_text("")
    remove_stale_temp_files(tmp_path, "a.json")
    left = {what for what, name in names.items() if (tmp_path / name).exists()}
    assert left == names.keys() - {"dead", "my own"}
    remove_stale_temp_files(tmp_path)
    assert not (tmp_path / names["of another file"]).exists() and len(list(tmp_path.iterdir())) == 3


def test_writing_does_not_follow_a_link(tmp_path: Path) -> None:
    mine, path = tmp_path / "mine", tmp_path / "a.json"
    mine.write_text("mine")
    path.symlink_to(mine)
    (tmp_path / f".a.json.{os.getpid()}.tmp").symlink_to(mine)
    atomic_write(path, b"{}")
    assert mine.read_text() == "mine" and read_json(path) == {} and not path.is_symlink()


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"a": NaN}', "NaN is no JSON value"),
        ('{"a": -Infinity}', "-Infinity is no JSON value"),
        ('{"a": 1e999}', "the number '1e999' is too large"),
        ('{"a": ' + "1" * 5000 + "}", "a number of 5000 digits"),
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' stands there twice"),
        ("[" * 101 + "]" * 101, "nested too deep"),
        ("[" * 200_000, "nested too deep"),
        ('{"a": 1,}', "Illegal trailing comma|Expecting property name"),
    ],
)
def test_json_that_is_none_or_that_readers_do_not_agree_about(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^here: not valid JSON \(({words}).*\)$"):
        parse_json(text, "here")


def test_json_that_is_fine() -> None:
    value = {"a": [1, 2.5, None, True, {"b": "\ud800"}], "n": 10**3000, "deep": json.loads("[" * 98 + "]" * 98)}
    assert parse_json(json.dumps(value), "here") == value


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for read in (read_text, read_json, load_tensors, file_hash):
        with pytest.raises(ValueError, match="pipe: (not a regular file|no such file)"):
            read(tmp_path / "pipe")


def test_values_are_shown_in_few_words() -> None:
    circle: list = []
    circle.append(circle)
    for value in ("x" * 10**6, 10**10_000, -(10**10_000), circle, [[1]] * 10**5, {"a": circle}, torch.zeros(3, 3)):
        assert len(short_repr(value)) <= 60 and "\n" not in short_repr(value)
    assert [short_repr(v) for v in (7, True, None, [1, "b"], 1.5)] == ["7", "True", "None", "[1, 'b']", "1.5"]
    assert short_repr("a\n") == r"'a\n'"
    assert safe_name("lora_rank") == "lora_rank" and safe_name("a\x1b[2J") == r"'a\x1b[2J'"
