"""Fetching a data set: download or copy, convert, check, and only then put in place."""

import http.client
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from corpus.catalogue import SOURCE, DataSet
from corpus.check import check_file, check_rows
from corpus.forms import FORMS, LARGEST, without_empty
from corpus.rows import write_rows

TRIES = 3
PAUSE = 1.0  # seconds before the second try, doubled before the third


@dataclass(frozen=True)
class Fetched:
    """file: where the rows lie. left_out: training rows without an instruction or output. new: not there before."""

    file: Path
    rows: int
    left_out: int
    new: bool


def fetch(
    data_set: DataSet,
    folder: str | Path,
    source: str = SOURCE,
    *,
    overwrite: bool = False,
    timeout: float = 30.0,
) -> Fetched:
    """Have the data set below `folder`, fetching it where it is not there yet.

    source: where its origin lies, the beginning of a URL or a folder. timeout: seconds without an answer. ValueError or
    OSError names the address or file and the reason; what was there before is then untouched.
    """
    file = data_set.file(folder)
    if file.exists():
        there = check_file(data_set, file)
        if not there.faults:
            return Fetched(file, there.rows, 0, new=False)
        if not overwrite:
            raise ValueError(f"{file} is there already, and not right: {there.faults[0]}; --overwrite replaces it")
    where = address(data_set, source)
    data = download(where, timeout) if _is_url(where) else _read(Path(where))
    try:
        rows = FORMS[data_set.form](data)
        kept = without_empty(rows) if data_set.kind == "train" else rows
        checked = check_rows(data_set, kept)
        if checked.faults:
            raise ValueError(checked.faults[0])
    except ValueError as error:
        raise ValueError(f"{where}: not what was expected: {error}") from None
    write_rows(file, kept)
    return Fetched(file, len(kept), len(rows) - len(kept), new=True)


def address(data_set: DataSet, source: str = SOURCE) -> str:
    """The URL or path of a data set's origin."""
    return f"{source.rstrip('/')}/{data_set.origin}"


def download(url: str, timeout: float, sleep: Callable[[float], None] = time.sleep) -> bytes:
    """The content of a URL, whole and at most LARGEST bytes. OSError names the URL and the reason.

    What may pass (no answer, a broken connection, a server's fault) is tried TRIES times.
    """
    for attempt in range(TRIES):
        if attempt:
            sleep(PAUSE * 2 ** (attempt - 1))
        try:
            return _get(url, timeout)
        except urllib.error.HTTPError as error:
            reason = f"HTTP status {error.code} ({error.reason})"
            if error.code < 500 and error.code != 429:  # the server means it
                break
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", None) or error
            reason = str(cause) or type(cause).__name__
            if isinstance(cause, socket.gaierror | ssl.SSLCertVerificationError):  # no such host, no network
                break
    raise OSError(f"{url}: {reason}")


def _get(url: str, timeout: float) -> bytes:
    with urllib.request.urlopen(url, timeout=timeout) as response:
        data = response.read(LARGEST + 1)
        length = response.headers.get("Content-Length", "")
    if len(data) > LARGEST:
        raise ValueError(f"{url}: more than {LARGEST // 2**20} MiB")
    if length.isdecimal() and len(data) < int(length):  # read() does not complain by itself
        raise OSError(f"the connection broke after {len(data)} of {length} bytes")
    return data


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise ValueError(f"{path}: more than {LARGEST // 2**20} MiB")
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None


def _is_url(source: str) -> bool:
    return source.startswith(("http://", "https://"))
