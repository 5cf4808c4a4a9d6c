"""MultiArith: two to four steps of plain arithmetic.

python -m evaluate.multiarith --predict_file OUT/MultiArith.jsonl
"""

from evaluate.numeric import PUBLISHED, ROBUST, read_answer
from evaluate.suite import Suite

SUITE = Suite("MultiArith", problems=600, read_answer=read_answer, published=PUBLISHED, robust=ROBUST)

if __name__ == "__main__":
    from evaluate.command import main

    main(SUITE)
