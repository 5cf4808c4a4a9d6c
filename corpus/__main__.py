"""The public data sets of the paper: fetch them, check them, and look for test rows among training rows.

python -m corpus list
python -m corpus fetch [NAME ...] [--output_dir data] [--source URL_OR_FOLDER]
python -m corpus check [NAME ...] [--data_path data]
python -m corpus contamination --data_path FILE --tests FILE_OR_FOLDER[,...] [--show N] [--save_path FILE]
python -m corpus contamination --within FILE_OR_FOLDER[,...]

NAME: a folder's (gsm8k), one file's (gsm8k/train), a task's (SIQA) or a family's (math); none: all.
"""

import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from cli import cli_errors, die, flag, parse, subcommand
from corpus.catalogue import CATALOGUE, SOURCE, select
from corpus.check import check_file
from corpus.contamination import KINDS, NGRAM, OVERLAP, compare, list_test_files, read_questions
from corpus.fetch import address, fetch

NAMES = "names, with commas where they do not stand first; left out: all"


@dataclass
class ListFlags:
    source: str = flag(SOURCE, help="beginning of the URLs, or a folder laid out like them")

    def __post_init__(self):
        if not self.source or ("://" in self.source and not re.match(r"https?://[^/]", self.source)):
            raise ValueError(f"--source: expected the beginning of http URLs or a folder, got {self.source!r}")


@dataclass
class FetchFlags(ListFlags):
    names: str = flag("", help=NAMES, positional=True)
    output_dir: str = flag("data", help="folder to make: NAME/train.json and NAME/test.json")
    overwrite: bool = flag(False, help="replace files that are there and do not pass the check")
    timeout: float = flag(30.0, help="seconds to wait for a server that does not answer")

    def __post_init__(self):
        super().__post_init__()
        if self.timeout <= 0:
            raise ValueError(f"--timeout must be above 0, not {self.timeout}")
        select(_split(self.names))


@dataclass
class CheckFlags:
    names: str = flag("", help=NAMES, positional=True)
    data_path: str = flag("data", help="folder of NAME/train.json and NAME/test.json")

    def __post_init__(self):
        select(_split(self.names))


@dataclass
class ContaminationFlags:
    data_path: str | None = flag(None, help="file of training rows, JSON or JSON lines")
    tests: str | None = flag(None, help="test files, or folders with test.json in them or in their folders; commas")
    within: str | None = flag(None, help="instead of both: files or folders whose rows are compared with one another")
    ngram: int = flag(NGRAM, help="words of an n-gram; in questions under 12 words 2 at most")
    overlap: float = flag(OVERLAP, help="share of a test question's n-grams that makes a row near")
    show: int = flag(0, help="print the first N matches of each file")
    show_kind: str = flag("all", help="which matches --show prints", choices=("all", *KINDS))
    save_path: str | None = flag(None, help="JSON file to write all matches to, with both texts")

    def __post_init__(self):
        if self.ngram < 1 or self.show < 0:
            raise ValueError("--ngram must be at least 1, --show at least 0")
        if not 0 < self.overlap <= 1:
            raise ValueError(f"--overlap must be above 0 and at most 1, not {self.overlap}")
        given = (self.data_path is not None, self.tests is not None)
        if given != ((True, True) if self.within is None else (False, False)):
            raise ValueError("give --data_path and --tests, or --within alone")


def run_list(flags: ListFlags) -> int:
    """What data sets there are, and where they come from."""
    header = ["data set", "rows", "task", "licence", "from", ""]
    print(_table([[d.label, d.rows, d.task, d.licence, address(d, flags.source), d.note] for d in CATALOGUE], header))
    return 0


def run_fetch(flags: FetchFlags) -> int:
    """Download data sets and write them as rows; those there already are kept."""
    chosen, failed = select(_split(flags.names)), 0
    for data_set in chosen:
        try:
            fetched = fetch(data_set, flags.output_dir, flags.source, overwrite=flags.overwrite, timeout=flags.timeout)
        except (ValueError, OSError) as error:
            failed += 1
            why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
            print(f"error: {data_set.label}: {why}", file=sys.stderr, flush=True)
            continue
        notes = f" ({fetched.left_out} without instruction or output left out)" if fetched.left_out else ""
        notes += "" if fetched.new else ", there already"
        print(f"{data_set.label}: {fetched.file}, {fetched.rows} rows{notes}", flush=True)
    if failed:
        die(f"{failed} of {len(chosen)} data sets could not be fetched")
    return 0


def run_check(flags: CheckFlags) -> int:
    """Number of rows, fields and answers of the data sets that are there."""
    chosen = select(_split(flags.names))
    present = [data_set for data_set in chosen if data_set.file(flags.data_path).exists()]
    missing = [data_set.label for data_set in chosen if data_set not in present]
    checked = [check_file(data_set, data_set.file(flags.data_path)) for data_set in present]
    if checked:
        lines = [
            [
                c.data_set.label,
                c.rows,
                c.data_set.rows,
                c.repeated,
                c.unanswered,
                "WRONG" if c.faults else "ok",
                c.sha256,
            ]
            for c in checked
        ]
        print(_table(lines, ["data set", "rows", "expected", "repeated", "no output", "", "sha256"]))
    if missing:
        print(f"not in {flags.data_path}: {', '.join(missing)}")
    for result in checked:
        for fault in result.faults:
            print(f"error: {result.data_set.file(flags.data_path)}: {fault}", file=sys.stderr)
    # What is named has to be there; without names at least something
    return int(any(result.faults for result in checked) or bool(missing and (flags.names or not present)))


def run_contamination(flags: ContaminationFlags) -> int:
    """Test rows that stand among training rows, or in other test files."""
    tests = [read_questions(file) for file in list_test_files(flags.within or flags.tests or "")]
    train = None if flags.data_path is None else read_questions(Path(flags.data_path))
    compared = compare(tests, train, flags.ngram, flags.overlap)
    if flags.save_path is not None:
        from moa.files import write_json  # late: it loads torch

        files = [result.record() | {"pairs": result.pairs()} for result in compared]
        write_json(Path(flags.save_path), {"ngram": flags.ngram, "overlap": flags.overlap, "files": files})
    lines = []
    for result in compared:
        for pair in [pair for pair in result.pairs() if flags.show_kind in ("all", pair["kind"])][: flags.show]:
            print(f"{pair['kind']} ({pair['overlap']:.0%})")
            print(f"  {result.test.name} row {pair['row']}:\n{_indented(pair['text'])}")
            print(f"  {result.other.name} row {pair['in_row']}:\n{_indented(pair['in_text'])}\n")
        _, _, rows, *counts = result.record().values()
        lines.append([result.test.name, result.other.name, rows, *counts, f"{100 * sum(counts) / rows:.1f} %"])
    print(_table(lines, ["rows of", "in", "rows", *KINDS, "both"]) if lines else "no row stands in an earlier one")
    return 0


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() if line.strip())


COMMANDS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "list": (ListFlags, run_list),
    "fetch": (FetchFlags, run_fetch),
    "check": (CheckFlags, run_check),
    "contamination": (ContaminationFlags, run_contamination),
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a row may hold what the terminal's encoding lacks
    word = subcommand(argv, COMMANDS, __doc__ + "\nThe flags of each: python -m corpus fetch --help")
    flags_type, run = COMMANDS[word]
    flags = parse(flags_type, _join_names(argv[1:]), prog=f"python -m corpus {word}", description=run.__doc__)
    with cli_errors():
        status = run(flags)
    raise SystemExit(status)


def _join_names(words: Sequence[str]) -> list[str]:
    """The names that stand first as one argument, as the flags take it."""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    return [*([",".join(words[:count])] if count else []), *words[count:]]


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]


def _table(lines: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    align = ["right" if isinstance(cell, int) or str(cell).endswith("%") else "left" for cell in lines[0]]
    return tabulate(lines, header, "plain", colalign=align, disable_numparse=True)


if __name__ == "__main__":
    main()
