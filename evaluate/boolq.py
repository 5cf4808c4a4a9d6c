"""BoolQ: yes-or-no questions about a passage, put without it (`python -m evaluate.boolq`)."""

from evaluate.__main__ import main

main(suite="BoolQ")
