"""OBQA: elementary science facts put to use, four answers (`python -m evaluate.obqa`)."""

from evaluate.__main__ import main

main(suite="OBQA")
