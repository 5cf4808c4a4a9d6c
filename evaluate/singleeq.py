"""SingleEq: one equation a problem (`python -m evaluate.singleeq`)."""

from evaluate.__main__ import main

main(suite="SingleEq")
