"""The command line of all tasks.

python -m evaluate.addsub --predict_file OUT/AddSub.jsonl
python -m evaluate SUITE --predict_file FILE
python -m evaluate --predict_files OUT/AddSub.jsonl OUT/AQuA.jsonl
"""

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from cli import cli_errors, flag, parse
from evaluate import report
from evaluate.sandbox import SECONDS, Sandbox
from evaluate.scoring import score_file
from evaluate.tasks import TASKS, Task, task_named, task_of_file

_DESCRIPTION = """\
Score predictions of one suite or of several.

Two scores, always both: `published` follows the rule behind the paper's tables, `robust` reads the stated final
answer ("The answer is ...", "#### ...", a box), else the last number, letter or keyword (true, answer2, option1) that
stands alone; see docs/scoring.md. Suites are averaged within their family: math, commonsense, code.

HumanEval and MBPP run the generated programs against tests, each in a process that can neither write outside a folder
of its own nor use the network, and only with --allow_code_execution.

Behind each score stands half the width of its 95 % Wilson interval over the rows, in percentage points; the mean's
takes the suites as independent. "no answer" counts the texts in which the published / the robust rule found none.
Exit status: 0; 1 for bad input; 2 for bad flags."""

_CODE = "suites that run code (HumanEval, MBPP)"
_MAX_SECONDS = 3600
_ALIASES = "".join(f", or {alias} for {task.name}" for task in TASKS.values() for alias in task.aliases)


@dataclass
class Flags:
    """The flags of `python -m evaluate`."""

    suite: str | None = flag(
        None, help=f"{', '.join(TASKS)}, upper or lower case{_ALIASES}; default: by the file's name", positional=True
    )
    predict_file: str | None = flag(None, help="prediction file: JSONL, or a JSON list, of test rows with `generate`")
    predict_files: str | None = flag(None, help="one FILE per suite, several after one another, each named after it")
    save_path: str | None = flag(None, help="write the scores there, as JSON")
    verdicts: str | None = flag(None, help="write each row there, with its text and both verdicts, as JSONL")
    show: int = flag(0, help="print the first N rows of each file that are wrong under either score", least=0)
    allow_code_execution: bool = flag(
        False, help="run generated programs; nothing generated is ever run without it", group=_CODE
    )
    timeout: float | None = flag(
        None, help=f"CPU seconds of a program under the robust rule; default: {SECONDS:g}", group=_CODE, above=0
    )
    jobs: int | None = flag(None, help="programs run at once; default: one per CPU", group=_CODE, least=1)
    weak_sandbox: bool = flag(
        False, help="where the kernel cannot keep programs in, do with guards inside their interpreter", group=_CODE
    )

    def __post_init__(self) -> None:
        if self.timeout is not None and self.timeout > _MAX_SECONDS:
            raise ValueError(f"--timeout must be at most {_MAX_SECONDS}, not {self.timeout}")
        if (self.predict_file is None) == (self.predict_files is None):
            raise ValueError("give one of --predict_file and --predict_files")
        if self.predict_files and self.suite:
            raise ValueError(f"--predict_files takes each suite from its file's name: leave out {self.suite[:80]!r}")
        self.files()

    def files(self) -> list[tuple[str, Task]]:
        """Return the files to score, each with its task; ValueError for wrong flags, before any file is read."""
        paths = self.predict_files.split("\n") if self.predict_files else [str(self.predict_file)]
        files = [(path, task_named(self.suite) if self.suite else task_of_file(path)) for path in paths]
        code = [task.name for _, task in files if task.runs_code]
        if code and not self.allow_code_execution:
            raise ValueError(f"{code[0]} runs generated programs on this machine: allow it with --allow_code_execution")
        for name in ("timeout", "jobs", "weak_sandbox"):
            if getattr(self, name) and not code:
                raise ValueError(f"--{name} is for {_CODE}")
        if len({task.name for _, task in files}) < len(files):
            raise ValueError("--predict_files: two files of one suite; the mean takes each suite once")
        outputs = [path for path in (self.save_path, self.verdicts) if path is not None]
        real = [os.path.realpath(path) for path in [*outputs, *paths]]
        for path in outputs:
            if not path or real.count(os.path.realpath(path)) > 1:
                raise ValueError(f"--save_path and --verdicts need files of their own, got {path[:80]!r}")
        return files


def main(argv: list[str] | None = None, suite: str | None = None) -> None:
    """Run the command line; `suite` stands before its words."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a text may hold what the terminal's encoding lacks
    words = _join_files(sys.argv[1:] if argv is None else argv)
    prog = f"python -m evaluate.{TASKS[suite].module}" if suite else "python -m evaluate"
    flags = parse(Flags, [suite, *words] if suite else words, prog=prog, description=_DESCRIPTION)
    files = flags.files()
    with cli_errors():
        runs_code = any(task.runs_code for _, task in files)
        sandbox = Sandbox(flags.timeout or SECONDS, flags.jobs, flags.weak_sandbox) if runs_code else None
        scores = [score_file(path, task, sandbox) for path, task in files]
        if flags.verdicts:
            _write(flags.verdicts, "".join(report.verdict_lines(scores)))
        if flags.save_path:
            _write(flags.save_path, report.scores_json(scores))
        for score in scores:
            rows = [row for row in score.rows if row.wrong][: flags.show]
            if rows:
                print(report.show(score, rows) + "\n")
        print(report.table(scores))
        if sandbox and sandbox.note:
            print(sandbox.note)


def _write(path: str, text: str) -> None:
    """Write a text file whole or not at all. Half a surrogate pair is written as JSON spells it."""
    from moa.files import atomic_write  # late: it loads torch

    atomic_write(Path(path), text.encode("utf-8", "backslashreplace"))


def _join_files(argv: list[str]) -> list[str]:
    """Join the words after --predict_files to one value with line breaks: a flag takes one value."""
    if "--predict_files" not in argv:
        return argv
    start = argv.index("--predict_files") + 1
    end = next((n for n in range(start, len(argv)) if argv[n].startswith("--")), len(argv))
    return [*argv[:start], *(["\n".join(argv[start:end])] if end > start else []), *argv[end:]]


if __name__ == "__main__":
    main()
