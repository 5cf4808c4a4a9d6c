"""A folder of runs as one HTML page, which needs no network and no other file.

    python -m inspection report RUNS --output report.html

Runs are found at and under the folder, as exps/run.sh leaves them (DATASET/METHOD/sSEED). The page shows an overview
with what each run lacks, scores by both rules, losses, costs, what routers do (of runs with a gates.json of `python -m
inspection gates`), settings, and some answers with their verdicts. Runs that differ in their seed alone share a line.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cli import cli_errors, flag, parse


@dataclass(frozen=True)
class Flags:
    runs: str = flag(help="folder of runs", positional=True)
    output: str = flag("report.html", help="HTML file to write; one that is there is replaced")
    samples: int = flag(1, help="answers shown per test and run of each kind: right, wrong, judged differently")
    costs: str | None = flag(None, help="what `python -m benchmarks.cost --json FILE` wrote: times on equal terms")
    title: str | None = flag(None, help="the page's title; default: the folder's name")

    def __post_init__(self):
        if not 0 <= self.samples <= 1000:
            raise ValueError(f"--samples must be from 0 to 1000, not {self.samples}")
        if not self.output or Path(self.output).is_dir():
            raise ValueError(f"--output {self.output!r} must be the path of a file")


def main(argv: Sequence[str], prog: str) -> None:
    flags = parse(Flags, argv, prog=prog, description=__doc__)
    with cli_errors():
        from evaluate.report import write
        from inspection.page.document import document

        folder = Path(flags.runs)
        title = flags.title or f"Runs in {folder.resolve().name or folder}"
        page = document(folder, title, flags.samples, time.strftime("%Y-%m-%d"), flags.costs and Path(flags.costs))
        write(flags.output, [page.html])
        size = Path(flags.output).stat().st_size / 1e6
        told = f"{page.runs} runs" + (f", {page.incomplete} of them incomplete" if page.incomplete else "")
        print(f"{flags.output}: {told}, {size:.1f} MB")
