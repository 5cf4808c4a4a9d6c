"""The public data sets of the paper's runs, one line each in catalogue.csv."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from cli import nearest

# `github.com/OWNER/REPO/raw/...` serves files of Git LFS too (math_14k, commonsense_15k, hellaswag), which
# raw.githubusercontent.com does not. A mirror or a folder holds `origin` below it in the same way.
SOURCE = "https://github.com"


class DataSet(NamedTuple):
    """One file of rows, DATA/`name`/`split`.json.

    split: "train" or "test". task: its name in `evaluate`, "" for training rows. rows: how many it has at its origin.
    partial: the share of them that may be missing here, since rows without an output are left out. fields: of a row
    beside instruction, input and output. format: how the origin is written, a key of `corpus.converters.CONVERTERS`.
    sha256: of the file at its origin, "" where it is not known. origin: its path below the source.
    """

    name: str
    split: str
    family: str
    task: str
    rows: int
    partial: float
    fields: tuple[str, ...]
    format: str
    licence: str
    sha256: str
    origin: str
    note: str

    @property
    def label(self) -> str:
        return f"{self.name}/{self.split}"

    def file(self, folder: str | Path) -> Path:
        """Where it lies below the folder of all data."""
        return Path(folder) / self.name / f"{self.split}.json"

    def address(self, source: str = SOURCE) -> str:
        """The URL or path of its origin."""
        return f"{source.rstrip('/')}/{self.origin}"


def _read_catalogue() -> tuple[DataSet, ...]:
    def data_set(line: dict[str, str]) -> DataSet:
        numbers = {"rows": int(line["rows"]), "partial": float(line["partial"])}
        return DataSet(**line | numbers | {"fields": tuple(line["fields"].split())})

    with Path(__file__).with_name("catalogue.csv").open(encoding="utf-8", newline="") as file:
        return tuple(map(data_set, csv.DictReader(file)))


CATALOGUE = _read_catalogue()


def select(names: Sequence[str]) -> list[DataSet]:
    """The data sets of these names, in the catalogue's order; all where none is given.

    A name is a folder's (gsm8k), one file's (gsm8k/train), a task's (SIQA) or a family's (math), in any case.
    ValueError gives the nearest name where there is none.
    """

    def plain(name: str) -> str:
        return "".join(character for character in name.casefold() if character.isalnum() or character == "/")

    known: dict[str, list[DataSet]] = {}
    for data_set in CATALOGUE:
        for name in {plain(name) for name in (data_set.name, data_set.label, data_set.task, data_set.family)} - {""}:
            known.setdefault(name, []).append(data_set)
    for name in names:
        if plain(name) not in known:
            near = nearest(plain(name), known)
            raise ValueError(f"no data set is named {name!r} (nearest: {near}); `python -m corpus list` shows them")
    chosen = [data_set for name in names for data_set in known[plain(name)]]
    return [data_set for data_set in CATALOGUE if data_set in chosen or not names]
