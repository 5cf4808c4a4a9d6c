"""Files: written whole or not at all, locked against a second writer, read without executing anything in them."""

import contextlib
import hashlib
import json
import os
import re
import warnings
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from torch import Tensor

from moa.reading import parse_json, read_text, require_file


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, in a folder that is made if it is missing. OSError naming the file (disk full,
    read-only) leaves what was there before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):  # name the file that was asked for
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def remove_stale_temp_files(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes left of `atomic_write` in `folder`; only of the file `name` where one is given.

    Call it with the lock of the folder (of the file) held.
    """
    for file in folder.iterdir():
        match = re.fullmatch(r"\.(.+)\.\d+\.tmp", file.name)
        if match and name in (None, match[1]):
            file.unlink(missing_ok=True)


def lock(path: Path, taken: str) -> AcquireReturnProxy:
    """Hold `path`, an empty file, against other processes until the context that is returned ends.

    The system lets go of it however the process ends; the file stays. ValueError(taken) where another one holds it.
    """
    try:
        return FileLock(path, timeout=0).acquire()
    except Timeout:
        raise ValueError(taken) from None


def write_json(path: Path, value: Any) -> None:
    atomic_write(path, (json.dumps(value, indent=1) + "\n").encode())


def write_torch(path: Path, value: Any) -> None:
    """`torch.save`, whole or not at all."""
    buffer = BytesIO()
    torch.save(value, buffer)
    atomic_write(path, buffer.getbuffer())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. ValueError naming the file."""
    value = parse_json(read_text(path), str(path))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def load_tensors(path: Path, mmap: bool = False) -> dict[str, Any]:
    """A dictionary that `torch.save` wrote, on the CPU; no code in it is executed. ValueError naming the file.

    All checksums are compared, which torch does not do. mmap: leave the tensors in the file until they are used, and
    notice only that the file was cut short.
    """
    require_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = None if mmap else archive.testzip()
            folders = [info.filename for info in archive.infolist() if info.external_attr & 0x10]
        if damaged is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged} does not match")
        if folders:  # torch would give such a tensor memory with anything in it
            raise zipfile.BadZipFile(f"{folders[0]} is marked as a folder")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about files that it then refuses
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # zipfile and torch raise a dozen types for a damaged file
        if isinstance(error, OSError) and error.filename is not None:
            raise
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise ValueError(f"{path}: cannot be read: it needs more memory than there is") from None
        reason = f" ({error})" if isinstance(error, zipfile.BadZipFile) else ""
        raise ValueError(f"{path}: damaged, cut short or not what torch.save writes of tensors{reason}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a dictionary, found {type(value).__name__}")
    return {key: tensor.detach() if isinstance(tensor, Tensor) else tensor for key, tensor in value.items()}


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hex. ValueError where there is none."""
    require_file(Path(path))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
