"""HumanEval: functions in Python from a signature and docstring, run against tests (`python -m evaluate.humaneval`)."""

from evaluate.__main__ import main

main(suite="HumanEval")
