"""SVAMP: one-step problems, worded to mislead (`python -m evaluate.svamp`)."""

from evaluate.__main__ import main

main(suite="SVAMP")
