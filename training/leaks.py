"""Test rows among the training rows, looked for before a run."""

import sys
from pathlib import Path
from typing import Any

from corpus.compare import compare, files_of, read_asked, summary
from corpus.leaks import NGRAM, OVERLAP


def check_leaks(data_path: str | Path, tests: str) -> dict[str, Any]:
    """Tell on stderr, in one line, what of the test files (and folders, with commas) stands in the training rows.

    Returns what a run's record says of it. ValueError or OSError names the file that is not right.
    """
    files = files_of(tests)
    found = compare(read_asked(Path(data_path)), [read_asked(file) for file in files])
    print(f"leak check: {summary(found)}", file=sys.stderr, flush=True)
    return {"ngram": NGRAM, "overlap": OVERLAP, "tests": [one.record() for one in found]}
