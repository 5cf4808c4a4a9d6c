"""The demo data: arithmetic word problems with worked answers, made from the templates of problems.txt.

Train and test never share a question. Half of the test rows ask in wordings that the training rows have, with numbers
that they do not have for that template; the other half ask in wordings of their own.
"""

import json
import operator
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DATA_FOLDER = "data/demo"
TRAIN_ROWS, TEST_ROWS, SEED = 2000, 200, 20250605

HE, SHE = ("he", "his", "him"), ("she", "her", "her")
PEOPLE = {
    HE: "Adam Ben Carlos David Eric Felix George Henry Ivan Jack Kevin Leo Mark Nathan Oliver Paul Ryan Sam Tom Victor",
    SHE: "Alice Bella Clara Diana Emma Fiona Grace Hannah Irene Julia Kate Laura Maria Nina Olivia Rosa Sara Tina Zoe",
}
THINGS = "marble sticker card stamp bead button pencil crayon pebble badge ribbon balloon block notebook postcard pin"
FRUIT = "apple orange peach pear plum banana lemon mango apricot cherry strawberry fig"
TOYS = "ball kite doll puzzle book pen game cap mug poster lamp whistle"
NOUNS = {  # a placeholder ending in 2 is another noun of the same kind
    "thing": THINGS,
    "food": FRUIT,
    "food2": FRUIT,
    "toy": TOYS,
    "toy2": TOYS,
    "treat": "cookie muffin cupcake brownie doughnut pretzel tart scone biscuit waffle",
    "animal": "cow sheep goat horse pony donkey pig dog",
    "flower": "rose tulip daisy sunflower lily poppy",
}
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
IRREGULAR = {"person": "people", "child": "children", "fish": "fish", "sheep": "sheep"}


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
    """One block of problems.txt. `numbers` and `steps`: pairs of a name and what it is."""

    name: str
    numbers: tuple[tuple[str, str], ...]
    steps: tuple[tuple[str, str], ...]
    train: Sequence[str]
    test: Sequence[str]
    work: str


def read_templates() -> list[Template]:
    """The templates of problems.txt, in the file's order."""
    templates = []
    for block in Path(__file__).with_name("problems.txt").read_text(encoding="utf-8").split("\n[")[1:]:
        name, *lines = block.splitlines()
        texts: dict[str, list[str]] = {}
        for key, text in (line.split(": ", 1) for line in lines if line):
            texts.setdefault(key, []).append(text)
        numbers, steps = (_pairs(texts[key][0]) for key in ("numbers", "steps"))
        templates.append(Template(name.rstrip("]"), numbers, steps, texts["train"], texts["test"], texts["work"][0]))
    return templates


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple(tuple(part.split(" = ")) for part in text.split("; "))


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


def draw_numbers(template: Template, draw: Draw) -> dict[str, Number]:
    """One set of numbers of a template, none below 2."""
    while True:
        values: dict[str, Number] = {}
        for name, rule in template.numbers:
            if " .. " in rule:
                low, high = (_compute(bound, values) for bound in rule.split(" .. "))
                values[name] = Number(low + draw.below(max(1, high - low + 1)))
            else:
                values[name] = _compute(rule, values)
        if min(values.values()) >= 2:
            return values


def make_row(template: Template, wording: str, numbers: dict[str, Number], draw: Draw) -> dict[str, str]:
    """A row {"instruction", "input", "output", "answer"}, with people and nouns drawn."""
    words: dict[str, Number | Person | Noun] = dict(numbers)
    for name, rule in template.steps:
        words[name] = _compute(rule, words)
    people = draw.shuffled([Person(name, pronouns) for pronouns, names in PEOPLE.items() for name in names.split()])
    words |= dict(zip(("name", "other", "third"), people, strict=False))
    for kind, nouns in NOUNS.items():
        taken = words.get(kind.removesuffix("2")) if kind.endswith("2") else None
        words[kind] = Noun(draw.pick([noun for noun in nouns.split() if noun != taken]))
    answer = words[template.steps[-1][0]]
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
    draw, templates = Draw(seed), read_templates()
    templates += [template for template in templates if len(template.steps) == 1]  # one-step problems come twice
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

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = (folder / "train.json", folder / "test.json")
    for path, rows in zip(paths, make_problems(), strict=True):
        content = ("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n").encode()
        if not path.is_file() or path.read_bytes() != content:
            atomic_write(path, content)
    return paths


def _compute(rule: str, values: dict[str, Number]) -> Number:
    """`x` or `x op y`, each a whole number or the name of one."""
    left, *rest = (values[word] if word in values else word for word in rule.split(" "))
    if not rest:
        return Number(left)
    operation, a, b = rest[0], int(left), int(rest[1])
    result = Number(OPERATIONS[operation](a, b))
    result.equation = f"{a} {operation} {b}"
    return result
