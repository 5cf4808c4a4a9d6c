"""ARC-e: grade-school science, the easy set, up to five answers (`python -m evaluate.arc_e`)."""

from evaluate.__main__ import main

main(suite="ARC-e")
