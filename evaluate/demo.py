"""The demo's own problems: arithmetic in one to three steps. Not one of the paper's suites.

python -m evaluate.demo --predict_file OUT/demo.jsonl
"""

from evaluate.numeric import PUBLISHED, ROBUST, read_answer
from evaluate.suite import Suite

SUITE = Suite("demo", problems=200, family="demo", read_answer=read_answer, published=PUBLISHED, robust=ROBUST)

if __name__ == "__main__":
    from evaluate.command import main

    main(SUITE)
