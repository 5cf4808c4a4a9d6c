"""OBQA: elementary science facts put to use, four answers.

python -m evaluate.obqa --predict_file OUT/OBQA.jsonl
"""

from evaluate.keywords import Keywords
from evaluate.suite import Suite

_KEYWORDS = Keywords("answer", 4, published_count=5)
SUITE = Suite(
    "OBQA",
    problems=500,
    family="commonsense",
    aliases=("openbookqa",),
    read_answer=_KEYWORDS.read_answer,
    published=_KEYWORDS.published,
    robust=_KEYWORDS.robust,
)

if __name__ == "__main__":
    from evaluate.command import main

    main(SUITE)
