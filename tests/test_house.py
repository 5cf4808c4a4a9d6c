"""The rules of the house that a machine can check, over every file of the repository that git does not ignore."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("benchmarks", "convert", "corpus", "demo", "evaluate", "inspection", "llama", "moa", "training")
ENTRY_SCRIPTS = ("finetune.py", "generate.py", "extract_adapter.py", "lm_eval_harness.py", "cli.py")
MOST_LINES = 400
UNCLEAR_NAMES = {"found", "one", "told", "place", "asked", "said", "those"}
PROSE = {".py", ".md", ".sh", ".toml", ".txt", ".yaml", ".yml", ""}  # not data, whose texts are not ours

# Each pattern has a letter in brackets, so that this file does not find itself.
PATHS = [r"(?<![\w.])/([w]ork|[r]oot|[h]ome/\w+)/", r"/tmp/[w]\b", r"\.\./[s]hared\b"]
HOSTS = [r"[p]ypi\.org", r"[p]ythonhosted", r"[n]pmjs\.", r"[d]ownload\.pytorch", r"[d]eb\.debian"]
# The project speaks of the project alone, not of how or where its text came to be.
WORDS = [r"\b[i]ssues? #?\d", r"\(#\d+\)", r"\b[w]orkplace\b", r"\b[a]gents?\b"]
WORDS += [r"(?<!tests/)(?<!\"tests\" / \")\b[h]elpers?\b(?!:)"]  # not the folder tests/helpers
WORDS += [r"(?<!scope=\")\b[s]essions?\b"]


def repository_files() -> list[Path]:
    """Tracked files, and new ones that git does not ignore. Fails outside a clone: there is nothing to go by."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    files = [ROOT / name for name in sorted(set(listed.split("\0"))) if name and (ROOT / name).is_file()]
    assert Path(__file__).resolve() in files
    return files


def own_python_files() -> list[Path]:
    """The packages' files and the entry scripts, without the tests."""
    tops = {*PACKAGES, *ENTRY_SCRIPTS}
    files = [path for path in repository_files() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in tops]
    assert {path.relative_to(ROOT).parts[0] for path in files} == tops, "a package or an entry script is missing"
    return files


def findings(path: Path) -> list[str]:
    """`file:line: match` for each forbidden string in a text file; binary files (with a zero byte) have none."""
    data = path.read_bytes()
    if b"\0" in data:
        return []
    words = WORDS if path.suffix in PROSE and path.name != "LICENSE" else []
    pattern = re.compile("|".join([*PATHS, *HOSTS, *words]), re.IGNORECASE)
    lines = enumerate(data.decode("utf-8", errors="replace").splitlines(), start=1)
    return [f"{path}:{number}: {match.group()}" for number, line in lines for match in pattern.finditer(line)]


def bound_names(path: Path) -> Iterator[tuple[str, int]]:
    """(name, line) of each variable and parameter that a Python file binds."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs) and node.name:
            yield node.name, node.lineno


def test_no_machine_paths_hosts_or_words_from_elsewhere() -> None:
    matches = [finding for path in repository_files() for finding in findings(path)]
    assert not matches, "\n".join(matches)


def test_the_search_finds_what_it_is_for(tmp_path: Path) -> None:
    note, rows = tmp_path / "note.md", tmp_path / "rows.json"
    for text in ("see /_work/main", "in /_root/x", "from py_pi.org", "Issue_ 12", "fix (_#7)", "two a_gents"):
        note.write_text(f"fine\n{text.replace('_', '')}\n", encoding="utf-8")
        assert len(findings(note)) == 1, text
    note.write_text('@pytest.fixture(scope="session")\nwork/root, /workshop/, reagents', encoding="utf-8")
    rows.write_text("two a_gents".replace("_", ""), encoding="utf-8")
    assert findings(note) == findings(rows) == []


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in own_python_files()}
    long = [f"{path}: {lines} lines" for path, lines in lengths.items() if lines > MOST_LINES]
    assert not long, "\n".join(long)


def test_a_variable_bears_the_name_of_what_it_holds() -> None:
    files = [path for path in repository_files() if path.suffix == ".py"]
    unclear = [f"{path}:{line}: {name}" for path in files for name, line in bound_names(path) if name in UNCLEAR_NAMES]
    assert not unclear, "\n".join(unclear)


def test_modules_say_what_they_are() -> None:
    silent = [path for path in own_python_files() if not ast.get_docstring(ast.parse(path.read_bytes()))]
    assert not silent, f"no module docstring: {silent}"
