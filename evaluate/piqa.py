"""PIQA: everyday physics, two solutions (`python -m evaluate.piqa`)."""

from evaluate.__main__ import main

main(suite="PIQA")
