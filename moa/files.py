"""Files: written whole or not at all, read without executing anything in them."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from moa.archive import require_intact
from moa.reading import parse_json, read_text


def atomic_write(path: Path, content: bytes) -> None:
    """Put a file in place whole or not at all. OSError (disk full, read-only) leaves what was there before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # "x" makes a file, and follows no link that lies in its place
        with open(temporary, "xb") as file:
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


def remove_stale_temp_files(folder: Path, name: str | None = None) -> None:
    """Remove what processes left in `folder` that were killed in `atomic_write`; only of the file `name` where one is
    given. For who holds the folder (the file) by `claim`. What a process that still runs may be writing stays."""
    for file in folder.iterdir():
        match = re.fullmatch(r"\.(.+)\.(\d{1,10})\.tmp", file.name)
        if match and name in (None, match[1]) and not _runs_elsewhere(int(match[2])):
            file.unlink(missing_ok=True)


def _runs_elsewhere(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def claim(path: Path, taken: str) -> IO[bytes]:
    """Hold `path`, an empty file that is made where it is not there, against other processes for as long as the file
    returned is open; the system lets go of it however the process ends. `release` removes it too. ValueError(taken)
    where another holds it. On a file system that has no locks nothing is held."""
    while True:
        file = open_to_append(path)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(taken) from None
        except OSError:
            return file
        # Its holder may have removed it between our two calls: then we hold what nobody else will look at.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file
        file.close()


def release(file: IO[bytes]) -> None:
    """Let go of what `claim` returned, and remove the file."""
    with contextlib.suppress(OSError):
        os.unlink(file.name)
    file.close()


def open_to_append(path: Path) -> IO[bytes]:
    """A file to write at its end, made where it is not there. OSError naming it; ValueError where it is a link, which
    would lead the writing elsewhere."""
    try:
        return open(path, "ab", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW, 0o666))
    except OSError:
        if path.is_symlink():
            raise ValueError(f"{path}: is a symbolic link, which is not written through") from None
        raise


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
    """A dictionary that `torch.save` wrote, on the CPU, without executing anything in it: a tree of dictionaries, lists
    and tuples with plain tensors, numbers and texts in it. ValueError naming the file, also where its content does not
    match the checksums in it.

    mmap: leave tensors in the file until they are used; the checksums of large ones are then not looked at.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    require_intact(path, whole=not mmap)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about files that it then refuses
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch's reader raises half a dozen types for a damaged file
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise ValueError(f"{path}: cannot be read: it needs more memory than there is") from None
        raise ValueError(f"{path}: cannot be read: damaged, or not what torch.save writes of plain tensors") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a dictionary, found {type(value).__name__}")
    for name, problem in _problems(value, path.stat().st_size):
        raise ValueError(f"{path}: {name} {problem}")
    return value


def tensor_problem(tensor: Tensor) -> str | None:
    """What makes a tensor other than a plain one on the CPU that holds each of its numbers; None where nothing does."""
    if type(tensor) not in (Tensor, nn.Parameter) or vars(tensor):
        return f"is not a plain tensor ({type(tensor).__name__})"
    if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return f"is not a plain tensor ({tensor.layout}, {tensor.dtype}, {tensor.device.type})"
    # A few bytes can pose as a tensor of any size: strides of 0
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"has shape {tuple(tensor.shape)}, but not as many numbers"
    return None


_CONTAINERS, _SCALARS = (dict, OrderedDict, list, tuple, torch.Size), (str, int, float, bool, bytes, type(None))


def _problems(value: Any, size: int) -> Iterator[tuple[str, str]]:
    """(name, problem) of what `load_tensors` refuses in a file of `size` bytes. Tensors lose their gradients."""
    seen: set[int] = set()
    left = [("it", 0, value)]
    while left:
        name, depth, one = left.pop()
        if isinstance(one, Tensor):
            problem = tensor_problem(one)
            if problem is None and one.untyped_storage().nbytes() > size:
                problem = "is larger than the file"
            if problem:
                yield name, problem
            one.requires_grad_(False)
        elif type(one) in _CONTAINERS:
            items = list(one.items() if isinstance(one, dict) else enumerate(one))
            # Few bytes can pose as very much, or without an end, by standing in many places
            if id(one) in seen and (len(items) > 16 or not all(type(v) in _SCALARS for _, v in items)):
                yield name, "stands there more than once"
            elif depth > 16:
                yield name, "is nested too deep"
            elif not all(type(k) is int or (type(k) is str and k.isprintable() and len(k) < 1000) for k, _ in items):
                yield name, "has a key that is no name"
            else:
                left += [(str(k) if depth == 0 else f"{name}.{k}", depth + 1, inside) for k, inside in items]
            seen.add(id(one))
        elif type(one) not in _SCALARS:
            yield name, f"is a {type(one).__name__}, expected tensors, numbers and texts"


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, in hex. ValueError where there is none."""
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
