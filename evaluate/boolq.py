"""BoolQ: yes-or-no questions about a passage, put without it.

python -m evaluate.boolq --predict_file OUT/BoolQ.jsonl
"""

from evaluate.keywords import Keywords
from evaluate.suite import Suite

_KEYWORDS = Keywords()
SUITE = Suite(
    "BoolQ",
    problems=3270,
    family="commonsense",
    read_answer=_KEYWORDS.read_answer,
    published=_KEYWORDS.published,
    robust=_KEYWORDS.robust,
)

if __name__ == "__main__":
    from evaluate.command import main

    main(SUITE)
