"""Fetching a data set: download or copy, check, convert, check again, and only then put in place."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from corpus.catalogue import SOURCE, DataSet
from corpus.check import check_file, check_rows, is_blank
from corpus.converters import convert


class Fetched(NamedTuple):
    """file: where the rows lie. left_out: training rows without an instruction or output. new: not there before."""

    file: Path
    rows: int
    left_out: int = 0
    new: bool = True


def fetch(
    data_set: DataSet,
    folder: str | Path,
    source: str = SOURCE,
    *,
    overwrite: bool = False,
    timeout: float = 30.0,
    retries: int = 2,
) -> Fetched:
    """Have the data set below `folder`, fetching it where it is not there yet.

    source: where its origin lies, the beginning of a URL or a folder. timeout: seconds without an answer. ValueError or
    OSError names the address or file and the reason; what was there before is then untouched.
    """
    from moa.files import atomic_write  # late: it loads torch

    file, url = data_set.file(folder), data_set.address(source)
    if file.exists():
        present = check_file(data_set, file)
        if not present.faults:
            return Fetched(file, present.rows, new=False)
        if not overwrite:
            raise ValueError(f"{file} is there already, and not right: {present.faults[0]}; --overwrite replaces it")
    rows = kept = convert(download(url, data_set.sha256, timeout, retries), data_set.format, url)
    if data_set.split == "train":  # nothing is to be learned from a row without an instruction or output
        kept = [row for row in rows if not is_blank(row.get("instruction")) and not is_blank(row.get("output"))]
    checked = check_rows(data_set, kept)
    if checked.faults:
        raise ValueError(f"{url}: not what was expected: {checked.faults[0]}")
    atomic_write(file, ("[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n").encode())
    return Fetched(file, len(kept), len(rows) - len(kept))


def download(url: str, sha256: str, timeout: float, retries: int) -> bytes:
    """The content of a URL or a file, whole. sha256: what it must have, "" for any.

    A server's fault, a broken connection and a wrong content are tried again. OSError or ValueError names the URL.
    """
    import pooch  # late, as the rest of the package needs neither
    import requests

    def get(address: str, output: str, _: pooch.Pooch) -> None:
        if "://" not in address:
            shutil.copyfile(address, output)
            return
        try:
            pooch.HTTPDownloader(timeout=timeout)(address, output, None)
        except requests.HTTPError as error:
            status = error.response.status_code
            passing = status >= 500 or status == 429  # pooch tries again after an error of `requests`
            raise (requests.HTTPError if passing else OSError)(f"HTTP status {status}") from None
        except requests.ConnectionError:
            raise OSError("the server cannot be reached; is there a network?") from None

    pooch.get_logger().setLevel("WARNING")
    with tempfile.TemporaryDirectory() as folder:
        downloads = pooch.create(folder, "", registry={"file": sha256 or None}, urls={"file": url})
        downloads.retry_if_failed = retries if "://" in url else 0
        try:
            return Path(downloads.fetch("file", downloader=get)).read_bytes()
        except FileNotFoundError:
            raise ValueError(f"{url}: no such file") from None
        except OSError as error:
            raise OSError(f"{url}: {error}") from None
        except ValueError:
            raise ValueError(f"{url}: SHA-256 is not {sha256}: the file has changed or was damaged") from None
