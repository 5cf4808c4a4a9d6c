"""WinoGrande: what fills the blank, two options.

python -m evaluate.winogrande --predict_file OUT/WinoGrande.jsonl
"""

from evaluate.keywords import Keywords
from evaluate.suite import Suite

_KEYWORDS = Keywords("option", 2)
SUITE = Suite(
    "WinoGrande",
    problems=1267,
    family="commonsense",
    read_answer=_KEYWORDS.read_answer,
    published=_KEYWORDS.published,
    robust=_KEYWORDS.robust,
)

if __name__ == "__main__":
    from evaluate.command import main

    main(SUITE)
