"""AddSub: one addition or subtraction.

python -m evaluate.addsub --predict_file OUT/AddSub.jsonl
"""

from evaluate.numeric import PUBLISHED, ROBUST, read_answer
from evaluate.suite import Suite

SUITE = Suite("AddSub", problems=395, read_answer=read_answer, published=PUBLISHED, robust=ROBUST)

if __name__ == "__main__":
    from evaluate.command import main

    main(SUITE)
