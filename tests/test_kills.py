"""A short form of kills.py, which is a program of its own."""

import json
import os

import kills
from commands import REPO, run


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been() -> None:
    paths = os.pathsep.join([str(REPO), str(REPO / "tests")])
    result = run(kills.__file__, "--kills", 4, env={"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, timeout=400)
    assert result.returncode == 0, result.stderr
    assert sum(json.loads(result.stdout).values()) == 4
