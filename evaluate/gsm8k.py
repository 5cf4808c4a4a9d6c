"""GSM8K: grade-school problems of several steps (`python -m evaluate.gsm8k`)."""

from evaluate.__main__ import main

main(suite="GSM8K")
