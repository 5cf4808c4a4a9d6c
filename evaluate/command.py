"""The command line of all suites."""

import argparse
import difflib
import io
import os
import sys
from typing import NoReturn

from evaluate import report
from evaluate.registry import SUITES, suite_named, suite_of_file
from evaluate.scoring import Score, score_file
from evaluate.suite import Suite

_EPILOG = """\
Two scores, always both: `published` follows the rule behind the paper's tables, `robust` reads the stated final
answer ("The answer is ...", "#### ...", a box), else the last number, letter or keyword (true, answer2, option1) that
stands alone; see docs/scoring.md. Suites are averaged within their family: math, commonsense.
Behind each score stands half the width of its 95 % Wilson interval over the rows, in percentage points; the mean's
takes the suites as independent. "no answer" counts the texts in which the published / the robust rule found none.
Exit status: 0; 1 for bad input; 2 for bad flags."""

_ALIASES = "".join(f", or {alias} for {one.name}" for one in SUITES.values() for alias in one.aliases)


class _Parser(argparse.ArgumentParser):
    """Refuses in the project's form: one line, naming the nearest flag."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        flags, unknown = self.parse_known_args(argv)
        if unknown:
            name = unknown[0].split("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            self.error(f"unknown argument {name}" + (f" (nearest: {near[0]})" if near else ""))
        return flags


def _count(text: str) -> int:
    if not (text.isdecimal() and len(text) < 10):
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text[:60]!r}")
    return int(text)


def _parser(suite: Suite | None) -> _Parser:
    what = f"Score the predictions of {suite.name}." if suite else "Score predictions of one suite or of several."
    parser = _Parser(
        prog=f"python -m evaluate.{suite.module}" if suite else "python -m evaluate",
        description=what,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    file_help = "prediction file: JSONL, or a JSON list, of test rows with a text, or a list of texts, as `generate`"
    parser.add_argument("--predict_file", metavar="FILE", help=file_help)
    if suite is None:
        parser.add_argument(
            "suite", nargs="?", help=f"{', '.join(SUITES)}, in any case{_ALIASES}; left out: from the file's name"
        )
        parser.add_argument(
            "--predict_files",
            nargs="+",
            metavar="FILE",
            help="one file per suite, each named after it: OUT/AddSub.jsonl",
        )
    parser.add_argument("--json", metavar="FILE", help="write the scores there, as JSON")
    parser.add_argument(
        "--verdicts", metavar="FILE", help="write there, for each row, its text and both verdicts, as JSONL"
    )
    parser.add_argument(
        "--show", type=_count, default=0, metavar="N", help="print the first N such rows of each file (0)"
    )
    parser.add_argument(
        "--show_rows",
        choices=("wrong", "disagree"),
        default="wrong",
        help="what --show prints: rows wrong under either score (wrong, the default), or rows where the two differ",
    )
    return parser


def _files(parser: _Parser, flags: argparse.Namespace, suite: Suite | None) -> list[tuple[str, Suite]]:
    """The files to score, each with its suite; wrong flags are refused here, before any file is read."""
    several = getattr(flags, "predict_files", None)
    named = getattr(flags, "suite", None)
    if (flags.predict_file is None) == (several is None):
        parser.error("give --predict_file" + ("" if suite else " or --predict_files, not both"))
    if several and named:
        parser.error(f"--predict_files takes each suite from its file's name: leave out {named[:80]!r}")
    try:
        if suite is None and named:
            suite = suite_named(named)
        files = [(path, suite or suite_of_file(path)) for path in several or [flags.predict_file]]
    except ValueError as error:
        parser.error(str(error))
    if len({one.name for _, one in files}) < len(files):
        parser.error("--predict_files: two files of one suite; the mean takes each suite once")
    outputs = [path for path in (flags.json, flags.verdicts) if path is not None]
    places = [os.path.realpath(path) for path in [*outputs, *(path for path, _ in files)]]
    for path in outputs:
        if not path or places.count(os.path.realpath(path)) > 1:
            parser.error(f"--json and --verdicts need files of their own, got {path[:80]!r}")
    return files


def main(suite: Suite | None = None, argv: list[str] | None = None) -> None:
    """Run the command line of one suite, or, with None, the one that takes the suite as an argument."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a text may hold what the terminal's encoding lacks
    parser = _parser(suite)
    flags = parser.parse(argv)
    files = _files(parser, flags, suite)
    try:
        _run(flags, [score_file(path, one) for path, one in files])
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ValueError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)


def _run(flags: argparse.Namespace, scores: list[Score]) -> None:
    if flags.verdicts:
        report.write(flags.verdicts, report.verdict_lines(scores))
    if flags.json:
        report.write(flags.json, [report.scores_json(scores)])
    for score in scores if flags.show else ():
        rows = [row for row in score.rows if (row.wrong if flags.show_rows == "wrong" else row.disagree)]
        if rows:
            print(report.show(score, rows[: flags.show]), end="\n\n")
    print(report.table(scores))
    sys.stdout.flush()
