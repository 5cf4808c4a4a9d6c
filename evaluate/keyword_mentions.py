"""What a sentence says about an answer that it mentions (true, answer2, B): that it is wrong, right or chosen."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

BEST = r"(?:correct|right|best|appropriate|likely|plausible|logical|sensible|reasonable|suitable)"
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
        (?: (?:the|our|my) \s+ )? (?: only\ |most\ |more\ )? (?: {BEST}|better|preferable|answer)\b
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


def mentions_of(answer: re.Pattern[str], text: str) -> Iterator[Mention]:
    for match in answer.finditer(text):
        before = text[max(0, match.start() - 80) : match.start()]
        negated = bool(_NEGATED_BEFORE.search(before) or _NEGATED_AFTER.match(text, match.end()))
        chosen = not negated and bool(_CHOSEN_BEFORE.search(before) or _RIGHT_AFTER.match(text, match.end()))
        yield Mention(match[0].lower(), negated, chosen, *match.span())
