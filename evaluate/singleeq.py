"""SingleEq: one equation a problem.

python -m evaluate.singleeq --predict_file OUT/SingleEq.jsonl
"""

from evaluate.numeric import PUBLISHED, ROBUST, read_answer
from evaluate.suite import Suite

SUITE = Suite("SingleEq", problems=508, read_answer=read_answer, published=PUBLISHED, robust=ROBUST)

if __name__ == "__main__":
    from evaluate.command import main

    main(SUITE)
