"""What a sentence says about a keyword in it (true, answer2): that it is wrong, right or chosen."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

BEST = r"(?:correct|right|best|appropriate|likely|plausible|logical|sensible|reasonable|suitable)"
_OPEN, _CLOSE = r"[\"'“‘(]*", r"[\"'”’)]*"
_FILLER = r"(?:(?:the|a|an|be|is|really|actually|necessarily|entirely|always|correct|right|best|answer|option)\s+){0,3}"
_NEGATED_BEFORE = re.compile(
    rf"""
    (?: (?: \b(?:not|nor|neither|never|cannot) | n['’]t        # "it is not the answer1", "it can't be answer1"
          | \b(?:than|over|unlike|except|instead\ of)          # "rather than answer1", "I prefer answer2 over answer1"
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
        (?: not|never|too|less|wrong|incorrect|false|impossible|unlikely|implausible|irrelevant|unrelated|illogical)\b
      | (?: (?:is|was|does|could|would)n['’]t | can['’]t | won['’]t | cannot | (?:does|can|could|would|will)\ not)\b
      | makes?\ (?:no|little)\ sense\b
    )
    """,
    re.I | re.X,
)
_RIGHT_AFTER = re.compile(  # "answer2 is the most likely"
    rf"{_CLOSE}\s+(?:is|was|must be|seems|would be)\s+(?:the\s+)?(?:only |most )?(?:{BEST}|answer)\b", re.I
)
_CHOSEN_BEFORE = re.compile(  # "I choose answer2"
    rf"\b(?:choose|chose|pick|select|go with|going with|opt for)\s+(?:the )?{_OPEN}$", re.I
)


@dataclass(frozen=True)
class Mention:
    """A keyword in a text, text[start:end]. negated: "not answer1", "answer1 is wrong". chosen: "answer1 is right"."""

    keyword: str
    negated: bool
    chosen: bool
    start: int
    end: int


def mentions_of(keyword: re.Pattern[str], text: str) -> Iterator[Mention]:
    for match in keyword.finditer(text):
        before = text[max(0, match.start() - 80) : match.start()]
        negated = bool(_NEGATED_BEFORE.search(before) or _NEGATED_AFTER.match(text, match.end()))
        chosen = not negated and bool(_CHOSEN_BEFORE.search(before) or _RIGHT_AFTER.match(text, match.end()))
        yield Mention(match[0].lower(), negated, chosen, *match.span())
