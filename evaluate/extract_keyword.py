"""Tasks that are answered with a keyword (true, answer2, option1): how answers are read, and the two metrics."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from evaluate.answer_statements import Statement, first_sentence, normalize, statements, truncate_run_on
from evaluate.metrics import Extraction, Metric
from evaluate.rows import shorten


@dataclass(frozen=True)
class Mention:
    """A keyword in a text, text[start:end]. negated: "not answer1", "answer1 is wrong"."""

    keyword: str
    negated: bool
    start: int
    end: int


# The next problem of a model that runs on without the template's headings: how the tasks' instructions begin.
_NEXT_PROBLEM = re.compile(r"\bPlease (?:choose the correct|answer the following question)")
_BEST = r"(?:correct|right|best|appropriate|likely|plausible|logical|sensible|reasonable|suitable)"
_OTHER_NOUN = re.compile(rf"\b({_BEST}) (?:solution|ending)(?=s?\b(?! ?\(?\d))", re.I)

_FILLER = r"(?:(?:the|a|an|be|is|really|actually|necessarily|entirely|always|correct|right|best|answer|option)\s+){0,3}"
_NEGATED_BEFORE = re.compile(
    r"(?:(?:\b(?:not|nor|neither|never|cannot|than|over|unlike|except|excludes?|eliminates?|eliminating|instead of|"
    rf"rules? out|ruled out|ruling out)|n['’]t)\s+{_FILLER}"
    r"|\b(?:wrong|incorrect) (?:answer|option|choice)\s*(?:is|:)\s*)[\"'“‘(]*$",
    re.I,
)
_NEGATED_AFTER = re.compile(
    r"[\"'”’)]*,?\s+(?:which |that )?(?:(?:is|was|would be|seems|looks|sounds)\s+(?:also |clearly |simply |just )?"
    r"(?:not|never|too|less|wrong|incorrect|false|impossible|unlikely|implausible|irrelevant|unrelated|illogical)\b"
    r"|(?:is|was|does|could|would)n['’]t\b|can['’]t\b|won['’]t\b|cannot\b|(?:does|can|could|would|will) not\b"
    r"|makes? (?:no|little) sense\b)",
    re.I,
)
_RIGHT_AFTER = re.compile(
    rf"[\"'”’)]*\s+(?:is|was|must be|seems|would be)\s+(?:the\s+)?(?:only |most )?(?:{_BEST}|answer)\b", re.I
)
# "I choose answer2"
_CHOSEN_BEFORE = re.compile(r"\b(?:choose|chose|pick|select|go with|going with|opt for)\s+(?:the )?[\"'“‘(]*$", re.I)
_LEADS = re.compile(r"[\"'”’)\]]*\s*(?:$|[.!;:\n)]|,|[-–—] | (?:because|since|as|it|they|there|you)\b)")
_AT_ONCE = re.compile(
    r"[\W_]*(?:(?:the|that|it|is|correct|right|best|most|likely|definitely|clearly|probably|option|choice|answer|number"
    r"|solution|ending)\b[\W_]*)*(?:(?P<word>yes|no)\b|(?P<number>[0-9]{1,2})(?=[)\]]?\s*(?:$|[.,;:!\n)](?!\d))))?",
    re.I,
)
_YES_NO = {"yes": "true", "no": "false"}


class Keywords:
    """The answers of a task: `word` and a number from 1 to `count`, or, without a word, true and false.

    published_count: how far the published metric counts, where that is further than the task's own answers.
    """

    def __init__(self, word: str = "", count: int = 2, published_count: int = 0) -> None:
        self.word = word
        self.all = tuple(f"{word}{number}" for number in range(1, count + 1)) if word else ("true", "false")
        self.published_keyword = re.compile(f"{word}[1-{max(count, published_count)}]" if word else "true|false")
        # "Answer 2", "answer (2)", "option #2" are answer2; "answer2answer2" is, too, but "answer 2.5 g" is not.
        nouns = "|".join(dict.fromkeys([word, "answer", "option", "choice"]))
        self.spelled = re.compile(
            rf"\b(?:{nouns})(?: ?(?:number|no\.))?(?:[ _#-]{{0,2}}[(\[]?([0-9]{{1,2}})[)\]]?(?![\w%]|[.,]\d))", re.I
        )
        keyword = rf"{word}[0-9]{{1,2}}" if word else r"\b(?:true|false)\b"
        self.keyword = re.compile(keyword, re.I)
        self.list_of = re.compile(rf"{keyword}(?:(?:,\s{{0,2}}|\s?/\s?|,?\s(?:or|and)\s){keyword})+", re.I)
        self.heading = re.compile(rf"({keyword})(?=\s?:)", re.I)
        self.option = re.compile(rf"\b{word.capitalize()}([0-9]):") if word else None

    def read_answer(self, value: Any) -> str:
        """Read a row's "answer": one of the keywords, as it is spelled."""
        if not isinstance(value, str) or value not in self.all:
            raise ValueError(f"one of {', '.join(self.all)}, got {shorten(value)}")
        return value

    def published(self, text: str, row: dict[str, Any]) -> Extraction | None:
        """Take the first keyword in lower case anywhere, even inside a word: comparable with the paper's tables."""
        match = self.published_keyword.search(text)
        return Extraction(match[0], (match[0],)) if match else None

    def robust(self, text: str, row: dict[str, Any]) -> Extraction | None:
        """Take the stated keyword, number or value; else the one called right; else the last that is not negated."""
        options, values = self._options(row.get("instruction", ""))
        keyword = self._read(text, options, values)
        return Extraction(keyword, (keyword,)) if keyword in options else None

    def _options(self, instruction: str) -> tuple[tuple[str, ...], dict[str, str]]:
        """Return the keywords that an answer may be, and what the instruction says behind each.

        The keywords are all of the task's where the instruction lists none. There are no values where the options are
        not numbered 1, 2, ... in order.
        """
        listed, mark, form = instruction.rpartition("Answer format:")
        parts = self.option.split(listed if mark else instruction) if self.option else []
        values = {f"{self.word}{number}": text for number, text in zip(parts[1::2], parts[2::2], strict=True)}
        if tuple(values) != self.all[: len(values)] or len(values) != len(parts) // 2:
            values = {}
        named = [keyword for keyword in self.all if mark and keyword in self.keyword.findall(form)]
        return tuple(named or values or self.all), values

    def _read(self, text: str, options: tuple[str, ...], values: dict[str, str]) -> str | None:
        """Return the keyword that a text gives as its answer; it may be none of the options ("answer9")."""
        text = self._spell_alike(text)
        stated = list(statements(text))
        for statement in stated:
            if keyword := self._stated(statement, options, values):
                return keyword
        mentions = list(self._mentions(text))
        for mention in mentions:
            chosen = _CHOSEN_BEFORE.search(text[max(0, mention.start - 40) : mention.start])
            if (chosen or _RIGHT_AFTER.match(text, mention.end)) and not mention.negated:
                return mention.keyword
        if keyword := self._leading(text, mentions):
            return keyword
        for statement in stated:
            if keyword := self._of_value(statement.tail, values):
                return keyword
        return self._not_negated(mentions, options, last=True) or self._of_value(text, values)

    def _spell_alike(self, text: str) -> str:
        """Return this problem's text, keywords spelled as the task does, without lists that only name them."""
        text = _OTHER_NOUN.sub(r"\1 answer", truncate_run_on(normalize(text), _NEXT_PROBLEM))
        if self.word:
            text = self.spelled.sub(rf"{self.word}\1", text)
        text = self.list_of.sub(self._without_list, text)
        if len({keyword.lower() for keyword in self.heading.findall(text)}) > 1:  # the options, copied
            text = self.heading.sub(" ", text)
        return text

    def _without_list(self, match: re.Match[str]) -> str:
        """Drop "answer1/answer2" and "true or false", which name no answer; keep "answer2 and answer1 is wrong"."""
        keywords = {keyword.lower() for keyword in self.keyword.findall(match[0])}
        only_commas = not re.search(r"/|\s(?:or|and)\s", match[0], re.I)
        of_the_last = re.match(r"\s(?:is|was|does|has|isn)\b", match.string[match.end() : match.end() + 6])
        if len(keywords) == 1 or only_commas or (of_the_last and not re.search(r"/|\sor\s", match[0], re.I)):
            return match[0]
        return " "

    def _mentions(self, text: str) -> Iterator[Mention]:
        for match in self.keyword.finditer(text):
            before = _NEGATED_BEFORE.search(text[max(0, match.start() - 80) : match.start()])
            after = _NEGATED_AFTER.match(text, match.end())
            yield Mention(match[0].lower(), bool(before or after), *match.span())

    def _not_negated(self, mentions: list[Mention], options: tuple[str, ...], last: bool = False) -> str | None:
        """Return the first or last keyword that is not negated; else, of the options, the only one not mentioned."""
        kept = [mention.keyword for mention in mentions if not mention.negated]
        if kept:
            return kept[-1 if last else 0]
        left = set(options) - {mention.keyword for mention in mentions}
        return left.pop() if mentions and len(left) == 1 else None

    def _stated(self, statement: Statement, options: tuple[str, ...], values: dict[str, str]) -> str | None:
        start = _AT_ONCE.match(statement.tail)
        assert start is not None  # everything in it is optional
        if start["number"] and self.word:
            return self._of_value(start["number"], values)
        if start["word"] and not self.word:
            return _YES_NO[start["word"].lower()]
        mentions = list(self._mentions(first_sentence(statement.tail)))
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
            return first.keyword
        return None

    def _of_value(self, text: str, values: dict[str, str]) -> str | None:
        """Return the one option whose words, or whose number, are those of the text or of its first sentence.

        "2" names none where another option reads 2.
        """
        if len(text) > 1000:
            return None
        stated = {_bare(text), _bare(first_sentence(text))} - {""}
        same = {keyword for keyword, value in values.items() if _bare(normalize(value)) in stated}
        if self.word:
            same |= {f"{self.word}{number}" for number in stated if re.fullmatch(r"[0-9]{1,2}", number)}
        return same.pop() if len(same) == 1 else None


def _bare(text: str) -> str:
    words = re.findall(r"\w+", text.casefold())
    return " ".join(words[1:] if words[:1] in (["the"], ["a"], ["an"]) and len(words) > 1 else words)


def keyword_metrics(word: str = "", count: int = 2, published_count: int = 0) -> tuple[Any, Metric, Metric]:
    """Return how a task's keywords are read from its rows, and the published and the robust metric."""
    keywords = Keywords(word, count, published_count)
    return keywords.read_answer, Metric(keywords.published), Metric(keywords.robust)
