"""All tasks in one table: the paper's suites in the order of its tables, then the demo's."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli import nearest
from evaluate import extract_code, extract_number
from evaluate.extract_choice import Choices, Keywords, Letters
from evaluate.statements import Extraction

Rule = Callable[[str, dict[str, Any]], Extraction | None]  # (text, row) -> its answer, None where there is none


@dataclass(frozen=True)
class Task:
    """A suite of test problems, and how answers to them are scored.

    name: the paper's spelling. problems: rows in the published test file. family: the suites that the paper averages
    together. read_answer: makes a row's "answer" (where answers are programs, the row) what a text's answer is compared
    with; its ValueError says what was expected. published, robust: the two rules, always both. aliases:
    other names that choose the task, in any case.
    """

    name: str
    problems: int
    family: str
    read_answer: Callable[..., Any]
    published: Rule
    robust: Rule
    aliases: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The name of its entry module in `evaluate`."""
        return self.name.lower().replace("-", "_")

    @property
    def runs_code(self) -> bool:
        """Whether answers are programs, which are run to be judged."""
        return self.family == "code"

    def answer_of(self, fields: dict[str, Any], where: str) -> Any:
        """Read what a row's texts are compared with; ValueError, beginning with `where`, names the field at fault."""
        if self.runs_code:
            return self.read_answer(fields, where)
        if "answer" not in fields:
            raise ValueError(f"{where}: field 'answer' is missing")
        try:
            return self.read_answer(fields["answer"])
        except ValueError as error:
            raise ValueError(f"{where}: field 'answer': {self.name} expects {error}") from None


def _choice(choices: Choices) -> tuple[Callable[[Any], Any], Rule, Rule]:
    return choices.read_answer, choices.published, choices.robust


_NUMBER = (extract_number.read_answer, extract_number.published, extract_number.robust)
_TABLE = (
    Task("AddSub", 395, "math", *_NUMBER),
    Task("AQuA", 254, "math", *_choice(Letters())),
    Task("GSM8K", 1319, "math", *_NUMBER),
    Task("MultiArith", 600, "math", *_NUMBER),
    Task("SingleEq", 508, "math", *_NUMBER),
    Task("SVAMP", 1000, "math", *_NUMBER),
    Task("BoolQ", 3270, "commonsense", *_choice(Keywords())),
    Task("PIQA", 1838, "commonsense", *_choice(Keywords("solution", 2))),
    Task("SIQA", 1954, "commonsense", *_choice(Keywords("answer", 3, published_count=5)), aliases=("social_i_qa",)),
    Task("HellaSwag", 10042, "commonsense", *_choice(Keywords("ending", 4))),
    Task("WinoGrande", 1267, "commonsense", *_choice(Keywords("option", 2))),
    Task("ARC-c", 1172, "commonsense", *_choice(Keywords("answer", 5)), aliases=("ARC-Challenge",)),
    Task("ARC-e", 2376, "commonsense", *_choice(Keywords("answer", 5)), aliases=("ARC-Easy",)),
    Task("OBQA", 500, "commonsense", *_choice(Keywords("answer", 4, published_count=5)), aliases=("openbookqa",)),
    Task("HumanEval", 164, "code", *extract_code.rules(extract_code.read_humaneval)),
    Task("MBPP", 500, "code", *extract_code.rules(extract_code.read_mbpp)),
    Task("demo", 200, "demo", *_NUMBER),
)
TASKS: dict[str, Task] = {task.name: task for task in _TABLE}


def task_named(name: str) -> Task:
    """Return the task of that name or alias, in any case ("addsub"). ValueError names the nearest if there is none."""

    def letters(name: str) -> str:
        return "".join(character for character in name.casefold() if character.isalnum())

    tasks = {letters(spelling): task for task in TASKS.values() for spelling in (task.name, *task.aliases)}
    if letters(name) not in tasks:
        near = tasks[nearest(letters(name), tasks)].name
        raise ValueError(f"no suite is named {name[:80]!r} (nearest: {near}); there are {', '.join(TASKS)}")
    return tasks[letters(name)]


def task_of_file(path: str | Path) -> Task:
    """Return the task that a file's name begins with, up to the first dot: OUT/AddSub.jsonl, gsm8k.seed1.jsonl."""
    try:
        return task_named(Path(path).name.split(".")[0])
    except ValueError as error:
        raise ValueError(f"{path}: cannot tell the suite from the file's name: {error}") from None
