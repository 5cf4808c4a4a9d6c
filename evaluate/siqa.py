"""SIQA: social situations, three answers (`python -m evaluate.siqa`)."""

from evaluate.__main__ import main

main(suite="SIQA")
