"""The demo data: arithmetic word problems with worked answers, made from the templates of problems.toml.

Train and test never share a question. Half of the test rows ask in wordings that the training rows have, with numbers
that they do not have for that template; the other half ask in wordings of their own.
"""

import json
import operator
import random
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DATA_FOLDER = "data/demo"
TRAIN_ROWS, TEST_ROWS, SEED = 2000, 200, 20250605

TABLES = tomllib.loads(Path(__file__).with_name("problems.toml").read_text(encoding="utf-8"))
PRONOUNS = {"he": ("he", "his", "him"), "she": ("she", "her", "her")}
NOUNS = {kind: nouns.split() for kind, nouns in TABLES["nouns"].items()}
IRREGULAR = {"person": "people", "child": "children", "fish": "fish", "sheep": "sheep"}
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


def plural(noun: str) -> str:
    if noun in IRREGULAR:
        return IRREGULAR[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


class Noun(str):
    """`{thing}` is the singular, `{thing:s}` the plural."""

    def __format__(self, spec: str) -> str:
        return plural(self) if spec == "s" else str(self)


class Person(str):
    """`{name}` with `{name.he}`, `{name.his}`, `{name.him}`, `{name.He}`, `{name.His}`."""

    def __new__(cls, name: str, pronouns: tuple[str, str, str]):
        person = super().__new__(cls, name)
        person.he, person.his, person.him = pronouns
        person.He, person.His = person.he.capitalize(), person.his.capitalize()
        return person


class Number(int):
    """`{a:apple}` is "5 apples", `{c:=apple}` the equation that gave it, "2 + 3 = 5 apples"."""

    equation = ""

    def __format__(self, spec: str) -> str:
        noun = spec.removeprefix("=")
        text = f"{self.equation} = {int(self)}" if spec.startswith("=") else str(int(self))
        return f"{text} {noun if self == 1 else plural(noun)}" if noun else text


@dataclass(frozen=True)
class Template:
    """A problem of problems.toml. `numbers` and `steps` map a name to the rule that computes it."""

    name: str
    numbers: dict[str, str]
    steps: dict[str, str]
    train: list[str]
    test: list[str]
    work: str


TEMPLATES = [Template(name, **table) for name, table in TABLES["problems"].items()]
PEOPLE = [Person(name, PRONOUNS[kind]) for kind, names in TABLES["people"].items() for name in names.split()]


class Draw:
    """Random choices that any Python version makes alike: only `random()` of a seeded generator is promised to stay."""

    def __init__(self, seed: int):
        self._random = random.Random(seed).random

    def below(self, n: int) -> int:
        return int(self._random() * n)

    def pick(self, options: Sequence):
        return options[self.below(len(options))]

    def shuffled(self, options: Sequence) -> list:
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in range(len(rest))]


def compute(rule: str, values: dict[str, Number]) -> Number:
    """`x` or `x op y`, each a whole number or the name of one."""
    left, *rest = (values.get(word, word) for word in rule.split(" "))
    if not rest:
        return Number(left)
    operation, a, b = rest[0], int(left), int(rest[1])
    result = Number(OPERATIONS[operation](a, b))
    result.equation = f"{a} {operation} {b}"
    return result


def draw_numbers(template: Template, draw: Draw) -> dict[str, Number]:
    """One set of numbers of a template, none below 2."""
    while True:
        values: dict[str, Number] = {}
        for name, rule in template.numbers.items():
            low, *high = (compute(bound, values) for bound in rule.split(" .. "))
            values[name] = Number(low + draw.below(max(1, high[0] - low + 1))) if high else low
        if min(values.values()) >= 2:
            return values


def make_row(template: Template, wording: str, numbers: dict[str, Number], draw: Draw) -> dict[str, str]:
    """A row {"instruction", "input", "output", "answer"}, with people and nouns drawn."""
    words: dict[str, Number | Person | Noun] = dict(numbers)
    for name, rule in template.steps.items():
        words[name] = answer = compute(rule, words)
    words |= dict(zip(("name", "other", "third"), draw.shuffled(PEOPLE), strict=False))
    for kind, nouns in NOUNS.items():
        other = words.get(kind.removesuffix("2"))
        words[kind] = Noun(draw.pick([noun for noun in nouns if noun != other]))
    return {
        "instruction": wording.format_map(words),
        "input": "",
        "output": f"{template.work.format_map(words)} The answer is {int(answer)}.",
        "answer": str(int(answer)),
    }


def normalised(question: str) -> str:
    """A question without case, punctuation and spacing: what two rows must not share."""
    return " ".join("".join(c if c.isalnum() else " " for c in question.lower()).split())


def make_problems(train_rows: int = TRAIN_ROWS, test_rows: int = TEST_ROWS, seed: int = SEED) -> tuple[list, list]:
    """The training rows and the test rows. Equal arguments give equal rows."""
    draw = Draw(seed)
    templates = TEMPLATES + [template for template in TEMPLATES if len(template.steps) == 1]  # one-step ones come twice
    questions: set[str] = set()
    reserved: set[tuple] = set()  # numbers of test rows, which no training row of that template has

    def rows(count: int, of_test: bool, new_wording: bool) -> list[dict[str, str]]:
        made: list[dict[str, str]] = []
        while len(made) < count:
            for template in draw.shuffled(templates)[: count - len(made)]:
                numbers = draw_numbers(template, draw)
                row = make_row(template, draw.pick(template.test if new_wording else template.train), numbers, draw)
                question, key = normalised(row["instruction"]), (template.name, *numbers.values())
                if question not in questions and (of_test or key not in reserved):
                    reserved.update([key] if of_test else [])
                    questions.add(question)
                    made.append(row)
        return made

    test = rows(test_rows // 2, of_test=True, new_wording=False)
    test += rows(test_rows - test_rows // 2, of_test=True, new_wording=True)
    return draw.shuffled(rows(train_rows, of_test=False, new_wording=False)), draw.shuffled(test)


def ensure_data(folder: str | Path = DATA_FOLDER) -> tuple[Path, Path]:
    """Paths of train.json and test.json, written first where they are missing or not what this version makes."""
    from moa.files import atomic_write  # late: it loads torch

    paths = Path(folder, "train.json"), Path(folder, "test.json")
    for path, rows in zip(paths, make_problems(), strict=True):
        content = ("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n").encode()
        if not path.is_file() or path.read_bytes() != content:
            atomic_write(path, content)
    return paths
