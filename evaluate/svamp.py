"""SVAMP: one-step problems, worded to mislead.

python -m evaluate.svamp --predict_file OUT/SVAMP.jsonl
"""

from evaluate.numeric import PUBLISHED, ROBUST, read_answer
from evaluate.suite import Suite

SUITE = Suite("SVAMP", problems=1000, read_answer=read_answer, published=PUBLISHED, robust=ROBUST)

if __name__ == "__main__":
    from evaluate.command import main

    main(SUITE)
