"""Prediction files for the tests of `evaluate`, with small problems in the formats of HumanEval and MBPP."""

import json
from pathlib import Path
from typing import Any

import pytest

from evaluate.__main__ import main

PROBLEMS = [
    {
        "task_id": "Made/0",
        "prompt": 'from typing import List\n\n\ndef total(values: List[int]) -> int:\n    """ Sum of the even values.\n'
        '    >>> total([1, 2, 4])\n    6\n    """\n',
        "entry_point": "total",
        "canonical_solution": "    result = 0\n    for value in values:\n        if value % 2 == 0:\n"
        "            result += value\n\n    return result\n",
        "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2, 4]) == 6\n"
        "    assert candidate([]) == 0\n    assert candidate([-2, 3]) == -2\n",
    },
    {
        "task_id": "Made/1",
        "prompt": 'def shift(text: str) -> str:\n    """ Each letter moved on by one. """\n'
        '    return "".join(chr(ord(c) + 1) for c in text)\n\n\ndef unshift(text: str) -> str:\n'
        '    """ The inverse of shift. """\n',
        "entry_point": "unshift",
        "canonical_solution": '    return "".join(chr(ord(c) - 1) for c in text)\n',
        "test": "def check(candidate):\n"
        "    for text in ('', 'abc', 'Hello'):\n        assert candidate(shift(text)) == text\n",
    },
    {
        "task_id": "Made/2",
        "prompt": 'import math\n\n\ndef hypotenuse(a, b):\n    """ The longest side. """\n',
        "entry_point": "hypotenuse",
        "canonical_solution": "    def square(side):\n        return side * side\n\n"
        "    return math.sqrt(square(a) + square(b))\n",
        "test": "def check(candidate):\n"
        "    assert abs(candidate(3, 4) - 5) < 1e-6\n    assert abs(candidate(5, 12) - 13) < 1e-6\n",
    },
    {
        "task_id": "Made/3",
        "prompt": "\ndef longest(words):\n    '''The first of the longest words, None of none.\n    '''\n",
        "entry_point": "longest",
        "canonical_solution": "    if not words:\n        return None\n    return max(words, key=len)\n",
        "test": "def check(candidate):\n"
        "    assert candidate([]) is None\n    assert candidate(['a', 'bb', 'cc']) == 'bb'\n",
    },
    {
        "task_id": "Made/4",
        "prompt": 'def sum(numbers):\n    """ A product, in spite of its name: the tests mean this one. """\n',
        "entry_point": "sum",
        "canonical_solution": "    product = 1\n    for number in numbers:\n"
        "        product *= number\n    return product\n",
        "test": "def check(candidate):\n"
        "    assert candidate([2, 3, 4]) == 24\n    assert sum([5]) == 5 and candidate([]) == 1\n",
    },
]

MBPP = [
    {
        "task_id": 1,
        "text": "Write a function to find the shared elements of two tuples.",
        "code": "def shared(a, b):\n    return tuple(sorted(set(a) & set(b)))\n",
        "test_list": ["assert set(shared((3, 4), (4, 5))) == {4}", "assert shared((1, 2), (3,)) == ()"],
        "test_setup_code": "",
        "challenge_test_list": ["assert False, 'challenge tests are not run'"],
    },
    {
        "task_id": 2,
        "text": "Write a function to count the leaves of a tree of Nodes.",
        "code": "class Node:\n    left = right = None\n\ndef leaves(tree):\n    if tree is None:\n        return 0\n"
        "    return leaves(tree.left) + leaves(tree.right) or 1\n",
        "test_list": ["assert leaves(root) == 1"],
        "test_setup_code": "root = Node()\nroot.left = Node()\n",
        "challenge_test_list": [],
    },
    {
        "task_id": 3,
        "prompt": "Write a python function to halve a number.",
        "code": "def half(number):\n    return number / 2\n",
        "test_list": ["assert math.isclose(half(3), 1.5)"],
        "test_imports": ["import math"],
    },
]


def predicted(problem: dict[str, Any], generate: str | list[str]) -> dict[str, Any]:
    return problem | {"instruction": problem.get("prompt", ""), "input": "", "output": "", "generate": generate}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(answer: Any, generate: Any, **others: Any) -> dict[str, Any]:
    return {"instruction": "How many?", "input": "", "output": "", "answer": answer, "generate": generate} | others


def answers(name: str) -> list[Any]:
    """Rows of tests/data/answers: a text and what a person (a rule) reads as its answer, None for nothing."""
    path = Path(__file__).resolve().parent.parent / "data" / "answers" / f"{name}.json"
    return [row for rows in json.loads(path.read_text(encoding="utf-8")).values() for row in rows]


def refusal(capsys: pytest.CaptureFixture[str], status: int, *argv: object, suite: str | None = None) -> str:
    """What a command that must fail with that status says on stderr."""
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in argv], suite)
    out, err = capsys.readouterr()
    assert stopped.value.code == status
    assert out == "" and err.startswith("error: ") and err.count("error: ") == 1
    return err
