"""How a program is read from a generated text: the two rules of the code suites.

`start` is what the model was to continue (HumanEval's prompt: imports, a signature, its docstring), empty where it was
asked for a whole program. `name` is the function that the tests call, None where that is not known.
"""

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator

from evaluate.suite import Found

_STOP = re.compile(r"\n(?:class|def|#|if|print)")  # where a continuation ends: code that is not indented
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#.-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.M | re.S)
_INDENT = "    "
# What the robust rule looks at, so that every text is read in a few seconds.
_MOST_CHARACTERS, _MOST_STARTS, _MOST_CUTS = 20_000, 20, 10


def published(text: str, start: str, name: str | None) -> Found | None:
    """The first fenced block, else the text. If it does not define the function, it continues `start`, up to a stop
    word."""
    block = _FENCE.search(text)
    code = block[2] if block else text
    if not code.strip():
        return None
    if start and not _defines(code, name):
        code = _joined(start, _first_line_indented(_STOP.split(code, maxsplit=1)[0]))
    return _found(code)


def robust(text: str, start: str, name: str | None) -> Found | None:
    """The definition of the function in any block, else in the text; else the best reading as a continuation."""
    plain = text[:_MOST_CHARACTERS].replace("\r\n", "\n")
    cut = _before_run_on(plain)
    blocks = sorted(_FENCE.finditer(cut), key=lambda block: not block[1].lower().startswith("py"))
    pieces = [*(block[2] for block in blocks), cut.partition("```")[0], cut]
    pieces = [piece for piece in dict.fromkeys(pieces) if piece.strip()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about the program: "\d" in a text
        for piece in pieces:
            if code := _definition(piece, name):
                before = _preamble(start, name)
                return _found("" if before in code else before, code)
        for piece in pieces if start else ():
            if code := _continuation(piece, start, name):
                return _found(code)
    return published(cut, start, name)


def _found(*sources: str) -> Found:
    kept = tuple(source.strip("\n") + "\n" for source in sources if source)
    return Found("\n\n".join(kept), (kept,))


def _defines(code: str, name: str | None) -> bool:
    function = r"\w+" if name is None else re.escape(name)
    return bool(re.search(rf"^(?:(?:async +)?def +{function}\b|{function} *=[^=])", code, re.M))


def _joined(start: str, code: str) -> str:
    return start + ("" if start.endswith("\n") or code.startswith("\n") else "\n") + code


def _first_line_indented(code: str) -> str:
    """Predictions are stripped, which takes a continuation's first indentation away."""
    return _INDENT + code if code[:1].strip() else code


_RUN_ON = re.compile(r"^### ?(?:Instruction|Input|Response)\b|Below is an instruction", re.M)


def _before_run_on(text: str) -> str:
    """The text up to the template's next heading that has something before it. Other "###" may be Python comments."""
    for match in _RUN_ON.finditer(text):
        if text[: match.start()].strip():
            return text[: match.start()]
    return text


_CODE = re.compile(r"^(?:import|from|def|class|async|@|[A-Za-z_]\w*(?: *:[^=\n]+)? *=[^=])", re.M)
_IMPORT = re.compile(r"^(?:import [\w., ]+|from [\w.]+ import [\w., *]+)$", re.M)


def _definition(piece: str, name: str | None) -> str:
    """The lines of a piece that define the function and what stands with it, without words before and after; "" if it
    does not define it."""
    if not _defines(piece, name):
        piece = textwrap.dedent(piece)
    if not _defines(piece, name):
        return ""
    for match in list(_CODE.finditer(piece))[:_MOST_STARTS]:
        lines = piece[match.start() :].split("\n")
        code = "\n".join(lines[: _compiling(lines)])
        if _defines(code, name):
            imports = [line for line in _IMPORT.findall(piece[: match.start()]) if _tree(line)[0]]
            return "\n".join([*imports, _without_demonstration(code, name)])
    return ""


def _preamble(start: str, name: str | None) -> str:
    """What stands before the function in `start`: imports and functions that it or the tests may call."""
    match = re.search(rf"^(?:async +)?def +{re.escape(name)}\b", start, re.M) if name else None
    before = start[: match.start()].strip("\n") if match else ""
    return before if before and _tree(before)[0] else ""


def _continuation(piece: str, start: str, name: str | None) -> str:
    """`start` with the lines of a piece as the function's body, indented in the way that keeps most of them; "" if none
    gives the function a body."""
    before = start.rstrip("\n").split("\n")
    best: tuple[int, tuple[str, ...]] = (0, ())
    for lines in dict.fromkeys(_indentations(piece)):
        kept = _compiling([*before, *lines], len(before))
        if kept - len(before) > best[0] and _has_body("\n".join([*before, *lines][:kept]), name):
            best = (kept - len(before), lines[: kept - len(before)])
    return _without_demonstration("\n".join([*before, *best[1]]), name) if best[0] else ""


def _indentations(piece: str) -> Iterator[tuple[str, ...]]:
    """A body's lines as they are; with the first line at the function's indentation; all moved there; each of them
    also from the first indented line on, without the words before it."""
    lines = piece.strip("\n").split("\n")
    indented = next((place for place, line in enumerate(lines) if line[:1] in (" ", "\t") and line.strip()), 0)
    for part in (lines, lines[indented:]):
        first, rest = _INDENT + part[0].lstrip(), part[1:]
        yield tuple(part)
        yield first, *rest
        yield tuple(_moved(part))
        yield first, *_moved(rest)


def _moved(lines: list[str]) -> list[str]:
    return textwrap.indent(textwrap.dedent("\n".join(lines)), _INDENT).split("\n")


def _tree(code: str) -> tuple[ast.Module | None, int]:
    """(the syntax tree of a program, 0) if it compiles, else (None, the number of the line at which it does not)."""
    try:
        tree = ast.parse(code)
        compile(tree, "<text>", "exec", dont_inherit=True)
    except SyntaxError as error:
        return None, error.lineno or 1
    except (ValueError, MemoryError, RecursionError, OverflowError):
        return None, 1
    return tree, 0


def _compiling(lines: list[str], least: int = 0) -> int:
    """How many of the lines, from the first on, compile as a program; `least` if not more than these."""
    kept = len(lines)
    for _ in range(_MOST_CUTS):
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
    return tree is not None and all(len(one.body) > (ast.get_docstring(one) is not None) for one in functions)


_ALWAYS_KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _without_demonstration(code: str, name: str | None) -> str:
    """The program without what shows it at work: calls, prints and assertions beside the definitions."""
    tree, _ = _tree(code)
    assert tree is not None
    last = max((node.end_lineno or 0 for node in _functions(tree, name)), default=len(code))
    lines = code.split("\n")
    kept: set[int] = set()
    for node in tree.body:
        after = node.lineno > last
        calls = any(isinstance(one, ast.Call) for one in ast.walk(node))
        shows = isinstance(node, ast.Expr | ast.Assert) or "__name__" in lines[node.lineno - 1]
        if isinstance(node, _ALWAYS_KEPT) or not (shows or after and calls):
            decorators = getattr(node, "decorator_list", [])
            first = min([node.lineno, *(one.lineno for one in decorators)])
            kept.update(range(first, (node.end_lineno or node.lineno) + 1))
    return "\n".join(line for number, line in enumerate(lines, 1) if number in kept or not line.strip()).strip("\n")
