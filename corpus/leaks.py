"""Rows of a test that stand among other rows: word for word, nearly, or as the same wording with other numbers.

What is asked is compared, not the answers (`corpus.questions`). Overlap is the share of a test question's word n-grams
that the other row has, whatever the numbers in them and the order of the options. A test row is

- `exact`     where the other row asks the same but for case, punctuation, spacing and the order of the options;
- `near`      where the overlap reaches the limit, all of its numbers are there, and so is what tells it from others of
              its kind: its content words ("can you carry a gun in Ohio"; of 15 words one may be missing), or else two
              numbers or more, the other row having one beside them at most, or three quarters of its options;
- `template`  where the wording reaches the limit without that: other numbers, other options, another subject. Such rows
              are no leaks, and are counted apart.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from corpus.questions import Gram, Question

NGRAM = 3
OVERLAP = 0.6
KINDS = ("exact", "near", "template")  # the first that fits is a pair's

SHORT, SHORT_NGRAM = 12, 2  # a question of fewer words is cut into bigrams: one other word spoils up to n of them
HALF, MOST = 0.5, 0.75
LONG_OPTIONS = 10  # n-grams; such options tell a question from others by themselves
WORDS_PER_MISSING = 15


@dataclass(frozen=True)
class Pair:
    """A test row and the row that it is found in; both count from 0."""

    kind: str
    test: int
    train: int
    overlap: float

    @property
    def rank(self) -> tuple[int, float, int]:
        """Smaller is the better match."""
        return KINDS.index(self.kind), -self.overlap, self.train


def find_pairs(
    train: Sequence[Question],
    test: Sequence[Question],
    ngram: int = NGRAM,
    overlap: float = OVERLAP,
    *,
    earlier: bool = False,
) -> list[Pair]:
    """The best match of every test row that has one, in the tests' order.

    earlier: `train` is `test` itself, and a row is only compared with those before it.
    """
    grams = _Grams(train, test, ngram, overlap)
    best: dict[int, Pair] = {}
    for j in range(len(train)):
        for i in grams.candidates(j):
            pair = None if earlier and j >= i else _compare(i, j, test[i], train[j], grams, overlap)
            if pair and (i not in best or pair.rank < best[i].rank):
                best[i] = pair
    return [best[i] for i in sorted(best)]


class _Grams:
    """The n-grams of all questions and options, and which test questions share enough with a training question.

    To share a fraction f of its g n-grams, a question has to share one of any (1 - f) g + 1 of them. The rarest are
    looked for: most rows then have nothing to be compared with.
    """

    def __init__(self, train: Sequence[Question], test: Sequence[Question], ngram: int, overlap: float):
        sizes = [min(ngram, SHORT_NGRAM) if len(question.words) < SHORT else ngram for question in test]
        self.test = [question.grams(n) for question, n in zip(test, sizes, strict=True)]
        self.test_options = [question.option_grams(ngram) for question in test]
        known = {gram: gram for parts in (self.test, self.test_options) for grams in parts for gram in grams}

        def kept(grams: Iterable[Gram]) -> set[Gram]:
            return {known[gram] for gram in grams if gram in known}  # the tests' own objects: less memory

        lengths = set(sizes)
        self.train = [kept(gram for n in lengths for gram in question.grams(n)) for question in train]
        self.train_options = [kept(question.option_grams(ngram)) for question in train]
        count = Counter(gram for parts in (self.train, self.train_options) for grams in parts for gram in grams)
        self._rare: dict[Gram, list[int]] = defaultdict(list)
        for i, (asked, options) in enumerate(zip(self.test, self.test_options, strict=True)):
            rare = _rarest(asked, count, min(overlap, HALF))
            if len(options) >= LONG_OPTIONS:
                rare |= _rarest(options, count, MOST)
            for gram in rare:
                self._rare[gram].append(i)

    def candidates(self, j: int) -> set[int]:
        """The test questions to compare with the training question j."""
        return {
            i for grams in (self.train[j], self.train_options[j]) for gram in grams for i in self._rare.get(gram, ())
        }


def _rarest(grams: set[Gram], count: Counter[Gram], least: float) -> set[Gram]:
    ordered = sorted(grams, key=lambda gram: (count[gram], gram))
    return set(ordered[: int((1 - least) * len(grams)) + 1])


def _compare(i: int, j: int, test: Question, train: Question, grams: _Grams, limit: float) -> Pair | None:
    if test.key == train.key:
        return Pair("exact", i, j, 1.0)
    asked, options = len(grams.test[i]), len(grams.test_options[i])
    shared = len(grams.test[i] & grams.train[j])
    wording = overlap = shared / max(1, asked)
    shared_options = -1  # not to be compared
    if options and train.options:
        shared_options = len(grams.test_options[i] & grams.train_options[j])
        overlap = (shared + shared_options) / (asked + options)
    if overlap >= limit and train.has_amounts(test.amounts):
        if shared_options >= 0:
            told = shared_options >= MOST * options and (wording >= HALF or options >= LONG_OPTIONS)
            told = told or (min(wording, shared_options / options) >= HALF and _names(train, test))
        elif len(test.words) < SHORT and len(train.words) >= (2 if options or train.options else 3) * len(test.words):
            told = False  # a few words of a text that may well ask for something else
        else:
            numbers = test.amounts.total() >= 2 and len(train.numbers) <= len(test.numbers) + 1
            told = (numbers and len(test.words) >= SHORT) or _names(train, test)
        if told:
            return Pair("near", i, j, overlap)
    return Pair("template", i, j, wording) if wording >= limit else None


def _names(train: Question, test: Question) -> bool:
    """Whether the content words of the test question are in the other; a plural is the same word."""
    missing = {word.rstrip("s") for word in test.content} - {word.rstrip("s") for word in train.words}
    return len(missing) <= len(test.words) // WORDS_PER_MISSING
