"""AQuA: algebra, five choices (A) to (E).

python -m evaluate.aqua --predict_file OUT/AQuA.jsonl
"""

from evaluate.letters import PUBLISHED, ROBUST, read_answer
from evaluate.suite import Suite

SUITE = Suite("AQuA", problems=254, read_answer=read_answer, published=PUBLISHED, robust=ROBUST)

if __name__ == "__main__":
    from evaluate.command import main

    main(SUITE)
