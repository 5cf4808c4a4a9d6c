"""MultiArith: two to four steps of plain arithmetic (`python -m evaluate.multiarith`)."""

from evaluate.__main__ import main

main(suite="MultiArith")
