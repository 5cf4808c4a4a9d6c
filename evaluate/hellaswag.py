"""HellaSwag: how a scene goes on, four endings.

python -m evaluate.hellaswag --predict_file OUT/HellaSwag.jsonl
"""

from evaluate.keywords import Keywords
from evaluate.suite import Suite

_KEYWORDS = Keywords("ending", 4)
SUITE = Suite(
    "HellaSwag",
    problems=10042,
    family="commonsense",
    read_answer=_KEYWORDS.read_answer,
    published=_KEYWORDS.published,
    robust=_KEYWORDS.robust,
)

if __name__ == "__main__":
    from evaluate.command import main

    main(SUITE)
