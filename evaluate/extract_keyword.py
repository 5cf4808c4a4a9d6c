"""Tasks that are answered with a keyword (true, answer2, option1): how answers are read, and the two metrics."""

import re
from collections.abc import Iterator
from typing import Any

from evaluate.answer_statements import LEAD, Statement, answer_parts, first_sentence, statements
from evaluate.keyword_mentions import BEST, Mention, mentions_of
from evaluate.metrics import Extraction, Metric
from evaluate.normalize import normalize
from moa.reading import short_repr

# "The best ending is" states an answer.
_OTHER_NOUN = re.compile(rf"\b({BEST}) (?:solution|ending)(?=s?\b(?! ?\(?\d))", re.I)
_QUESTION = re.compile(r"[^.!?\n]{1,200}\?")  # "Is it true that dogs fly? No."
_OPEN_QUESTION = re.compile(
    r"\bwhether\b[^.!?,;\n]{0,80}"
    r"|(?:\bnot|n['’]t) (?:(?:sure|certain|clear) (?:if|that)|(?:know|tell|say) if)\b[^.!?,;\n]{0,80}",
    re.I,
)
# What may follow an answer that a text begins with: "True. It", "answer2 because".
_LEADS = re.compile(r"[\"'”’)\]]*\s*(?:$|[.!;:\n)]|,|[-–—] | (?:because|since|as|it|they|there|you)\b)")
# What an answer begins with: "The best option is", then perhaps "yes" or a bare number.
_AT_ONCE = re.compile(
    rf"{LEAD}(?:(?P<word>(?i:yes|no))\b|(?P<number>[0-9]{{1,2}})(?=[)\]}}\"']?\s*(?:$|[.,;:!\n)<}}](?!\d))))?"
)
_CLOSING = re.compile(r"\b(yes|no)\W{0,5}$", re.I)  # "..., so yes."
_YES_NO = {"yes": "true", "no": "false"}


class Keywords:
    """The answers of a task: `word` and a number from 1 to `count`, or, without a word, true and false.

    published_count: how far the published metric counts, where that is further than the task's own answers.
    """

    def __init__(self, word: str = "", count: int = 2, published_count: int = 0) -> None:
        self.word = word
        self.all = tuple(f"{word}{number}" for number in range(1, count + 1)) if word else ("true", "false")
        self.published_keyword = re.compile(f"{word}[1-{max(count, published_count)}]" if word else "true|false")
        # "Answer 2", "answer (2)", "option #2" are answer2, but "answer 2.5 g" is not.
        nouns = "|".join(dict.fromkeys([word, "answer", "option", "choice"]))
        self.spelled = re.compile(
            rf"\b(?:{nouns})(?: ?(?:number|no\.))?(?:[ _#-]{{0,2}}[(\[]?([0-9]{{1,2}})[)\]]?(?![\w%]|[.,]\d))", re.I
        )
        keyword = rf"{word}[0-9]{{1,2}}" if word else r"\b(?:true|false)\b"
        self.keyword = re.compile(keyword, re.I)
        both = r"(?:\s?/\s?|,?\s(?:or|and)\s)"
        self.list_of = re.compile(rf"{keyword}(?:(?:,\s{{0,2}}|{both}){keyword})*{both}{keyword}", re.I)
        self.heading = re.compile(rf"({keyword})(?=\s?:)", re.I)
        self.option = re.compile(rf"\b{word.capitalize()}([0-9]):") if word else None

    def read_answer(self, value: Any) -> str:
        """Read a row's "answer": one of the keywords, as it is spelled."""
        if not isinstance(value, str) or value not in self.all:
            raise ValueError(f"one of {', '.join(self.all)}, got {short_repr(value)}")
        return value

    def published(self, text: str, row: dict[str, Any]) -> Extraction | None:
        """Take the first keyword in lower case anywhere, even inside a word: comparable with the paper's tables."""
        match = self.published_keyword.search(text)
        return Extraction(match[0], (match[0],)) if match else None

    def robust(self, text: str, row: dict[str, Any]) -> Extraction | None:
        """Take the stated keyword, number or value; else the one called right; else the last that is not negated."""
        options = self._options(row.get("instruction", ""))
        readings = (
            keyword for part in answer_parts(text) for keyword in self._readings(self._spell_alike(part), options)
        )
        keyword = next(filter(None, readings), None)
        return Extraction(keyword, (keyword,)) if keyword in options else None  # it may be "answer9"

    def _options(self, instruction: str) -> dict[str, str]:
        """Return the keywords that an answer may be, each with what the instruction says behind it.

        They are all of the task's where the instruction lists none. Nothing stands behind them where the options are
        not numbered 1, 2, ... in order.
        """
        listed, mark, form = instruction.rpartition("Answer format:")
        parts = self.option.split(listed if mark else instruction) if self.option else []
        values = {
            f"{self.word}{number}": normalize(text) for number, text in zip(parts[1::2], parts[2::2], strict=True)
        }
        if tuple(values) != self.all[: len(values)] or len(values) != len(parts) // 2:
            values = {}
        named = [keyword for keyword in self.all if mark and keyword in self.keyword.findall(form)]
        return {keyword: values.get(keyword, "") for keyword in named or values or self.all}

    def _readings(self, text: str, options: dict[str, str]) -> Iterator[str | None]:
        """Yield what each way to read an answer makes of a text, the one to believe first."""
        stated = statements(text)
        mentions = list(mentions_of(self.keyword, text))
        yield from (self._stated(statement, options) for statement in stated)
        yield from (mention.answer for mention in mentions if mention.chosen)
        yield self._leading(text, mentions)
        yield from (self._of_value(statement.tail, options) for statement in stated)
        yield self._not_negated([mention for mention in reversed(mentions) if mention.answer in options], options)
        yield self._of_value(text, options)
        if not self.word and (closing := _CLOSING.search(text)):
            yield _YES_NO[closing[1].lower()]

    def _spell_alike(self, text: str) -> str:
        """Return a text with keywords spelled as the task does, without what only names them: lists, open questions."""
        text = _OTHER_NOUN.sub(r"\1 answer", normalize(text))
        if self.word:
            text = self.spelled.sub(rf"{self.word}\1", text)
        text = _OPEN_QUESTION.sub(" ", self.list_of.sub(self._without_list, text))
        if not self.word:
            text = _QUESTION.sub(" ", text)
        if len({keyword.lower() for keyword in self.heading.findall(text)}) > 1:  # the options, copied
            text = self.heading.sub(" ", text)
        return text

    def _without_list(self, match: re.Match[str]) -> str:
        """Drop "answer1/answer2" and "true or false", which name no answer; keep "answer2 and answer1 is wrong"."""
        keywords = {keyword.lower() for keyword in self.keyword.findall(match[0])}
        of_the_last = re.match(r"\s(?:is|was|does|has|isn)\b", match.string[match.end() : match.end() + 6])
        if len(keywords) == 1 or (of_the_last and not re.search(r"/|\sor\s", match[0], re.I)):
            return match[0]
        return " "

    def _not_negated(self, mentions: list[Mention], options: dict[str, str]) -> str | None:
        """Return the first keyword that is not negated; else, of the options, the only one not mentioned."""
        left = set(options) - {mention.answer for mention in mentions}
        remaining = left.pop() if mentions and len(left) == 1 else None
        return next((mention.answer for mention in mentions if not mention.negated), remaining)

    def _stated(self, statement: Statement, options: dict[str, str]) -> str | None:
        start = _AT_ONCE.match(statement.tail)
        assert start is not None  # everything in it is optional
        if start["number"] and self.word:
            return self._of_value(start["number"], options)
        if start["word"] and not self.word:
            return _YES_NO[start["word"].lower()]
        mentions = list(mentions_of(self.keyword, first_sentence(statement.tail)))
        if statement.label:
            mentions = [mention for mention in mentions[:1] if mention.start == start.end()]
        return self._not_negated(mentions, options)

    def _leading(self, text: str, mentions: list[Mention]) -> str | None:
        """Return the keyword, or for true and false a yes or no, that a text begins with as its answer: "True. It"."""
        start = _AT_ONCE.match(text)
        assert start is not None
        if start["word"] and not self.word and _LEADS.match(text, start.end()):
            return _YES_NO[start["word"].lower()]
        first = mentions[0] if mentions else None
        if first and first.start == start.end() and not first.negated and _LEADS.match(text, first.end):
            return first.answer
        return None

    def _of_value(self, text: str, options: dict[str, str]) -> str | None:
        """Return the one option whose words, or whose number, are those of the text or of its first sentence.

        "2" names none where another option reads 2.
        """
        if len(text) > 1000:
            return None
        stated = {_bare(text), _bare(first_sentence(text))} - {""}
        same = set()
        for keyword, value in options.items():
            numbered = f"{keyword.removeprefix(self.word)} {value}"  # "2) Maria"
            if stated & {_bare(value), _bare(numbered)}:
                same.add(keyword)
        if self.word:
            same |= {f"{self.word}{number}" for number in stated if re.fullmatch(r"[0-9]{1,2}", number)}
        return same.pop() if len(same) == 1 else None


def _bare(text: str) -> str:
    words = re.findall(r"\w+", text.casefold())
    return " ".join(words[1:] if words[:1] in (["the"], ["a"], ["an"], ["to"]) and len(words) > 1 else words)


def keyword_metrics(word: str = "", count: int = 2, published_count: int = 0) -> tuple[Any, Metric, Metric]:
    """Return how a task's keywords are read from its rows, and the published and the robust metric."""
    keywords = Keywords(word, count, published_count)
    return keywords.read_answer, Metric(keywords.published), Metric(keywords.robust)
