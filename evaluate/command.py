"""The command line of all suites."""

import argparse
import difflib
import io
import math
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from evaluate import report
from evaluate.registry import SUITES, suite_named, suite_of_file
from evaluate.scoring import Score, score_file
from evaluate.suite import Suite

if TYPE_CHECKING:  # most suites run nothing
    from evaluate.sandbox import Sandbox

_EPILOG = """\
Two scores, always both: `published` follows the rule behind the paper's tables, `robust` reads the stated final
answer ("The answer is ...", "#### ...", a box), else the last number, letter or keyword (true, answer2, option1) that
stands alone; see docs/scoring.md. Suites are averaged within their family: math, commonsense, code.
HumanEval and MBPP run the generated programs against tests, each in a process that can neither write outside a folder
of its own nor use the network, and only with --allow_code_execution.
Behind each score stands half the width of its 95 % Wilson interval over the rows, in percentage points; the mean's
takes the suites as independent. "no answer" counts the texts in which the published / the robust rule found none.
Exit status: 0; 1 for bad input; 2 for bad flags."""

_MOST_SECONDS = 3600
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


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, got {text[:60]!r}")
    return text.lower() == "true"


def _jobs(text: str) -> int:
    if not _count(text):
        raise argparse.ArgumentTypeError("expected at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"expected seconds above 0, at most {_MOST_SECONDS}, got {text[:60]!r}")
    return seconds


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
    code = parser.add_argument_group("suites that run code (HumanEval, MBPP)")
    boolean = {"nargs": "?", "const": True, "default": False, "type": _truth, "metavar": "True|False"}
    code.add_argument(
        "--allow_code_execution", help="run generated programs; nothing generated is ever run without it", **boolean
    )
    code.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="time limit of each program (10)")
    code.add_argument("--jobs", type=_jobs, metavar="N", help="programs run at once (one per CPU)")
    code.add_argument(
        "--weak_sandbox",
        help="where the kernel cannot keep programs in, do with guards inside their interpreter",
        **boolean,
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
    code = [one.name for _, one in files if one.program]
    if code and not flags.allow_code_execution:
        parser.error(f"{code[0]} runs generated programs on this machine: allow it with --allow_code_execution")
    for name in ("timeout", "jobs", "weak_sandbox"):
        if getattr(flags, name) and not code:
            parser.error(f"--{name} is for suites that run code: HumanEval, MBPP")
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
        sandbox = _sandbox(flags) if any(one.program for _, one in files) else None
        _run(flags, [score_file(path, one, sandbox) for path, one in files])
        if sandbox and sandbox.note:
            print(sandbox.note)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except ValueError as error:
        _fail(str(error))


def _sandbox(flags: argparse.Namespace) -> "Sandbox":
    from evaluate.sandbox import SECONDS, Sandbox

    return Sandbox(flags.timeout or SECONDS, flags.jobs, flags.weak_sandbox)


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
