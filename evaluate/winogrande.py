"""WinoGrande: what fills the blank, two options (`python -m evaluate.winogrande`)."""

from evaluate.__main__ import main

main(suite="WinoGrande")
