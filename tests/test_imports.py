"""Imports run one way: what each package may import, from the project, from libraries, and only inside functions."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENTRY_SCRIPTS = ("finetune", "generate", "extract_adapter", "lm_eval_harness")


class Allowed(NamedTuple):
    """Top-level names: `ours` and `libraries` anywhere, `late` only inside functions (optional or slow to load)."""

    ours: frozenset[str] = frozenset()
    libraries: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()


def allowed(ours: str = "", libraries: str = "", late: str = "") -> Allowed:
    return Allowed(frozenset(ours.split()), frozenset(libraries.split()), frozenset(late.split()))


# The standard library and the package itself are allowed everywhere.
RULES = {
    "cli": allowed(libraries="fire"),
    "moa": allowed(libraries="torch fairscale filelock"),
    "llama": allowed("moa", libraries="torch numpy fairscale tiktoken regex tqdm", late="flash_attn bitsandbytes"),
    "corpus": allowed("moa cli", libraries="tabulate", late="pooch requests"),
    "training": allowed("llama moa cli corpus evaluate", libraries="torch numpy fairscale tqdm tensorboard"),
    "convert": allowed("llama moa cli", libraries="torch numpy tqdm gguf safetensors"),
    "demo": allowed("convert llama moa cli", libraries="filelock torch numpy tqdm"),
    "evaluate": allowed("moa cli", libraries="tabulate"),
    "inspection": allowed(
        "training llama moa cli evaluate", libraries="torch numpy fairscale", late="matplotlib jinja2"
    ),
    "benchmarks": allowed(
        "training llama moa cli convert demo", libraries="torch numpy tabulate", late="transformers peft"
    ),
}


def imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(top-level name, line, inside a function) of each import in a file; relative ones are the package's own."""

    def visit(node: ast.AST, late: bool) -> Iterator[tuple[str, int, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], node.lineno, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0], node.lineno, late
        for child in ast.iter_child_nodes(node):
            yield from visit(child, late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    return visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), late=False)


@pytest.mark.parametrize("package", RULES)
def test_a_package_imports_only_what_it_may(package: str) -> None:
    files = [path for path in [ROOT / f"{package}.py", *sorted((ROOT / package).rglob("*.py"))] if path.is_file()]
    assert files, f"no Python file in {package}/"
    rule = RULES[package]
    anywhere = sys.stdlib_module_names | {package} | rule.ours | rule.libraries
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for name, line, late in imports(path)
        if name not in anywhere and not (late and name in rule.late)
    ]
    assert not wrong, "\n".join(wrong)


def test_nobody_imports_an_entry_script() -> None:
    # The packages cannot by their own rules; this is about the scripts among themselves.
    for script in ENTRY_SCRIPTS:
        names = {name for name, _, _ in imports(ROOT / f"{script}.py")}
        assert not names & set(ENTRY_SCRIPTS), f"{script}.py imports an entry script"


@pytest.mark.parametrize("module", ["cli", "moa.config", "convert.__main__", "evaluate.__main__"])
def test_flags_and_configuration_load_without_torch(module: str) -> None:
    # A bad flag is refused at once, and torch alone takes seconds to load.
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_no_module_of_evaluate_hides_one_of_the_standard_library() -> None:
    names = {path.stem for path in (ROOT / "evaluate").rglob("*.py")}
    assert names and not names & sys.stdlib_module_names
