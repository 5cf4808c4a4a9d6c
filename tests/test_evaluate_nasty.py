"""Every suite of the paper on the same nasty answers: which verdict each text deserves, under both rules.

What is special to a suite stands in test_evaluate_rules.py, test_evaluate_commonsense.py and test_evaluate_code.py.
"""

import pytest

from evaluate import SUITES

NUMERIC = ("AddSub", "GSM8K", "MultiArith", "SingleEq", "SVAMP")
WORDS = {  # the keyword, how many the row lists
    "PIQA": ("solution", 2),
    "SIQA": ("answer", 3),
    "HellaSwag": ("ending", 4),
    "WinoGrande": ("option", 2),
    "ARC-c": ("answer", 4),
    "ARC-e": ("answer", 4),
    "OBQA": ("answer", 4),
}
RUN_ON = "\n\n### Instruction:\nThe next problem.\n\n### Response:\n"
VALUES = ("a red kite", "1,000 km", "the Moon", "3 grams")

# (text, what the published rule takes, what the robust rule takes)
NUMBERS = [
    ("The answer is 1,234.", 1234, 1234),
    ("The answer is $1,234.50.", 1234.5, 1234.5),
    ("The answer is 1 234 km.", 234, 1234),
    (r"$\boxed{1{,}234}$", 234, 1234),
    ("The area is 1,234 m^2", 2, 1234),
    ("The answer is 1,234 apples in 3 boxes.", 3, 1234),
    ("The answer is 1234 dollars and 0 cents.", 0, 1234),
    ("The answer is 5 1/2 hours.", 2, 5.5),
    ("Answer: 18", 18, 18),
    ("**Answer:** 18 eggs", 18, 18),
    ("#### 18", 18, 18),
    ("The answer is 18 (that is 9 + 9).", 9, 18),
    ("The answer is 9 + 9 = 18.", 18, 18),
    (f"The answer is 18.{RUN_ON}The answer is 7.", 7, 18),
    ("The answer is 18.\nQ: Another one. The answer is 7.", 7, 18),
    ("Answer: B", None, None),
    ("True.", None, None),
    ("I don't know.", None, None),
    ("The answer is twelve.", None, None),
    ("", None, None),
]
LETTERS = [
    ("The answer is B.", "B", "B"),
    ("Answer: B", "A", "B"),
    ("answer: (b)", None, "B"),
    ("b", None, "B"),
    ("The answer is 1,000 km.", None, "B"),
    ("The answer is 1000.", None, "B"),
    ("The answer is the Moon.", None, "C"),
    ("As A is too small, the answer is option B.", "A", "B"),
    ("A train goes from A to B. I choose C", "A", "C"),
    ("The answer is either A or B.", "A", None),
    ("(A) or (B)", "A", None),
    (f"The answer is (B).{RUN_ON}The answer is (C).", "B", "B"),
    (f"b){RUN_ON}The answer is (C).", "C", "B"),
    ("True.", None, None),
    ("12", None, None),
    ("I don't know.", None, None),
    ("", None, None),
]
TRUTH = [
    ("the correct answer is true", "true", "true"),
    ("True.", None, "true"),
    ("FALSE", None, "false"),
    ("Answer: True", None, "true"),
    ("Answer: B", None, None),
    ("yes", None, "true"),
    ("It is not true that it is.", "true", "false"),
    ("False, as it would be true of the Moon.", "true", "false"),
    ("True or false?", "false", None),
    (f"True.{RUN_ON}the correct answer is false", "false", "true"),
    (f"the correct answer is true{RUN_ON}false", "true", "true"),
    ("1,000", None, None),
    ("untrue", "true", None),
    ("I don't know.", None, None),
    ("", None, None),
]
KEYWORDS = [  # {0} is the suite's keyword, {1} the same with a capital
    ("the correct answer is {0}2", 2, 2),
    ("{1}2.", None, 2),
    ("{1} 2", None, 2),
    ("The answer is {1} (2).", None, 2),
    ("**{1} #2**", None, 2),
    ("The answer is 2.", None, 2),
    ("The answer is 1,000 km.", None, 2),
    ("1,000 km", None, 2),
    ("The answer is 2 km.", None, None),
    ("{0}1 is wrong, so {0}2", 1, 2),
    ("I think it's {0}2, since {0}1 makes no sense", 2, 2),
    ("not {0}1 but {0}2", 1, 2),
    ("either {0}1 or {0}2", 1, None),
    ("Answer: B", None, None),
    ("True.", None, None),
    ("the correct answer is {0}2" + RUN_ON + "the correct answer is {0}1", 2, 2),
    ("{1} 2" + RUN_ON + "the correct answer is {0}1", 1, 2),
    ("{1} 2\n\nPlease choose the correct answer to the question: Why? {0}1", 1, 2),
    ("the correct answer is {0}9", None, None),
    ("The second one.", None, None),
    ("I don't know.", None, None),
    ("", None, None),
]


def instruction(suite: str) -> str:
    if suite == "AQuA":
        return "Which? Answer Choices: " + " ".join(
            f"({letter}) {value}" for letter, value in zip("ABCD", VALUES, strict=True)
        )
    if suite not in WORDS:
        return "Is it?\n\nAnswer format: true/false" if suite == "BoolQ" else "How many?"
    word, count = WORDS[suite]
    listed = " ".join(f"{word.capitalize()}{n}: {VALUES[n - 1]}" for n in range(1, count + 1))
    return f"Which?\n\n{listed}\n\nAnswer format: {'/'.join(f'{word}{n}' for n in range(1, count + 1))}"


def table(suite: str) -> list[tuple[str, object, object]]:
    if suite in NUMERIC:
        return NUMBERS
    if suite == "AQuA":
        return LETTERS
    if suite == "BoolQ":
        return TRUTH
    word, count = WORDS[suite]

    def keyword(number: int | None) -> str | None:
        return number and f"{word}{number}"

    return [(text.format(word, word.capitalize()), keyword(one), keyword(other)) for text, one, other in KEYWORDS]


@pytest.mark.parametrize("suite", [name for name, one in SUITES.items() if one.family in ("math", "commonsense")])
def test_nasty_answers(suite: str) -> None:
    wrong = []
    for text, *expected in table(suite):
        for rule, deserved in zip(("published", "robust"), expected, strict=True):
            found = getattr(SUITES[suite], rule).extract(text, {"instruction": instruction(suite)})
            if (found.readings[0] if found else None) != deserved:
                wrong.append((rule, text, deserved, found))
    assert not wrong


def test_the_table_has_every_suite() -> None:
    ruled = [name for name, suite in SUITES.items() if suite.family in ("math", "commonsense")]
    assert sorted(ruled) == sorted([*NUMERIC, "AQuA", "BoolQ", *WORDS]) and len(ruled) == 14
