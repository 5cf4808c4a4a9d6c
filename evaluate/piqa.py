"""PIQA: everyday physics, two solutions.

python -m evaluate.piqa --predict_file OUT/PIQA.jsonl
"""

from evaluate.keywords import Keywords
from evaluate.suite import Suite

_KEYWORDS = Keywords("solution", 2)
SUITE = Suite(
    "PIQA",
    problems=1838,
    family="commonsense",
    read_answer=_KEYWORDS.read_answer,
    published=_KEYWORDS.published,
    robust=_KEYWORDS.robust,
)

if __name__ == "__main__":
    from evaluate.command import main

    main(SUITE)
