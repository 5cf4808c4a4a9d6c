"""The public data sets of the paper: fetch them, check them, and look for test rows among training rows.

python -m corpus list
python -m corpus fetch [NAME ...] [--output data] [--source URL_OR_FOLDER]
python -m corpus check [NAME ...] [--data data]
python -m corpus leaks --train FILE --tests FILE_OR_FOLDER[,...] [--show N] [--json FILE]
python -m corpus leaks --within FILE_OR_FOLDER[,...]

NAME: a folder's (gsm8k), one file's (gsm8k/train), a suite's (SIQA) or a family's (math); none: all.
"""

import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cli
from cli import knob
from corpus import compare
from corpus.catalogue import CATALOGUE, SOURCE, choose
from corpus.check import Checked, check_file
from corpus.fetch import address, fetch
from corpus.leaks import KINDS, NGRAM, OVERLAP
from corpus.rows import write_text

NAMES = "names, with commas where they do not stand first; left out: all"


@dataclass
class ListFlags:
    source: str = knob(SOURCE, help="beginning of the URLs, or a folder laid out like them")

    def __post_init__(self):
        if not self.source or ("://" in self.source and not re.match(r"https?://[^/]", self.source)):
            raise ValueError(f"--source: expected the beginning of http URLs or a folder, got {self.source!r}")


@dataclass
class FetchFlags(ListFlags):
    names: str = knob("", help=NAMES, positional=True)
    output: str = knob("data", help="folder to make: NAME/train.json and NAME/test.json")
    overwrite: bool = knob(False, help="replace files that are there and do not pass the check")
    timeout: float = knob(30.0, help="seconds to wait for a server that does not answer")

    def __post_init__(self):
        super().__post_init__()
        if self.timeout <= 0:
            raise ValueError(f"--timeout must be above 0, not {self.timeout}")
        choose(_split(self.names))


@dataclass
class CheckFlags:
    names: str = knob("", help=NAMES, positional=True)
    data: str = knob("data", help="folder of NAME/train.json and NAME/test.json")

    def __post_init__(self):
        choose(_split(self.names))


@dataclass
class LeaksFlags:
    train: str | None = knob(None, help="file of training rows, JSON or JSON lines")
    tests: str | None = knob(None, help="test files, or folders with test.json in them or in their folders; commas")
    within: str | None = knob(None, help="instead of both: files or folders whose rows are compared with one another")
    ngram: int = knob(NGRAM, help="words of an n-gram; in questions under 12 words 2 at most")
    overlap: float = knob(OVERLAP, help="share of a test question's n-grams that makes a row near")
    show: int = knob(0, help="print the first N pairs of each file")
    show_kind: str = knob("leaks", help="which pairs --show prints; leaks: exact and near", choices=("leaks", *KINDS))
    json: str | None = knob(None, help="file to write all pairs to, with both texts")

    def __post_init__(self):
        if self.ngram < 1 or self.show < 0:
            raise ValueError("--ngram must be at least 1, --show at least 0")
        if not 0 < self.overlap <= 1:
            raise ValueError(f"--overlap must be above 0 and at most 1, not {self.overlap}")
        pair = (self.train is not None, self.tests is not None)
        if pair != ((True, True) if self.within is None else (False, False)):
            raise ValueError("give --train and --tests, or --within alone")


def run_list(flags: ListFlags) -> int:
    lines = [["data set", "rows", "suite", "licence", "from"]]
    for one in CATALOGUE:
        about = "~" if one.slack else ""
        lines.append([one.label, f"{about}{one.rows}", one.suite, one.licence, address(one, flags.source)])
    print(_table(lines, right=(1,)))
    return 0


def run_fetch(flags: FetchFlags) -> int:
    chosen, failed = choose(_split(flags.names)), 0
    for one in chosen:
        try:
            got = fetch(one, flags.output, flags.source, overwrite=flags.overwrite, timeout=flags.timeout)
        except (ValueError, OSError) as error:
            failed += 1
            why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
            print(f"error: {one.label}: {why}", file=sys.stderr, flush=True)
            continue
        left_out = f" ({got.left_out} without instruction or output left out)" if got.left_out else ""
        print(f"{one.label}: {got.file}, {got.rows} rows{left_out}{'' if got.new else ', there already'}", flush=True)
    if failed:
        cli.fail(f"{failed} of {len(chosen)} data sets could not be fetched")
    return 0


def run_check(flags: CheckFlags) -> int:
    chosen = choose(_split(flags.names))
    there = [one for one in chosen if one.file(flags.data).exists()]
    missing = [one.label for one in chosen if one not in there]
    checked = [check_file(one, one.file(flags.data)) for one in there]
    if checked:
        lines = [["data set", "rows", "expected", "repeated", "no output", "", "sha256"], *map(_line, checked)]
        print(_table(lines, right=(1, 2, 3, 4)))
    if missing:
        print(f"not in {flags.data}: {', '.join(missing)}")
    for one in checked:
        for fault in one.faults:
            print(f"error: {one.data_set.file(flags.data)}: {fault}", file=sys.stderr)
    # What is asked for by name has to be there; without names at least something
    return int(any(one.faults for one in checked) or bool(missing and (flags.names or not there)))


def _line(one: Checked) -> list[str]:
    about = "~" if one.data_set.slack else ""
    counts = [str(one.rows), f"{about}{one.data_set.rows}", str(one.repeated), str(one.unanswered)]
    return [one.data_set.label, *counts, "WRONG" if one.faults else "ok", one.sha256]


def run_leaks(flags: LeaksFlags) -> int:
    tests = compare.files_of(flags.within or flags.tests or "")
    if flags.within is None:
        train = compare.read_asked(Path(flags.train or ""))
        found = compare.compare(train, list(map(compare.read_asked, tests)), flags.ngram, flags.overlap)
    else:
        found = compare.compare_within(list(map(compare.read_asked, tests)), flags.ngram, flags.overlap)
    if flags.json is not None:
        content = compare.leaks_json(found, flags.ngram, flags.overlap)
        write_text(Path(flags.json), json.dumps(content, indent=1) + "\n")
    kinds = compare.LEAKS if flags.show_kind == "leaks" else (flags.show_kind,)
    for one in found:
        pairs = compare.shown(one, kinds, flags.show)
        if pairs:
            print(pairs, end="\n\n")
    print(_table(compare.leaks_lines(found), right=range(2, 7)) if found else "no row stands in an earlier one")
    return 0


COMMANDS: dict[str, tuple[type, Callable[[Any], int], str]] = {
    "list": (ListFlags, run_list, "What data sets there are, and where they come from."),
    "fetch": (FetchFlags, run_fetch, "Download data sets and write them as rows; those there already are kept."),
    "check": (CheckFlags, run_check, "Count, fields and answers of the data sets that are there."),
    "leaks": (LeaksFlags, run_leaks, "Test rows that stand among training rows, or in other test files."),
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a row may hold what the terminal's encoding lacks
    word = cli.first_word(argv, COMMANDS, __doc__ + "\nThe flags of each: python -m corpus fetch --help")
    flags_type, run, description = COMMANDS[word]
    flags = cli.parse(flags_type, _joined(argv[1:]), prog=f"python -m corpus {word}", description=description)
    with cli.errors():
        status = run(flags)
    raise SystemExit(status)


def _joined(words: Sequence[str]) -> list[str]:
    """The names that stand first as one argument, as the flags take it."""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return [*([",".join(words[:count])] if count else []), *words[count:]]


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _table(lines: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [
        [cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))]
        for line in lines
    ]
    return "\n".join("  ".join(row).rstrip() for row in rows)


if __name__ == "__main__":
    main()
