"""The demo's own problems: arithmetic in one to three steps (`python -m evaluate.demo`)."""

from evaluate.__main__ import main

main(suite="demo")
