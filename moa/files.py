"""Files: written whole or not at all, read without executing anything in them."""

import hashlib
import json
import os
from io import BytesIO
from pathlib import Path
from typing import Any

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
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
    except Exception as error:  # torch's reader raises half a dozen types for a damaged file
        line = (str(error) or type(error).__name__).splitlines()[0][:160]
        raise ValueError(f"{path}: cannot be read, damaged or of another kind ({line})") from None
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
