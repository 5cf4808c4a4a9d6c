"""ARC-e: grade-school science, the easy set, up to five answers.

python -m evaluate.arc_e --predict_file OUT/ARC-e.jsonl
"""

from evaluate.keywords import Keywords
from evaluate.suite import Suite

_KEYWORDS = Keywords("answer", 5)
SUITE = Suite(
    "ARC-e",
    problems=2376,
    family="commonsense",
    aliases=("ARC-Easy",),
    read_answer=_KEYWORDS.read_answer,
    published=_KEYWORDS.published,
    robust=_KEYWORDS.robust,
)

if __name__ == "__main__":
    from evaluate.command import main

    main(SUITE)
