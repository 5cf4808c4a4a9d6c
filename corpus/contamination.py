"""Contamination: test questions that stand among training rows, word for word or nearly.

Questions are compared, not answers. A test question is

- `exact`  where another row asks the same but for case, punctuation, spacing and the order of the options;
- `near`   where another row holds at least the share OVERLAP of its runs of words, whatever the numbers in them, and
           all of its numbers and its subject: its content words, or two numbers.

The same wording about other numbers or another subject is therefore neither.
"""

import re
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moa.reading import read_rows

NGRAM, OVERLAP = 3, 0.6
KINDS = ("exact", "near")
SHORT = 12  # words; a shorter question is compared by bigrams, since one other word spoils as many n-grams as n
# Words of a question for each content word that the other row may lack; where there are options, one may be another
WORDS_PER_MISSING, WITH_OPTIONS = 15, 6

# How the tasks' instructions begin and end, and what stands before an option: no part of a question.
LEAD = re.compile(r"^\s*Please (?:choose the correct|answer the following question)[^:\n]*:", re.I)
ANSWER_FORMAT = re.compile(r"\s*Answer format:[\s\w/]*$", re.I)
NUMBERED = re.compile(r"(?:^|\s)(?:Answer|Solution|Ending|Option)\s?[1-9]\s?:", re.I)
LETTERED = re.compile(r"\b(?:Answer Choices|Options)\s?:(?=\s*\(?[A-E]\))", re.I)
LETTER = re.compile(r"(?:^|\s)\(?[A-E]\)")
# Numbers, words and the signs of arithmetic; a minus stands before a number and not inside a word.
TOKEN = re.compile(
    r"(?:\d{1,3}(?:,\d{3})+(?![\d,])|\d+)(?:\.\d+)?|\.\d+|[^\W\d_]+|[+*/=<>^×÷√]|(?<![^\W\d_])[-−](?=\s?\d)"
)
NUMBER_WORDS = {
    w: str(n) for n, w in enumerate("two three four five six seven eight nine ten eleven twelve".split(), 2)
}
ONE = "one"  # a number in "one apple" and none in "each one": another row may lack it
STOP_WORDS = frozenset(
    "a an the this that these those some any of in on at to for from by with into as and or if than then so also "
    "is are was were be been being am do does did done has have had having can could will would shall should may "
    "might must it its he his him she her they their them you your we our i my me there here what which who whom "
    "whose s t #".split()
)

Gram = tuple[str, ...]


class Question(NamedTuple):
    """words: what is asked, with `#` for each number, and behind it the answers to choose from, sorted.

    numbers: those of what is asked, in order.
    """

    words: Gram
    numbers: Gram
    has_options: bool

    @property
    def content(self) -> set[str]:
        """The words that say what it is about; a plural is the same word."""
        return {word.rstrip("s") for word in self.words if word not in STOP_WORDS}

    def grams(self, *sizes: int) -> set[Gram]:
        """The runs of so many words; all words as one run where there are fewer."""
        runs = [zip(*(self.words[i:] for i in range(n)), strict=False) for n in sizes if len(self.words) > n]
        return set().union(*runs) if runs else {self.words} - {()}


def question_text(row: Mapping[str, Any]) -> str | None:
    """What a row asks: its instruction and input, or the field that GSM8K, HumanEval and MBPP have for it.

    That field comes first in a row with a task's id, whose instruction says more than the question.
    """
    texts = [f"{row['instruction']}\n{row.get('input') or ''}"] if isinstance(row.get("instruction"), str) else []
    fields = [row[name] for name in ("question", "prompt", "text") if isinstance(row.get(name), str)]
    texts = fields + texts if "task_id" in row else texts + fields
    return texts[0].strip() if texts else None


def parse_question(text: str) -> Question:
    text, options = ANSWER_FORMAT.sub("", LEAD.sub("", text, count=1)), []
    lettered = LETTERED.search(text)
    if lettered:
        text, options = text[: lettered.start()], LETTER.split(text[lettered.end() :])[1:]
    else:
        text, *options = NUMBERED.split(text)
    tokens, of_options = _tokens(text), [token for option in sorted(map(_tokens, options)) for token in option]
    words = ["#" if token[0] in ".0123456789" or token == ONE else token for token in tokens]
    numbers = tuple(token for token, word in zip(tokens, words, strict=True) if word == "#")
    return Question((*words, *of_options), numbers, bool(options))


def _tokens(text: str) -> Gram:
    """Words in lower case, and numbers in one spelling each: 1,450 is 1450, 5.0 is 5, 0.5 is .5, two is 2."""
    tokens = []
    for token in TOKEN.findall(unicodedata.normalize("NFKC", text).casefold()):
        if token[0] in ".0123456789":
            whole, point, fraction = token.replace(",", "").partition(".")
            token = (whole.lstrip("0") + (point + fraction).rstrip("0").rstrip(".")) or "0"
        tokens.append(NUMBER_WORDS.get(token, token))
    return tuple(tokens)


class Match(NamedTuple):
    """A test row and the best of the other rows that match it, both counted from 0."""

    kind: str
    overlap: float
    test: int
    other: int

    @property
    def rank(self) -> tuple[bool, float, int]:
        """Smaller is better."""
        return self.kind != "exact", -self.overlap, self.other


def find_matches(test: Sequence[Question], other: Sequence[Question]) -> list[Match]:
    """The best match of every test question that has one, in the tests' order."""
    test_grams = [question.grams(2 if len(question.words) < SHORT else NGRAM) for question in test]
    other_grams = [question.grams(2, NGRAM) for question in other]
    counts = Counter(gram for grams in other_grams for gram in grams)
    # Who shares a fraction f of g n-grams shares one of any (1 - f) g + 1 of them: the rarest lead to the candidates.
    index: dict[Gram, list[int]] = defaultdict(list)
    for i, grams in enumerate(test_grams):
        for gram in sorted(grams, key=lambda gram: (counts[gram], gram))[: int((1 - OVERLAP) * len(grams)) + 1]:
            index[gram].append(i)
    best: dict[int, Match] = {}
    for j, grams in enumerate(other_grams):
        for i in {i for gram in grams for i in index.get(gram, ())}:
            overlap = len(test_grams[i] & grams) / len(test_grams[i])
            match = Match("exact" if test[i] == other[j] else "near", overlap, i, j)
            if match.kind == "exact" or (overlap >= OVERLAP and _is_near(test[i], other[j])):
                best[i] = min(match, best.get(i, match), key=lambda match: match.rank)
    return [best[i] for i in sorted(best)]


def _is_near(test: Question, other: Question) -> bool:
    """Whether a question with much of the same wording asks for the same."""
    numbers = Counter(number for number in test.numbers if number != ONE)
    if numbers - Counter("1" if number == ONE else number for number in other.numbers):
        return False
    missing = test.content - {word.rstrip("s") for word in other.words}
    same = len(missing) <= len(test.words) // (WITH_OPTIONS if test.has_options else WORDS_PER_MISSING)
    if len(test.words) < SHORT:  # a few words of a longer text, which may well ask for something else, do not count
        return same and len(other.words) < 3 * len(test.words)
    return same or (numbers.total() >= 2 and len(other.numbers) <= len(test.numbers) + 1)


class QuestionSet(NamedTuple):
    """What the rows of a file ask: as written, and to be compared."""

    file: Path
    texts: list[str]
    questions: list[Question]

    @property
    def name(self) -> str:
        """The file's name with its folder's, which tells gsm8k/test.json from AQuA/test.json."""
        return "/".join(self.file.parts[-2:])


class Contamination(NamedTuple):
    """The rows of `test` that match a training row."""

    test: QuestionSet
    train: QuestionSet
    matches: list[Match]

    def record(self) -> dict[str, Any]:
        """File, rows and counts, as JSON can hold them."""
        kinds = [match.kind for match in self.matches]
        record = {"file": str(self.test.file), "in": str(self.train.file), "rows": len(self.test.texts)}
        return record | {kind: kinds.count(kind) for kind in KINDS}

    def pairs(self) -> list[dict[str, Any]]:
        """Both texts of every match, as JSON can hold them, best first; rows count from 1."""
        return [
            {"kind": kind, "overlap": round(overlap, 4), "row": row + 1, "in_row": train_row + 1}
            | {"text": self.test.texts[row], "in_text": self.train.texts[train_row]}
            for kind, overlap, row, train_row in sorted(self.matches, key=lambda match: match.rank[:2])
        ]


def read_questions(file: Path) -> QuestionSet:
    """ValueError names the file and the row (from 1) that asks nothing; OSError."""
    texts = [question_text(row) for row in read_rows(file)]
    if None in texts:
        raise ValueError(f"{file}: row {texts.index(None) + 1}: field 'instruction' is missing or not text")
    return QuestionSet(file, texts, list(map(parse_question, texts)))


def list_test_files(listed: str) -> list[Path]:
    """The files of a comma-separated list of files and folders; a folder stands for its test.json (or .jsonl) and those
    of its folders. ValueError names what is not there."""
    files: dict[Path, Path] = {}
    for path in [Path(word.strip()) for word in listed.split(",") if word.strip()]:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        inside = sorted([*path.glob("test.json*"), *path.glob("*/test.json*")]) if path.is_dir() else [path]
        if not inside:
            raise ValueError(f"{path}: no test.json in this folder or in its folders")
        files |= {file.resolve(): file for file in inside if file.resolve() not in files}
    if not files:
        raise ValueError(f"{listed!r} names no test file")
    return list(files.values())


def compare(listed: str, data_path: str | Path) -> list[Contamination]:
    """What of each listed test file stands among the training rows; a test row counts once, by its best match.

    ValueError or OSError names the file that is not right.
    """
    tests, train = list(map(read_questions, list_test_files(listed))), read_questions(Path(data_path))
    matches = find_matches([question for test in tests for question in test.questions], train.questions)
    compared, begin = [], 0
    for test in tests:
        end = begin + len(test.texts)
        own = [match._replace(test=match.test - begin) for match in matches if begin <= match.test < end]
        compared.append(Contamination(test, train, own))
        begin = end
    return compared


def check_contamination(data_path: str | Path, tests: str) -> dict[str, Any]:
    """Print one line on stderr about the rows of test files (and folders, with commas) among the training rows.

    Returns what a run's record holds of it. ValueError or OSError names the file that is not right.
    """
    compared = compare(tests, data_path)
    print(f"contamination check: {summary(compared)}", file=sys.stderr, flush=True)
    return {"ngram": NGRAM, "overlap": OVERLAP, "tests": [result.record() for result in compared]}


def summary(compared: Sequence[Contamination]) -> str:
    """One sentence about the test rows among the training rows."""
    parts = []
    for test, _, matches in compared:
        exact = sum(match.kind == "exact" for match in matches)
        if matches:
            kinds = f"{exact} exactly, {len(matches) - exact} nearly"
            parts.append(f"{len(matches)} of {len(test.texts)} rows of {test.name} are in the training rows ({kinds})")
    if parts:
        return "; ".join([*parts, "`python -m corpus contamination` shows them"])
    rows = sum(len(test.texts) for test, *_ in compared)
    files = compared[0].test.name if len(compared) == 1 else f"{len(compared)} files"
    return f"none of the {rows} rows of {files} is in the training rows"
