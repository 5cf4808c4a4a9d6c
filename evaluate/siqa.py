"""SIQA: social situations, three answers.

python -m evaluate.siqa --predict_file OUT/SIQA.jsonl
"""

from evaluate.keywords import Keywords
from evaluate.suite import Suite

_KEYWORDS = Keywords("answer", 3, published_count=5)
SUITE = Suite(
    "SIQA",
    problems=1954,
    family="commonsense",
    aliases=("social_i_qa",),
    read_answer=_KEYWORDS.read_answer,
    published=_KEYWORDS.published,
    robust=_KEYWORDS.robust,
)

if __name__ == "__main__":
    from evaluate.command import main

    main(SUITE)
