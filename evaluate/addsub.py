"""AddSub: one addition or subtraction (`python -m evaluate.addsub`)."""

from evaluate.__main__ import main

main(suite="AddSub")
