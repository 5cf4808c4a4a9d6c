"""Files: written whole or not at all, read without executing anything in them."""

import contextlib
import fcntl
import hashlib
import json
import os
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch


def write_file(path: Path, content: bytes) -> None:
    """Put a file in place whole or not at all. OSError (disk full, read-only) leaves what was there before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # about the file that was asked for
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def claim(path: Path, taken: str) -> IO[bytes]:
    """Hold `path`, an empty file that is made where it is not there, against other processes for as long as the file
    returned is open; the system lets go of it however the process ends. ValueError(taken) where another holds it. On a
    file system that has no locks nothing is held."""
    file = open(path, "ab")  # noqa: SIM115 - open as long as it is held
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(taken) from None
    except OSError:
        pass
    return file


def write_json(path: Path, value: Any) -> None:
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())


def write_torch(path: Path, value: Any) -> None:
    """`torch.save`, whole or not at all."""
    buffer = BytesIO()
    torch.save(value, buffer)
    write_file(path, buffer.getbuffer())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. ValueError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_torch(path: Path, mmap: bool = False) -> dict[str, Any]:
    """A dictionary that `torch.save` wrote, on the CPU, without executing anything in it. ValueError naming the file.

    mmap: leave tensors in the file until they are used.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception:  # torch's reader raises half a dozen types for a damaged file
        raise ValueError(f"{path}: cannot be read: damaged, or not what torch.save writes of plain tensors") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a dictionary, found {type(value).__name__}")
    return value


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hex. ValueError where there is none."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{path}: no such file") from None
