"""GSM8K: grade-school problems of several steps.

python -m evaluate.gsm8k --predict_file OUT/GSM8K.jsonl
"""

from evaluate.numeric import PUBLISHED, ROBUST, read_answer
from evaluate.suite import Suite

SUITE = Suite("GSM8K", problems=1319, read_answer=read_answer, published=PUBLISHED, robust=ROBUST)

if __name__ == "__main__":
    from evaluate.command import main

    main(SUITE)
