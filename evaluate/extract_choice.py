"""Tasks that are answered with one of several choices (A to E, true, answer2, option1): the two rules."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from evaluate.extract_number import numbers, stated_number
from evaluate.statements import LEAD, Extraction, Statement, answer_parts, first_sentence, normalize, statements
from moa.reading import short_repr

# What a sentence says about an answer that it mentions: that it is wrong, right or chosen.
_BEST = r"(?:correct|right|best|appropriate|likely|plausible|logical|sensible|reasonable|suitable)"
_OPEN, _CLOSE = r"[\"'“‘(]*", r"[\"'”’)]*"
# What may stand between "not" and the answer: "n't think that it's", "not necessarily the correct".
_FILLER = r"""
    (?: (?: the|a|an|be|is|to | that|this|it|(?:that|this|it)['’]s | really|actually|necessarily|entirely|always|quite
          | exactly|completely|fully|totally | think|believe|say|feel|agree|suppose|consider|see|call|seem|appear|look
          | correct|right|best|answer|option|case ) \s+ ){0,6}
"""
_NEGATED_BEFORE = re.compile(
    rf"""
    (?: (?: \b(?:not|nor|neither|never|cannot|hardly|unlikely|no\ longer|no\ evidence|far\ from|(?:hard|wrong)\ to)
          | n['’]t                                     # "it can't be answer1"
          | (?<!\bno\ )(?<!\bany\ )(?<!\bout\ )\bdoubt   # "I doubt that it is answer1", not "no doubt"
          | \b(?:than|over|unlike|except|instead\ of)  # "rather than answer1", "answer2 over answer1"
          | \b(?:excludes?|eliminat(?:es?|ing)|rul(?:es?|ed|ing)\ out)
        ) \s+ {_FILLER}
      | \b(?:wrong|incorrect)\ (?:answer|option|choice) \s* (?:is|:) \s*
    ) {_OPEN} $
    """,
    re.I | re.X,
)
_NEGATED_AFTER = re.compile(
    rf"""
    {_CLOSE} ,? \s+ (?:which\ |that\ )?
    (?: (?:is|was|would\ be|seems|looks|sounds) \s+ (?:also\ |clearly\ |simply\ |just\ )?
        (?: not|never|too|less|wrong|incorrect|false|impossible|unlikely|implausible|irrelevant|unrelated|illogical
          | worse|a\ (?:bad|poor) )\b
      | (?: (?:is|was|does|could|would)n['’]t | can['’]t | won['’]t | cannot | (?:does|can|could|would|will)\ not)\b
      | makes?\ (?:no|little)\ sense\b
    )
    """,
    re.I | re.X,
)
_RIGHT_AFTER = re.compile(
    rf"""
    {_CLOSE} \s+
    (?: (?: is|was|must\ be|would\ be|(?:seems|appears)(?:\ to\ be)?) \s+     # "answer2 seems to be the most likely"
        (?: (?:the|our|my) \s+ )? (?: only\ |most\ |more\ )? (?: {_BEST}|better|preferable|answer)\b
      | makes?\ (?:the\ )?(?:most\ |more\ )?sense\b | fits\ (?:best|better)\b
    )
    """,
    re.I | re.X,
)
_CHOSEN_BEFORE = re.compile(
    rf"""
    \b(?: (?: choose|chose|pick|select|go\ with|going\ with|opt\ for) \s+ (?:the\ )?   # "I choose answer2"
        | I(?:\ would|['’]d)?\ (?:think|believe|say|guess)\ (?:that\ )?               # "I think it's answer2"
          (?: (?:it|this|that)(?:\ is|['’]s)\ )? (?:the\ )?
      ) {_OPEN} $
    """,
    re.I | re.X,
)


@dataclass(frozen=True)
class Mention:
    """An answer in a text, text[start:end]. negated: "not answer1", "answer1 is wrong". chosen: "answer1 is right"."""

    answer: str
    negated: bool
    chosen: bool
    start: int
    end: int


class Choices:
    """The answers of a task, and how they are read from a text. A subclass says how answers and options are spelled.

    first: what the published rule looks for. mention: an answer that stands alone. `options` are the answers that a row
    allows, each with what its instruction says behind it.
    """

    answers: tuple[str, ...]
    first: re.Pattern[str]
    mention: re.Pattern[str]

    def read_answer(self, value: Any) -> str:
        """Read a row's "answer": one of the answers, as it is spelled."""
        if not isinstance(value, str) or value not in self.answers:
            raise ValueError(f"one of {', '.join(self.answers)}, got {short_repr(value)}")
        return value

    def published(self, text: str, row: dict[str, Any]) -> Extraction | None:
        """Take the first answer anywhere, even inside a word: comparable with the paper's tables."""
        match = self.first.search(text)
        return Extraction(match[0], (match[0],)) if match else None

    def robust(self, text: str, row: dict[str, Any]) -> Extraction | None:
        """Take the stated answer or value; else the answer called right; else the last that is not negated."""
        options = self.options(row.get("instruction", "")) or dict.fromkeys(self.answers, "")
        readings = (answer for part in answer_parts(text) for answer in self._readings(self.prepare(part), options))
        answer = next(filter(None, readings), None)
        return Extraction(answer, (answer,)) if answer in options else None  # it may be "answer9"

    def _readings(self, text: str, options: dict[str, str]) -> Iterator[str | None]:
        """Yield what each way to read an answer makes of a text, the one to believe first."""
        stated, mentions = statements(text), self.mentions(text)
        yield from (self.stated(statement, options) for statement in stated)
        yield from (mention.answer for mention in mentions if mention.chosen)
        yield self.leading(text, mentions)
        yield from (self.of_value(statement, options) for statement in stated)
        yield self.not_negated([mention for mention in reversed(mentions) if mention.answer in options], options)
        yield from self.whole(text, options)

    def mentions(self, text: str) -> list[Mention]:
        mentions = []
        for match in self.mention.finditer(text):
            before = text[max(0, match.start() - 80) : match.start()]
            negated = bool(_NEGATED_BEFORE.search(before) or _NEGATED_AFTER.match(text, match.end()))
            chosen = not negated and bool(_CHOSEN_BEFORE.search(before) or _RIGHT_AFTER.match(text, match.end()))
            answer = match[0] if match[0] in self.answers else match[0].lower()
            mentions.append(Mention(answer, negated, chosen, *match.span()))
        return mentions

    def not_negated(self, mentions: list[Mention], options: dict[str, str]) -> str | None:
        """Return the first answer that is not negated; else, of the options, the only one not mentioned."""
        left = set(options) - {mention.answer for mention in mentions}
        remaining = left.pop() if mentions and len(left) == 1 else None
        return next((mention.answer for mention in mentions if not mention.negated), remaining)

    def in_order(self, names: list[str], values: list[str]) -> dict[str, str]:
        """Return the values that an instruction lists by their answers; none where these are not in order."""
        return (
            dict(zip(names, map(normalize, values), strict=True)) if tuple(names) == self.answers[: len(names)] else {}
        )


_NO_WORD = r"(?![\w'’])"  # behind a letter: not "Ann", "A's"
# An article or the subject of a sentence that explains, not the choice (A): "A" before a word in lower case, except
# the words that follow a stated choice.
_ARTICLE = r"(?!(?<=A) (?!(?:because|since|as|and|or|is|which|with|for|by|so)\b)[a-z])"
_STAND_ALONE = re.compile(rf"(?<![\w'’°])([A-E]){_ARTICLE}{_NO_WORD}")  # not "Mr. D's", "25 °C", "10C2"
_AT_ONCE = re.compile(  # "the option B", "(b)", "d."
    rf"{LEAD}(?:([A-E]){_NO_WORD}{_ARTICLE}|(?<=[(\[{{])([a-e])(?=[)\]}}])|([a-e])(?=\s*$|[).,:;]))"
)
_LATER = (
    re.compile(r"(?<!\w)[(\[{] ?([A-Ea-e]) ?[)\]}](?!\w)"),  # "62 m (c)"
    re.compile(r"\b(?i:option|choice|alternative) ?\(?([A-E])\b"),  # "62 m, option C"
)
# An answer that the text begins with, then why: "B. The train", "(B)\n", "B, because".
_LEADING = re.compile(r"[\W_]*(?:(?:option|choice|answer) )?\(?([A-E])(?:[).](?!\w)|\s*\n|,? (?:because|since|as)\b)")
_LIST = re.compile(
    r"(?<![\w'’°(])\(?[A-E]\)?(?:, ?\(?[A-E]\)?){0,4}(?:,? (?:or|to|and) |/|-)\(?[A-E](?:\)|(?![\w'’)]))(?! is\b)"
)
_COPIED = re.compile(  # the choices, repeated
    r"\(?A[).:] [\s\S]{1,100}?\s\(?B[).:] [\s\S]{1,100}?\s\(?C[).:] "
    r"(?:[\s\S]{1,100}?\s\(?D[).:] )?(?:[\s\S]{1,100}?\s\(?E[).:] )?[^.\n]{0,100}"
)
_CHOICE_MARK = re.compile(r"\(([A-E])\)")


class Letters(Choices):
    """A to E. The choices stand after "Answer Choices:" as (A), (B), ..."""

    answers = tuple("ABCDE")
    first = re.compile("[A-E]")
    mention = _STAND_ALONE

    def options(self, instruction: str) -> dict[str, str]:
        _, mark, listed = instruction.rpartition("Answer Choices:")
        parts = _CHOICE_MARK.split(listed) if mark else []
        return self.in_order(parts[1::2], parts[2::2])

    def prepare(self, text: str) -> str:
        """Return a text without what only names letters: "A or B", the choices repeated."""
        return _LIST.sub(" ", _COPIED.sub(" ", text))

    def stated(self, statement: Statement, options: dict[str, str]) -> str | None:
        if match := _AT_ONCE.match(statement.tail):
            return match[match.lastindex].upper()
        sentence = "" if statement.label else first_sentence(statement.tail)
        return next((match[1].upper() for pattern in _LATER if (match := pattern.search(sentence))), None)

    def leading(self, text: str, mentions: list[Mention]) -> str | None:
        match = _LEADING.match(text)
        return match[1] if match else None

    def of_value(self, statement: Statement, options: dict[str, str]) -> str | None:
        """Return the only choice that reads like the statement, or else whose only number is the stated one."""
        sentence = _squeezed(first_sentence(statement.tail))
        same = [letter for letter, value in options.items() if sentence and sentence == _squeezed(value)]
        number = None if same else stated_number(statement)
        if number and not number.undecided:
            values = {letter: numbers(value) for letter, value in options.items()}
            same = [
                letter
                for letter, listed in values.items()
                if len(listed) == 1 and number.extraction.is_correct(listed[0].extraction.candidates[0])
            ]
        return same[0] if len(same) == 1 else None

    def whole(self, text: str, options: dict[str, str]) -> Iterator[str | None]:
        """Read a text that is nothing else: "d", "(d) 62 m", "62 m"."""
        if len(text.strip()) <= 80 and "\n" not in text.strip():
            statement = Statement(text.strip(), label=True)
            yield self.stated(statement, options)
            yield self.of_value(statement, options)


def _squeezed(value: str) -> str:
    return re.sub(r"[\s,]+", "", value).casefold().strip(".")


# "The best ending is" states an answer.
_OTHER_NOUN = re.compile(rf"\b({_BEST}) (?:solution|ending)(?=s?\b(?! ?\(?\d))", re.I)
_QUESTION = re.compile(r"[^.!?\n]{1,200}\?")  # "Is it true that dogs fly? No."
_OPEN_QUESTION = re.compile(
    r"\bwhether\b[^.!?,;\n]{0,80}"
    r"|(?:\bnot|n['’]t) (?:(?:sure|certain|clear) (?:if|that)|(?:know|tell|say) if)\b[^.!?,;\n]{0,80}",
    re.I,
)
# What may follow an answer that a text begins with: "True. It", "answer2 because".
_LEADS = re.compile(r"[\"'”’)\]]*\s*(?:$|[.!;:\n)]|,|[-–—] | (?:because|since|as|it|they|there|you)\b)")
# What an answer begins with: "The best option is", then perhaps "yes" or a bare number.
_BEGINNING = re.compile(
    rf"{LEAD}(?:(?P<word>(?i:yes|no))\b|(?P<number>[0-9]{{1,2}})(?=[)\]}}\"']?\s*(?:$|[.,;:!\n)<}}](?!\d))))?"
)
_CLOSING = re.compile(r"\b(yes|no)\W{0,5}$", re.I)  # "..., so yes."
_YES_NO = {"yes": "true", "no": "false"}


class Keywords(Choices):
    """`word` and a number from 1 to `count`, listed as "Answer1: ..."; without a word, true and false.

    published_count: how far the published rule counts, where that is further than the task's own answers.
    """

    def __init__(self, word: str = "", count: int = 2, published_count: int = 0) -> None:
        self.word = word
        self.answers = tuple(f"{word}{number}" for number in range(1, count + 1)) if word else ("true", "false")
        self.first = re.compile(f"{word}[1-{max(count, published_count)}]" if word else "true|false")
        # "Answer 2", "answer (2)", "option #2" are answer2, but "answer 2.5 g" is not.
        nouns = "|".join(dict.fromkeys([word, "answer", "option", "choice"]))
        self.spelled = re.compile(
            rf"\b(?:{nouns})(?: ?(?:number|no\.))?(?:[ _#-]{{0,2}}[(\[]?([0-9]{{1,2}})[)\]]?(?![\w%]|[.,]\d))", re.I
        )
        keyword = rf"{word}[0-9]{{1,2}}" if word else r"\b(?:true|false)\b"
        self.mention = re.compile(keyword, re.I)
        both = r"(?:\s?/\s?|,?\s(?:or|and)\s)"
        self.list_of = re.compile(rf"{keyword}(?:(?:,\s{{0,2}}|{both}){keyword})*{both}{keyword}", re.I)
        self.heading = re.compile(rf"({keyword})(?=\s?:)", re.I)

    def options(self, instruction: str) -> dict[str, str]:
        listed, mark, form = instruction.rpartition("Answer format:")
        parts = re.split(rf"\b{self.word.capitalize()}([0-9]):", listed if mark else instruction) if self.word else []
        values = self.in_order([f"{self.word}{number}" for number in parts[1::2]], parts[2::2])
        named = [keyword for keyword in self.answers if mark and keyword in self.mention.findall(form)]
        return {keyword: values.get(keyword, "") for keyword in named or values}

    def prepare(self, text: str) -> str:
        """Return a text with keywords spelled as the task does, without what only names them: lists, open questions."""
        text = _OTHER_NOUN.sub(r"\1 answer", text)
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
        keywords = {keyword.lower() for keyword in self.mention.findall(match[0])}
        of_the_last = re.match(r"\s(?:is|was|does|has|isn)\b", match.string[match.end() : match.end() + 6])
        if len(keywords) == 1 or (of_the_last and not re.search(r"/|\sor\s", match[0], re.I)):
            return match[0]
        return " "

    def stated(self, statement: Statement, options: dict[str, str]) -> str | None:
        start = _BEGINNING.match(statement.tail)
        if start["number"] and self.word:
            return self.of_value(Statement(start["number"], label=True), options)
        if start["word"] and not self.word:
            return _YES_NO[start["word"].lower()]
        mentions = self.mentions(first_sentence(statement.tail))
        if statement.label:
            mentions = [mention for mention in mentions[:1] if mention.start == start.end()]
        return self.not_negated(mentions, options)

    def leading(self, text: str, mentions: list[Mention]) -> str | None:
        """Return the keyword, or for true and false a yes or no, that a text begins with as its answer: "True. It"."""
        start = _BEGINNING.match(text)
        if start["word"] and not self.word and _LEADS.match(text, start.end()):
            return _YES_NO[start["word"].lower()]
        first = mentions[0] if mentions else None
        if first and first.start == start.end() and not first.negated and _LEADS.match(text, first.end):
            return first.answer
        return None

    def of_value(self, statement: Statement, options: dict[str, str]) -> str | None:
        """Return the only option whose words, or whose number, are those of the statement or of its first sentence.

        "2" names none where another option reads 2.
        """
        stated = {_bare(statement.tail), _bare(first_sentence(statement.tail))} - {""}
        same = {f"{self.word}{number}" for number in stated if self.word and re.fullmatch(r"[0-9]{1,2}", number)}
        for keyword, value in options.items():
            numbered = f"{keyword.removeprefix(self.word)} {value}"  # "2) Maria"
            if stated & {_bare(value), _bare(numbered)}:
                same.add(keyword)
        return same.pop() if len(same) == 1 else None

    def whole(self, text: str, options: dict[str, str]) -> Iterator[str | None]:
        """Read a text that is nothing else: "Maria", "2", "2) Maria"; and a yes or no at the end."""
        if len(text) <= 1000:
            yield self.of_value(Statement(text, label=True), options)
        if not self.word and (closing := _CLOSING.search(text)):
            yield _YES_NO[closing[1].lower()]


def _bare(text: str) -> str:
    words = re.findall(r"\w+", text.casefold())
    return " ".join(words[1:] if words[:1] in (["the"], ["a"], ["an"], ["to"]) and len(words) > 1 else words)
