"""Leaks between files: which rows of test files stand among the rows of another file, or of one another."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from corpus.leaks import KINDS, NGRAM, OVERLAP, Pair, find_pairs
from corpus.questions import Question, parse_question, question_text
from corpus.rows import read_rows

LEAKS = ("exact", "near")


@dataclass(frozen=True)
class Asked:
    """What the rows of a file ask, as written and to be compared."""

    file: Path
    texts: list[str]
    questions: list[Question]

    @property
    def name(self) -> str:
        """The file's name with its folder's, which is what tells gsm8k/test.json from AQuA/test.json."""
        return "/".join(self.file.parts[-2:])


@dataclass(frozen=True)
class Found:
    """Rows of `test` that stand in `other`; `pairs` count the rows of each from 0."""

    test: Asked
    other: Asked
    pairs: list[Pair]

    def count(self, *kinds: str) -> int:
        return sum(pair.kind in kinds for pair in self.pairs)

    def record(self) -> dict[str, Any]:
        """File, rows and counts, as JSON can hold them."""
        counts = {kind: self.count(kind) for kind in KINDS}
        return {"file": str(self.test.file), "in": str(self.other.file), "rows": len(self.test.texts)} | counts


def read_asked(file: Path) -> Asked:
    """ValueError names the file and the row (from 1) that asks nothing; OSError."""
    texts = []
    for number, row in enumerate(read_rows(file), 1):
        text = question_text(row)
        if text is None:
            raise ValueError(f"{file}: row {number}: field 'instruction' is missing or no text")
        texts.append(text)
    return Asked(file, texts, [parse_question(text) for text in texts])


def files_of(named: str) -> list[Path]:
    """The files that a comma-separated list of files and folders names: of a folder its test.json (or .jsonl) and those
    of its folders, or, where there are none, all its .json and .jsonl. ValueError names what is not there."""
    found: dict[Path, Path] = {}
    for word in filter(None, (word.strip() for word in named.split(","))):
        path = Path(word)
        if path.is_dir():
            files = [
                file for end in ("json", "jsonl") for place in ("", "*/") for file in path.glob(f"{place}test.{end}")
            ]
            files = files or [file for end in ("json", "jsonl") for file in path.glob(f"*.{end}")]
            if not files:
                raise ValueError(f"{path}: no test.json in this folder or in its folders, and no other file of rows")
        elif path.is_file():
            files = [path]
        else:
            raise ValueError(f"{path}: no such file or folder")
        found |= {file.resolve(): file for file in sorted(files) if file.resolve() not in found}
    if not found:
        raise ValueError(f"{named!r} names no test file")
    return list(found.values())


def compare(train: Asked, tests: Sequence[Asked], ngram: int = NGRAM, overlap: float = OVERLAP) -> list[Found]:
    """What of each test file stands in `train`."""
    places = [(test, row) for test in range(len(tests)) for row in range(len(tests[test].texts))]
    pairs: list[list[Pair]] = [[] for _ in tests]
    for pair in find_pairs(train.questions, [q for test in tests for q in test.questions], ngram, overlap):
        test, row = places[pair.test]
        pairs[test].append(Pair(pair.kind, row, pair.train, pair.overlap))
    return [Found(test, train, own) for test, own in zip(tests, pairs, strict=True)]


def compare_within(files: Sequence[Asked], ngram: int = NGRAM, overlap: float = OVERLAP) -> list[Found]:
    """What of each file stands earlier in it or in a file before it. A row counts once, by its best match."""
    places = [(file, row) for file in range(len(files)) for row in range(len(files[file].texts))]
    questions = [question for file in files for question in file.questions]
    pairs: dict[tuple[int, int], list[Pair]] = {}
    for pair in find_pairs(questions, questions, ngram, overlap, earlier=True):
        (test, row), (other, other_row) = places[pair.test], places[pair.train]
        pairs.setdefault((test, other), []).append(Pair(pair.kind, row, other_row, pair.overlap))
    return [Found(files[test], files[other], pairs[test, other]) for test, other in sorted(pairs)]


def summary(found: Sequence[Found]) -> str:
    """One line about training rows and tests."""
    leaking = [one for one in found if one.count(*LEAKS)]
    if not leaking:
        rows = sum(len(one.test.texts) for one in found)
        where = found[0].test.name if len(found) == 1 else f"{len(found)} files"
        return f"none of the {rows} rows of {where} is in the training rows"
    parts = [
        f"{one.count(*LEAKS)} of {len(one.test.texts)} rows of {one.test.name} are in the training rows "
        f"({one.count('exact')} exactly, {one.count('near')} nearly)"
        for one in leaking
    ]
    return "; ".join([*parts, "`python -m corpus leaks` shows them"])


def leaks_json(found: Sequence[Found], ngram: int, overlap: float) -> dict[str, Any]:
    """All of it, with both texts of every pair; rows count from 1."""

    def pair_json(one: Found, pair: Pair) -> dict[str, Any]:
        return {
            "kind": pair.kind,
            "overlap": round(pair.overlap, 4),
            "row": pair.test + 1,
            "in_row": pair.train + 1,
            "text": one.test.texts[pair.test],
            "in_text": one.other.texts[pair.train],
        }

    files = [one.record() | {"pairs": [pair_json(one, pair) for pair in one.pairs]} for one in found]
    return {"ngram": ngram, "overlap": overlap, "files": files}


def leaks_lines(found: Sequence[Found]) -> list[list[str]]:
    """A table: for each pair of files rows, exact, near, and apart the templates."""
    lines = [["rows of", "in", "rows", "exact", "near", "leaked", "template"]]
    for one in found:
        rows, exact, near = len(one.test.texts), one.count("exact"), one.count("near")
        share = f"{100 * (exact + near) / rows:.1f} %"
        lines.append([one.test.name, one.other.name, *map(str, (rows, exact, near)), share, str(one.count("template"))])
    return lines


def shown(one: Found, kinds: Sequence[str], most: int) -> str:
    """The first pairs of these kinds, best matches first, for people to look at."""
    chosen = sorted((pair for pair in one.pairs if pair.kind in kinds), key=lambda pair: (pair.rank[:2], pair.test))
    blocks = [
        f"{pair.kind} ({pair.overlap:.0%})\n"
        f"  {one.test.name} row {pair.test + 1}:\n{_indented(one.test.texts[pair.test])}\n"
        f"  {one.other.name} row {pair.train + 1}:\n{_indented(one.other.texts[pair.train])}"
        for pair in chosen[:most]
    ]
    return "\n\n".join(blocks)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() if line.strip())
