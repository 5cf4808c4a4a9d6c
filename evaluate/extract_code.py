"""Tasks that are answered with a program: the rows of HumanEval and MBPP, and how a program is read from a text.

`prompt` is what the model was to continue (HumanEval's imports, signature and docstring), empty where it was asked for
a whole program. `name` is the function that the tests call, None where that is not known.
"""

import ast
import builtins
import re
import symtable
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from evaluate.rows import texts_field
from evaluate.sandbox import Program
from evaluate.statements import CHAT_TOKENS, Extraction, truncate_run_on, without_thinking
from moa.reading import require_text_fields

PUBLISHED_SECONDS = 3.0  # the time limit behind the paper's tables
Sources = tuple[str, ...]  # of one program, run one after another; none where a text holds no program


@dataclass(frozen=True)
class CodeProblem:
    """names: what the tests are about, so that the program has to define it; the last is the function they call."""

    prompt: str
    names: tuple[str, ...]
    tests: tuple[str, ...]


def read_humaneval(fields: dict[str, Any], where: str) -> CodeProblem:
    """Read a row of HumanEval, whose "test" is a function `check` of the candidate."""
    require_text_fields(fields, ("prompt", "entry_point", "test"), where)
    name = fields["entry_point"]
    if not name.isidentifier():
        raise ValueError(f"{where}: field 'entry_point': expected the name of a function, got {name[:60]!r}")
    return CodeProblem(fields["prompt"], (name,), (fields["test"], f"check({name})"))


_DEFINED = re.compile(r"^(?:def|class) +(\w+)", re.M)


def read_mbpp(fields: dict[str, Any], where: str) -> CodeProblem:
    """Read a row of MBPP. Its set-up code runs before the tests and may use what the program defines.

    `names` are what the reference defines and the tests use.
    """
    setup = ["test_setup_code"] if "test_setup_code" in fields else []
    require_text_fields(fields, ["code", *setup], where)
    imports = texts_field(fields, "test_imports", where) if fields.get("test_imports", []) != [] else ()
    tests = (*map(fields.get, setup), *imports, *texts_field(fields, "test_list", where))
    used = set(re.findall(r"\w+", "\n".join(tests)))
    return CodeProblem("", tuple(name for name in _DEFINED.findall(fields["code"]) if name in used), tests)


def rules(read_problem: Callable[[dict[str, Any], str], CodeProblem]) -> tuple[Callable[..., Any], ...]:
    """Return how a task's rows are read, and the published and the robust rule, whose candidates are Programs."""

    def rule(read_sources: Callable[[str, str, str | None], Sources], seconds: float | None) -> Callable[..., Any]:
        def extract(text: str, row: dict[str, Any]) -> Extraction | None:
            problem = read_problem(row, "row")
            sources = read_sources(text, problem.prompt, problem.names[-1] if problem.names else None)
            program = Program(sources, problem.tests, problem.names, seconds)
            return Extraction("\n\n".join(sources), (program,)) if sources else None

        return extract

    return read_problem, rule(published, PUBLISHED_SECONDS), rule(robust, None)


def published(text: str, prompt: str, name: str | None) -> Sources:
    """Take the prompt with the text behind it, untouched: comparable with the paper's tables."""
    return (prompt + text,) if text.strip() else ()


_FENCE = re.compile(r"```(?:[ \t]*[\w+#.-]*[ \t]*\n)?(.*?)(```|\Z)", re.S)  # it may close on a line of code
# Other headings are comments.
_RUN_ON = re.compile(rf"^### ?(?:Instruction|Input|Response)\b|Below is an instruction|{CHAT_TOKENS}", re.M)
# How much the robust metric looks at, so that every text is read in a few seconds.
_MAX_CHARACTERS, _MAX_BLOCKS, _MAX_STARTS, _MAX_CUTS = 20_000, 20, 20, 10


def robust(text: str, prompt: str, name: str | None) -> Sources:
    """Take the last block that defines the function, else the text, else the best reading as a continuation.

    A block that was closed comes before one that was not, a function with a body before a stub.
    """
    answer = without_thinking(text)[:_MAX_CHARACTERS].replace("\r\n", "\n")
    answer = truncate_run_on(answer, _RUN_ON)
    blocks = sorted(list(_FENCE.finditer(answer))[-_MAX_BLOCKS:], key=lambda block: (block[2] == "", -block.start()))
    pieces = [*(block[1] for block in blocks), answer.partition("```")[0], answer]
    pieces = [piece for piece in dict.fromkeys(pieces) if piece.strip()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler, about the program: "\d" in a text
        definitions = [code for piece in pieces if (code := _definition(piece, name))]
        for code in definitions:
            if not _is_stub(code, name):
                return _whole(code, pieces, prompt, name)
        for piece in pieces if prompt else ():
            if not _defines(piece, name) and (code := _continuation(piece, prompt, name)):
                return (code,)
        return _whole(definitions[0], pieces, prompt, name) if definitions else published(answer, prompt, name)


_CODE = re.compile(r"^(?:import|from|def|class|async|@|[A-Za-z_]\w*(?: *:[^=\n]+)? *=[^=])", re.M)


def _definition_of(name: str | None) -> str:
    """Return a pattern of the first line of a function's definition."""
    function = r"\w+" if name is None else re.escape(name)
    return rf"(?:(?:async +)?def +{function}\b|{function} *= *(?:lambda\b|[\w.]*partial\(|[A-Za-z_]\w* *$))"


def _defines(code: str, name: str | None) -> bool:
    return bool(re.search(f"^{_definition_of(name)}", code, re.M))


def _at_margin(piece: str, name: str | None) -> str:
    """Return the piece; if only a block that is indented or quoted defines the function, that block, moved left."""
    indented = re.search(f"^([ \t>]+){_definition_of(name)}", piece, re.M)
    if not indented or _defines(piece, name):
        return piece
    lines = [line for line in piece.split("\n") if line.startswith(indented[1]) or not line.strip()]
    return "\n".join(line.removeprefix(indented[1]) for line in lines)


def _chunks(piece: str) -> Iterator[str]:
    """Yield the code between the words of a piece: from each line that may begin some, as long as it compiles."""
    for match in islice(_CODE.finditer(piece), _MAX_STARTS):
        yield _compiling(piece[match.start() :].split("\n"))


def _definition(piece: str, name: str | None) -> str:
    """Return the code of a piece that defines the function, "" if there is none."""
    piece = _at_margin(piece, name)
    return next((code for code in _chunks(piece) if _defines(code, name)), "") if _defines(piece, name) else ""


def _whole(code: str, pieces: list[str], prompt: str, name: str | None) -> Sources:
    """Return a definition behind the code of other pieces that it uses, and behind all that precedes it in the prompt.

    The tests may call that as well.
    """
    for chunk in (chunk for piece in pieces for chunk in reversed([*_chunks(_at_margin(piece, name))])):
        used, bound = _names(code)
        if (used - bound) & _names(chunk)[1] and not _wrong_line(f"{chunk}\n\n{code}"):
            code = f"{chunk}\n\n{code}"
    code = _without_demonstration(code, name)
    before = re.split(f"^{_definition_of(name)}", prompt, maxsplit=1, flags=re.M)[0].strip("\n") if name else ""
    return (before + "\n", code) if before and before not in code and not _wrong_line(before) else (code,)


_DOES_NOTHING = (ast.Pass, ast.Raise, ast.Import, ast.ImportFrom)


def _is_stub(code: str, name: str | None) -> bool:
    """Whether the function does nothing but return a constant or raise an error, or is not there."""
    return all(
        isinstance(node, _DOES_NOTHING)
        or isinstance(node, ast.Expr | ast.Return)
        and isinstance(node.value, ast.Constant | None)
        for function in _functions(code, name)[-1:]
        for node in function.body
    )


def _continuation(piece: str, prompt: str, name: str | None) -> str:
    """Return `prompt` with the lines of a piece as the function's body, indented in the way that keeps most of them.

    Returns "" if no way gives the function a body.
    """
    before = prompt.rstrip("\n").split("\n")
    programs = [_compiling([*before, *lines]) for lines in dict.fromkeys(_indentations(piece))]
    programs = [code for code in programs if not _is_stub(code, name)]
    return _without_demonstration(max(programs, key=lambda code: code.count("\n")), name) if programs else ""


def _indentations(piece: str) -> Iterator[tuple[str, ...]]:
    """Yield a body's lines as they are; with the first one at the function's indentation; with all moved there.

    Each of these also comes from the first indented line on, without the words before it.
    """
    lines = piece.strip("\n").split("\n")
    indented = next((n for n, line in enumerate(lines) if line[:1] in (" ", "\t") and line.strip()), 0)
    for part in (lines, lines[indented:]):
        first, rest = "    " + part[0].lstrip(), part[1:]
        yield tuple(part)
        yield first, *rest
        yield tuple(_moved(part))
        yield first, *_moved(rest)


def _moved(lines: list[str]) -> list[str]:
    return textwrap.indent(textwrap.dedent("\n".join(lines)), "    ").split("\n")


def _wrong_line(code: str) -> int:
    """Return the number of the first line at fault, 0 for a program that compiles."""
    try:
        compile(ast.parse(code), "<text>", "exec", dont_inherit=True)
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, MemoryError, RecursionError, OverflowError):
        return 1
    return 0


def _compiling(lines: list[str]) -> str:
    """Return the lines, from the first on, that compile as a program; "" if none were tried that do."""
    for _ in range(_MAX_CUTS):
        wrong = _wrong_line("\n".join(lines))
        if not wrong:
            return "\n".join(lines)
        lines = lines[: min(len(lines), wrong) - 1]
    return ""


def _functions(code: str, name: str | None) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return the definitions of the function in a program."""
    functions = [node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [function for function in functions if name in (None, function.name)]


_DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _without_demonstration(code: str, name: str | None) -> str:
    """Return a program that compiles without what shows it at work: calls, prints, assertions beside the definitions.

    Statements about variables that a function uses stay.
    """
    last = max((node.end_lineno or 0 for node in _functions(code, name)), default=len(code))
    body, (used, bound) = ast.parse(code).body, _names(code)
    variables = (used & bound) - {getattr(node, "name", None) for node in body}
    kept: set[int] = set()
    for node in body:
        parts = list(ast.walk(node))
        calls = any(isinstance(part, ast.Call) for part in parts)
        shows = isinstance(node, ast.Expr | ast.Assert) or node.lineno > last and calls
        sets = not isinstance(node, ast.Assert) and any(getattr(part, "id", None) in variables for part in parts)
        if isinstance(node, _DEFINITIONS) or sets or not shows:
            first = min(part.lineno for part in (node, *getattr(node, "decorator_list", [])))
            kept.update(range(first, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(code.split("\n"), 1)
    return "\n".join(line for number, line in lines if number in kept or not line.strip()).strip("\n")


def _names(code: str) -> tuple[set[str], set[str]]:
    """Return the global names that a program's functions use, without Python's own, and those that it binds."""
    module = symtable.symtable(code, "<text>", "exec")
    bound = {symbol.get_name() for symbol in module.get_symbols() if symbol.is_local()}
    used = set(module.get_identifiers()) - bound
    tables = module.get_children()
    for table in tables:  # which grows
        tables += table.get_children()
        used |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return used - set(dir(builtins)), bound
