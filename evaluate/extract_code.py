"""Tasks that are answered with a program: the rows of HumanEval and MBPP, and how a program is read from a text.

`prompt` is what the model was to continue (HumanEval's imports, signature and docstring), empty where it was asked for
a whole program. `name` is the function that the tests call, None where that is not known.
"""

import ast
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from evaluate.answer_statements import truncate_run_on
from evaluate.metrics import Extraction, Metric, Program
from evaluate.rows import text_field, texts_field


@dataclass(frozen=True)
class CodeProblem:
    """names: what the tests are about, so that the program has to define it. setup: runs before the program."""

    prompt: str
    names: tuple[str, ...]
    tests: tuple[str, ...]
    setup: tuple[str, ...] = ()

    def program(self, extraction: Extraction) -> Program:
        return Program((*self.setup, *extraction.candidates[0]), self.tests, self.names)


def read_humaneval(fields: dict[str, Any]) -> CodeProblem:
    """Read a row of HumanEval, whose "test" is a function `check` of the candidate."""
    prompt, name = text_field(fields, "prompt"), text_field(fields, "entry_point")
    if not name.isidentifier():
        raise ValueError(f"field 'entry_point': expected the name of a function, got {name[:60]!r}")
    return CodeProblem(prompt, (name,), (text_field(fields, "test"), f"check({name})"))


_DEFINED = re.compile(r"^(?:def|class) +(\w+)", re.M)


def read_mbpp(fields: dict[str, Any]) -> CodeProblem:
    """Read a row of MBPP; `names` are what the reference defines and the tests use."""
    tests = texts_field(fields, "test_list")
    used = set(re.findall(r"\w+", "\n".join(tests)))
    names = tuple(name for name in _DEFINED.findall(text_field(fields, "code")) if name in used)
    setup = [text_field(fields, "test_setup_code")] if "test_setup_code" in fields else []
    setup += texts_field(fields, "test_imports") if fields.get("test_imports", []) != [] else []
    return CodeProblem("", names, tests, tuple(setup))


def code_metrics(read_problem: Callable[[dict[str, Any]], CodeProblem]) -> tuple[Any, Metric, Metric, Any]:
    """Return how a task's rows are read, the published and the robust metric, and how a program to run is made."""

    def metric(extract: Callable[[str, str, str | None], Extraction | None]) -> Metric:
        def of_row(text: str, row: dict[str, Any]) -> Extraction | None:
            problem = read_problem(row)
            return extract(text, problem.prompt, problem.names[-1] if problem.names else None)

        return Metric(of_row)

    return read_problem, metric(published), metric(robust), lambda extraction, problem: problem.program(extraction)


_STOP = re.compile(r"\n(?:class|def|#|if|print)")  # where a continuation ends: code that is not indented
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.M | re.S)
_INDENT = "    "
_RUN_ON = re.compile(r"^### ?(?:Instruction|Input|Response)\b|Below is an instruction", re.M)  # others are comments
# How much the robust metric looks at, so that every text is read in a few seconds.
_MAX_CHARACTERS, _MAX_STARTS, _MAX_CUTS = 20_000, 20, 10


def published(text: str, prompt: str, name: str | None) -> Extraction | None:
    """Take the first fenced block, else the text; if that does not define the function, as a continuation of `prompt`
    up to a stop word."""
    block = _FENCE.search(text)
    code = block[2] if block else text
    if not code.strip():
        return None
    if prompt and not _defines(code, name):
        body = _STOP.split(code, maxsplit=1)[0]
        if body[:1].strip():  # predictions are stripped, which takes a continuation's first indentation away
            body = _INDENT + body
        code = prompt + ("" if prompt.endswith("\n") or body.startswith("\n") else "\n") + body
    return _extraction(code)


def robust(text: str, prompt: str, name: str | None) -> Extraction | None:
    """Take the definition of the function in any block, else in the text; else the best reading as a continuation."""
    cut = truncate_run_on(text[:_MAX_CHARACTERS].replace("\r\n", "\n"), _RUN_ON)
    blocks = sorted(_FENCE.finditer(cut), key=lambda block: not block[1].lower().startswith("py"))
    pieces = [*(block[2] for block in blocks), cut.partition("```")[0], cut]
    pieces = [piece for piece in dict.fromkeys(pieces) if piece.strip()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about the program: "\d" in a text
        for piece in pieces:
            if code := _definition(piece, name):
                before = _preamble(prompt, name)
                return _extraction("" if before in code else before, code)
        for piece in pieces if prompt else ():
            if code := _continuation(piece, prompt, name):
                return _extraction(code)
    return published(cut, prompt, name)


def _extraction(*sources: str) -> Extraction:
    kept = tuple(source.strip("\n") + "\n" for source in sources if source)
    return Extraction("\n\n".join(kept), (kept,))


def _defines(code: str, name: str | None) -> bool:
    function = r"\w+" if name is None else re.escape(name)
    return bool(re.search(rf"^(?:(?:async +)?def +{function}\b|{function} *=[^=])", code, re.M))


_CODE = re.compile(r"^(?:import|from|def|class|async|@|[A-Za-z_]\w*(?: *:[^=\n]+)? *=[^=])", re.M)
_IMPORT = re.compile(r"^(?:import [\w., ]+|from [\w.]+ import [\w., *]+)$", re.M)


def _definition(piece: str, name: str | None) -> str:
    """Return the lines of a piece that define the function and what stands with it, without words before and after.

    Returns "" if the piece does not define it.
    """
    if not _defines(piece, name):
        piece = textwrap.dedent(piece)
    if not _defines(piece, name):
        return ""
    for match in list(_CODE.finditer(piece))[:_MAX_STARTS]:
        lines = piece[match.start() :].split("\n")
        code = "\n".join(lines[: _count_compiling(lines)])
        if _defines(code, name):
            imports = [line for line in _IMPORT.findall(piece[: match.start()]) if _tree(line)[0]]
            return "\n".join([*imports, _without_demonstration(code, name)])
    return ""


def _preamble(prompt: str, name: str | None) -> str:
    """Return what stands before the function in `prompt`: imports and functions that it or the tests may call."""
    match = re.search(rf"^(?:async +)?def +{re.escape(name)}\b", prompt, re.M) if name else None
    before = prompt[: match.start()].strip("\n") if match else ""
    return before if before and _tree(before)[0] else ""


def _continuation(piece: str, prompt: str, name: str | None) -> str:
    """Return `prompt` with the lines of a piece as the function's body, indented in the way that keeps most of them.

    Returns "" if no way gives the function a body.
    """
    before = prompt.rstrip("\n").split("\n")
    best: tuple[int, tuple[str, ...]] = (0, ())
    for lines in dict.fromkeys(_indentations(piece)):
        kept = _count_compiling([*before, *lines], len(before))
        if kept - len(before) > best[0] and _has_body("\n".join([*before, *lines][:kept]), name):
            best = (kept - len(before), lines[: kept - len(before)])
    return _without_demonstration("\n".join([*before, *best[1]]), name) if best[0] else ""


def _indentations(piece: str) -> Iterator[tuple[str, ...]]:
    """Yield a body's lines as they are; with the first one at the function's indentation; with all moved there.

    Each of these also comes from the first indented line on, without the words before it.
    """
    lines = piece.strip("\n").split("\n")
    indented = next((n for n, line in enumerate(lines) if line[:1] in (" ", "\t") and line.strip()), 0)
    for part in (lines, lines[indented:]):
        first, rest = _INDENT + part[0].lstrip(), part[1:]
        yield tuple(part)
        yield first, *rest
        yield tuple(_moved(part))
        yield first, *_moved(rest)


def _moved(lines: list[str]) -> list[str]:
    return textwrap.indent(textwrap.dedent("\n".join(lines)), _INDENT).split("\n")


def _tree(code: str) -> tuple[ast.Module | None, int]:
    """Return (the syntax tree, 0) of a program that compiles, else (None, the number of the line at fault)."""
    try:
        tree = ast.parse(code)
        compile(tree, "<text>", "exec", dont_inherit=True)
    except SyntaxError as error:
        return None, error.lineno or 1
    except (ValueError, MemoryError, RecursionError, OverflowError):
        return None, 1
    return tree, 0


def _count_compiling(lines: list[str], least: int = 0) -> int:
    """Count the lines, from the first on, that compile as a program; `least` if no more than these do."""
    kept = len(lines)
    for _ in range(_MAX_CUTS):
        if kept <= least:
            break
        tree, wrong = _tree("\n".join(lines[:kept]))
        if tree:
            return kept
        kept = min(kept, wrong) - 1
    return least


def _functions(tree: ast.Module, name: str | None) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and name in (None, node.name):
            yield node


def _has_body(code: str, name: str | None) -> bool:
    tree, _ = _tree(code)
    functions = _functions(tree, name) if tree else ()
    return tree is not None and all(len(node.body) > (ast.get_docstring(node) is not None) for node in functions)


_ALWAYS_KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _without_demonstration(code: str, name: str | None) -> str:
    """Return the program without what shows it at work: calls, prints and assertions beside the definitions."""
    tree, _ = _tree(code)
    assert tree is not None
    last = max((node.end_lineno or 0 for node in _functions(tree, name)), default=len(code))
    lines = code.split("\n")
    kept: set[int] = set()
    for node in tree.body:
        after = node.lineno > last
        calls = any(isinstance(child, ast.Call) for child in ast.walk(node))
        shows = isinstance(node, ast.Expr | ast.Assert) or "__name__" in lines[node.lineno - 1]
        if isinstance(node, _ALWAYS_KEPT) or not (shows or after and calls):
            first = min(part.lineno for part in (node, *getattr(node, "decorator_list", [])))
            kept.update(range(first, (node.end_lineno or node.lineno) + 1))
    return "\n".join(line for number, line in enumerate(lines, 1) if number in kept or not line.strip()).strip("\n")
