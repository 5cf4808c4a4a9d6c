"""MBPP: short programs in Python from a sentence, run against assertions (`python -m evaluate.mbpp`)."""

from evaluate.__main__ import main

main(suite="MBPP")
