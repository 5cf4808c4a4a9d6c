"""AQuA: algebra, five choices (A) to (E) (`python -m evaluate.aqua`)."""

from evaluate.__main__ import main

main(suite="AQuA")
