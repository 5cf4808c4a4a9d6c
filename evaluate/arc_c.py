"""ARC-c: grade-school science, the challenge set, up to five answers (`python -m evaluate.arc_c`)."""

from evaluate.__main__ import main

main(suite="ARC-c")
