"""The public data sets of the paper: fetch them, check them, and look for test rows among training rows.

python -m corpus list
python -m corpus fetch [NAME ...] [--output_dir data] [--source URL_OR_FOLDER]
python -m corpus check [NAME ...] [--data_path data]
python -m corpus contamination --data_path FILE --tests FILE_OR_FOLDER[,...] [--show N] [--save_path FILE]

NAME: a folder's (gsm8k), one file's (gsm8k/train), a task's (SIQA) or a family's (math); none: all.
"""

import io
import sys
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent

from tabulate import tabulate

from cli import cli_errors, die, flag, parse, subcommand
from corpus.catalogue import CATALOGUE, SOURCE, DataSet, select
from corpus.check import check_file
from corpus.contamination import KINDS, compare
from corpus.fetch import fetch


@dataclass
class List:
    """What data sets there are, and where they come from."""

    source: str = flag(SOURCE, help="beginning of the URLs, or a folder laid out like them")

    def run(self) -> int:
        header = ["data set", "rows", "task", "licence", "from", ""]
        rows = [[d.label, d.rows, d.task, d.licence, d.address(self.source), d.note] for d in CATALOGUE]
        print(tabulate(rows, header, "plain"))
        return 0


@dataclass
class Named:
    names: str = flag("", help="names, with commas where they do not stand first; left out: all", positional=True)

    def __post_init__(self):
        self.chosen()

    def chosen(self) -> list[DataSet]:
        return select([name.strip() for name in self.names.split(",") if name.strip()])


@dataclass
class Fetch(Named):
    """Download data sets and write them as rows; those there already are kept."""

    source: str = flag(SOURCE, help="beginning of the URLs, or a folder laid out like them")
    output_dir: str = flag("data", help="folder to make: NAME/train.json and NAME/test.json")
    overwrite: bool = flag(False, help="replace files that are there and do not pass the check")
    timeout: float = flag(30.0, above=0, help="seconds to wait for a server that does not answer")

    def run(self) -> int:
        chosen, failed = self.chosen(), 0
        for data_set in chosen:
            try:
                fetched = fetch(data_set, self.output_dir, self.source, overwrite=self.overwrite, timeout=self.timeout)
            except (ValueError, OSError) as error:
                failed += 1
                why = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else error
                print(f"error: {data_set.label}: {why}", file=sys.stderr, flush=True)
                continue
            notes = f" ({fetched.left_out} without instruction or output left out)" if fetched.left_out else ""
            notes += "" if fetched.new else ", there already"
            print(f"{data_set.label}: {fetched.file}, {fetched.rows} rows{notes}", flush=True)
        if failed:
            die(f"{failed} of {len(chosen)} data sets could not be fetched")
        return 0


@dataclass
class Check(Named):
    """Number of rows, fields and answers of the data sets that are there."""

    data_path: str = flag("data", help="folder of NAME/train.json and NAME/test.json")

    def run(self) -> int:
        files = {data_set: data_set.file(self.data_path) for data_set in self.chosen()}
        missing = [data_set.label for data_set, file in files.items() if not file.exists()]
        checked = {data_set: check_file(data_set, file) for data_set, file in files.items() if file.exists()}
        header = ["data set", "rows", "expected", "repeated", "no output", "", "sha256"]
        rows = [
            [d.label, c.rows, d.rows, c.repeated, c.unanswered, "WRONG" if c.faults else "ok", c.sha256]
            for d, c in checked.items()
        ]
        if rows:
            print(tabulate(rows, header, "plain"))
        if missing:
            print(f"not in {self.data_path}: {', '.join(missing)}")
        faults = [f"error: {files[data_set]}: {fault}" for data_set, c in checked.items() for fault in c.faults]
        print(*faults, sep="\n", end="\n" * bool(faults), file=sys.stderr)
        # What is named has to be there; without names at least something
        return int(bool(faults) or bool(missing and (self.names or not checked)))


@dataclass
class Contamination:
    """Test rows that stand among training rows."""

    data_path: str = flag(help="file of training rows, JSON or JSON lines")
    tests: str = flag(help="test files, or folders with test.json in them or in their folders; commas")
    show: int = flag(0, least=0, help="print the first N matches of each file")
    save_path: str | None = flag(None, help="JSON file to write all matches to, with both texts")

    def run(self) -> int:
        compared, rows = compare(self.tests, self.data_path), []
        if self.save_path is not None:
            from moa.files import write_json  # late: it loads torch

            files = [result.record() | {"pairs": result.pairs()} for result in compared]
            write_json(Path(self.save_path), {"files": files})
        for result in compared:
            test, train, counts = result.test.name, result.train.name, result.record()
            for pair in result.pairs()[: self.show]:
                print(f"{pair['kind']} ({pair['overlap']:.0%})")
                print(f"  {test} row {pair['row']}:\n{indent(pair['text'], '    ')}")
                print(f"  {train} row {pair['in_row']}:\n{indent(pair['in_text'], '    ')}\n")
            both = f"{100 * len(result.matches) / counts['rows']:.1f} %"
            rows.append([test, train, counts["rows"], *(counts[kind] for kind in KINDS), both])
        print(tabulate(rows, ["rows of", "in", "rows", *KINDS, "both"], "plain"))
        return 0


COMMANDS = {"list": List, "fetch": Fetch, "check": Check, "contamination": Contamination}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a row may hold what the terminal's encoding lacks
    word = subcommand(argv, COMMANDS, __doc__ + "\nThe flags of each: python -m corpus fetch --help")
    # The names that stand first are one argument, as the flags take it
    first = next((i for i, word in enumerate(argv) if i and word.startswith("-")), len(argv))
    words = [*[",".join(argv[1:first])] * (first > 1), *argv[first:]]
    command = parse(COMMANDS[word], words, prog=f"python -m corpus {word}", description=COMMANDS[word].__doc__)
    with cli_errors():
        status = command.run()
    raise SystemExit(status)


if __name__ == "__main__":
    main()
