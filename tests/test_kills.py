"""A short form of kills.py, which is a program of its own."""

import json

import kills
from commands import program


def test_a_run_that_is_killed_again_and_again_ends_as_if_nothing_had_been() -> None:
    result = program(kills.__file__, "--kills", 4)
    assert result.returncode == 0, result.stderr
    assert sum(json.loads(result.stdout).values()) == 4
