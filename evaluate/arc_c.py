"""ARC-c: grade-school science, the challenge set, up to five answers.

python -m evaluate.arc_c --predict_file OUT/ARC-c.jsonl
"""

from evaluate.keywords import Keywords
from evaluate.suite import Suite

_KEYWORDS = Keywords("answer", 5)
SUITE = Suite(
    "ARC-c",
    problems=1172,
    family="commonsense",
    aliases=("ARC-Challenge",),
    read_answer=_KEYWORDS.read_answer,
    published=_KEYWORDS.published,
    robust=_KEYWORDS.robust,
)

if __name__ == "__main__":
    from evaluate.command import main

    main(SUITE)
