"""Suites answered with a keyword (true, answer2, option1): how their answers are read, and the two rules."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from evaluate.final import Statement, plain, statements
from evaluate.rows import shorten
from evaluate.suite import Found, Rule


@dataclass(frozen=True)
class Named:
    """A keyword in a text; rejected: "not answer1", "answer1 is wrong"; start and end: its place."""

    keyword: str
    rejected: bool
    start: int
    end: int


@dataclass(frozen=True)
class Keywords:
    """The answers of a suite: `word` and a number from 1 to `count`, or, without a word, true and false.
    published_count: how far the published rule counts, where that is further than the suite's own answers."""

    word: str = ""
    count: int = 2
    published_count: int = 0

    @cached_property
    def all(self) -> tuple[str, ...]:
        return tuple(f"{self.word}{number}" for number in range(1, self.count + 1)) if self.word else ("true", "false")

    def read_answer(self, value: Any) -> str:
        """A row's "answer": one of the keywords, as it is spelled."""
        if not isinstance(value, str) or value not in self.all:
            raise ValueError(f"one of {', '.join(self.all)}, got {shorten(value)}")
        return value

    @cached_property
    def published(self) -> Rule:
        """The first keyword in lower case anywhere, even inside a word: comparable with the paper's tables."""
        last = max(self.count, self.published_count)
        pattern = re.compile(f"{self.word}[1-{last}]" if self.word else "true|false")

        def extract(text: str, row: dict[str, Any]) -> Found | None:
            match = pattern.search(text)
            return _found(match[0]) if match else None

        return Rule(extract, _same)

    @cached_property
    def robust(self) -> Rule:
        """The stated keyword, number or value; else the one called right; else the last that is not rejected."""
        reader = _Reader(self)

        def extract(text: str, row: dict[str, Any]) -> Found | None:
            options, values = reader.options(row.get("instruction", ""))
            keyword = reader.read(text, options, values)
            return _found(keyword) if keyword in options else None

        return Rule(extract, _same)


def _found(keyword: str) -> Found:
    return Found(keyword, (keyword,))


def _same(found: Found, answer: str) -> bool:
    return answer in found.readings


# The next problem of a model that runs on without the template's headings: how the suites' instructions begin.
_NEXT_PROBLEM = re.compile(r"\bPlease (?:choose the correct|answer the following question)")
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$|[A-Z])")
_BEST = r"(?:correct|right|best|appropriate|likely|plausible|logical|sensible|reasonable|suitable)"
_OTHER_NOUN = re.compile(rf"\b({_BEST}) (?:solution|ending)(?=s?\b(?! ?\(?\d))", re.I)

_FILLER = r"(?:(?:the|a|an|be|is|really|actually|necessarily|entirely|always|correct|right|best|answer|option)\s+){0,3}"
_REJECTED_BEFORE = re.compile(
    r"(?:(?:\b(?:not|nor|neither|never|cannot|than|over|unlike|except|excludes?|eliminates?|eliminating|instead of|"
    rf"rules? out|ruled out|ruling out)|n['’]t)\s+{_FILLER}"
    r"|\b(?:wrong|incorrect) (?:answer|option|choice)\s*(?:is|:)\s*)[\"'“‘(]*$",
    re.I,
)
_REJECTED_AFTER = re.compile(
    r"[\"'”’)]*,?\s+(?:which |that )?(?:(?:is|was|would be|seems|looks|sounds)\s+(?:also |clearly |simply |just )?"
    r"(?:not|never|too|less|wrong|incorrect|false|impossible|unlikely|implausible|irrelevant|unrelated|illogical)\b"
    r"|(?:is|was|does|could|would)n['’]t\b|can['’]t\b|won['’]t\b|cannot\b|(?:does|can|could|would|will) not\b"
    r"|makes? (?:no|little) sense\b)",
    re.I,
)
_RIGHT_AFTER = rf"[\"'”’)]*\s+(?:is|was|must be|seems|would be)\s+(?:the\s+)?(?:only |most )?(?:{_BEST}|answer)\b"
_CHOSEN_BEFORE = re.compile(
    r"\b(?:choose|chose|pick|select|go with|going with|opt for)\s+(?:the )?[\"'“‘(]*$", re.I
)  # "I choose answer2"
_LEADS = re.compile(r"[\"'”’)\]]*\s*(?:$|[.!;:\n)]|,|[-–—] | (?:because|since|as|it|they|there|you)\b)")
_AT_ONCE = re.compile(
    r"[\W_]*(?:(?:the|that|it|is|correct|right|best|most|likely|definitely|clearly|probably|option|choice|answer|number"
    r"|solution|ending)\b[\W_]*)*(?:(?P<word>yes|no)\b|(?P<number>[0-9]{1,2})(?=[)\]]?\s*(?:$|[.,;:!\n)](?!\d))))?",
    re.I,
)


class _Reader:
    """The robust rule of one suite's keywords."""

    def __init__(self, keywords: Keywords) -> None:
        word = keywords.word
        self.keywords = keywords
        # "Answer 2", "answer (2)", "option #2" are answer2; "answer2answer2" is, too, but "answer 2.5 g" is not.
        nouns = "|".join(dict.fromkeys([word, "answer", "option", "choice"]))
        self.spelled = re.compile(
            rf"\b(?:{nouns})(?: ?(?:number|no\.))?(?:[ _#-]{{0,2}}[(\[]?([0-9]{{1,2}})[)\]]?(?![\w%]|[.,]\d))", re.I
        )
        key = rf"{word}[0-9]{{1,2}}" if word else r"\b(?:true|false)\b"
        self.key = re.compile(key, re.I)
        self.list_of = re.compile(rf"{key}(?:(?:,\s{{0,2}}|\s?/\s?|,?\s(?:or|and)\s){key})+", re.I)
        self.heading = re.compile(rf"({key})(?=\s?:)", re.I)
        self.called_right = re.compile(_RIGHT_AFTER, re.I)
        self.mark = re.compile(rf"\b{word.capitalize()}([0-9]):") if word else None

    def options(self, instruction: str) -> tuple[tuple[str, ...], dict[str, str]]:
        """(the keywords an answer may be, what the instruction says behind each). All the suite's where none are
        listed; no values where they are not numbered 1, 2, ... in order."""
        listed, found, form = instruction.rpartition("Answer format:")
        parts = self.mark.split(listed if found else instruction) if self.mark else []
        values = {f"{self.keywords.word}{number}": text for number, text in zip(parts[1::2], parts[2::2], strict=True)}
        if tuple(values) != self.keywords.all[: len(values)] or len(values) != len(parts) // 2:
            values = {}
        named = [keyword for keyword in self.keywords.all if found and keyword in self.key.findall(form)]
        return tuple(named or values or self.keywords.all), values

    def read(self, text: str, options: tuple[str, ...], values: dict[str, str]) -> str | None:
        """The keyword that a text gives as its answer; it may be none of the options ("answer9")."""
        text = self._one_spelling(text)
        stated = list(statements(text))
        for statement in stated:
            if keyword := self._stated(statement, options, values):
                return keyword
        named = list(self._named(text))
        for one in named:
            chosen = _CHOSEN_BEFORE.search(text[max(0, one.start - 40) : one.start])
            if (chosen or self.called_right.match(text, one.end)) and not one.rejected:
                return one.keyword
        if keyword := self._leading(text, named):
            return keyword
        for statement in stated:
            if keyword := self._of_value(statement.tail, values):
                return keyword
        return self._left(named, options, last=True) or self._of_value(text, values)

    def _one_spelling(self, text: str) -> str:
        """The text of this problem alone, each keyword as the suite spells it, without lists that only name them."""
        text = plain(text)
        for match in _NEXT_PROBLEM.finditer(text):
            if text[: match.start()].strip():
                text = text[: match.start()]
                break
        text = _OTHER_NOUN.sub(r"\1 answer", text)
        if self.keywords.word:
            text = self.spelled.sub(rf"{self.keywords.word}\1", text)
        text = self.list_of.sub(self._without_list, text)
        if len({keyword.lower() for keyword in self.heading.findall(text)}) > 1:  # the options, copied
            text = self.heading.sub(" ", text)
        return text

    def _without_list(self, match: re.Match[str]) -> str:
        """ "answer1/answer2" and "true or false" name no answer; "answer2 and answer1 is wrong" does."""
        keywords = {keyword.lower() for keyword in self.key.findall(match[0])}
        only_commas = not re.search(r"/|\s(?:or|and)\s", match[0], re.I)
        of_the_last = re.match(r"\s(?:is|was|does|has|isn)\b", match.string[match.end() : match.end() + 6])
        if len(keywords) == 1 or only_commas or (of_the_last and not re.search(r"/|\sor\s", match[0], re.I)):
            return match[0]
        return " "

    def _named(self, text: str) -> Iterator[Named]:
        for match in self.key.finditer(text):
            before = _REJECTED_BEFORE.search(text[max(0, match.start() - 80) : match.start()])
            after = _REJECTED_AFTER.match(text, match.end())
            yield Named(match[0].lower(), bool(before or after), *match.span())

    def _left(self, named: list[Named], options: tuple[str, ...], last: bool) -> str | None:
        """The first or last keyword that is not rejected; else the only option that is not."""
        kept = [one.keyword for one in named if not one.rejected]
        if kept:
            return kept[-1 if last else 0]
        left = [keyword for keyword in options if keyword not in {one.keyword for one in named}]
        return left[0] if named and len(left) == 1 else None

    def _stated(self, statement: Statement, options: tuple[str, ...], values: dict[str, str]) -> str | None:
        start = _AT_ONCE.match(statement.tail)
        assert start is not None  # everything in it is optional
        if start["number"] and self.keywords.word:
            return self._of_value(start["number"], values)
        if start["word"] and not self.keywords.word:
            return _TRUTH[start["word"].lower()]
        sentence = _SENTENCE_END.split(statement.tail, maxsplit=1)[0]
        named = list(self._named(sentence))
        if statement.label:
            named = [one for one in named[:1] if one.start == start.end()]
        return self._left(named, options, last=False)

    def _leading(self, text: str, named: list[Named]) -> str | None:
        """The keyword, or for true and false a yes or no, that a text begins with as its answer: "True. It ..."."""
        start = _AT_ONCE.match(text)
        assert start is not None
        if start["word"] and not self.keywords.word and _LEADS.match(text, start.end()):
            return _TRUTH[start["word"].lower()]
        if named and named[0].start == start.end() and not named[0].rejected and _LEADS.match(text, named[0].end):
            return named[0].keyword
        return None

    def _of_value(self, text: str, values: dict[str, str]) -> str | None:
        """The one option whose words, or whose number, are those of the text or of its first sentence. "2" is none
        where another option reads 2."""
        if len(text) > 1000:
            return None
        said = {_bare(text), _bare(_SENTENCE_END.split(text, maxsplit=1)[0])} - {""}
        same = {keyword for keyword, value in values.items() if _bare(plain(value)) in said}
        if self.keywords.word:
            same |= {f"{self.keywords.word}{number}" for number in said if re.fullmatch(r"[0-9]{1,2}", number)}
        return same.pop() if len(same) == 1 else None


_TRUTH = {"yes": "true", "no": "false"}


def _bare(text: str) -> str:
    words = re.findall(r"\w+", text.casefold())
    return " ".join(words[1:] if words[:1] in (["the"], ["a"], ["an"]) and len(words) > 1 else words)
