"""GSM8K: grade-school problems of several steps (`python -m evaluate.gsm8k`)."""

from evaluate.__main__ import main

main(task="GSM8K")
