"""Find where a text states its final answer: for the robust metrics of all tasks answered in words.

Every pattern is bounded, so that the time to read a text is linear in its length.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

_TAGS = r"(?:think|thinking|thought|reasoning)"
_THINKING = re.compile(rf"<{_TAGS}>|\[THINK\]|<\|channel\|>analysis")
_THINKING_ENDS = re.compile(rf"</{_TAGS}>|\[/THINK\]|<\|channel\|>final<\|message\|>")
CHAT_TOKENS = r"<\|(?:eot_id|eom_id|end_of_text|endoftext|im_end|start_header_id)\|>|</s>|<eos>|<end_of_turn>|\[INST\]"
# Another problem, which a model that misses its end of text runs on into: the template's headings and first words (four
# hashes are GSM8K's answer, "### Final Answer" is this problem's), how the tasks' instructions begin, tokens of chats.
_RUN_ON = re.compile(
    r"(?<!#)###(?!#)(?!\W{0,6}(?i:final|answer|conclusion|solution|step)\b)|Below is an instruction"
    rf"|Please (?:choose the correct|answer the following question)|{CHAT_TOKENS}"
)
_QUESTION = re.compile(r"^[^\w\n]{0,6}(?i:question|q|problem|user|human)[^\w\n]{0,4}:|\bQuestion:", re.M)


def without_thinking(text: str) -> str:
    """Return what follows the last end of thinking; after a start without end there is no answer."""
    return _THINKING.split(_THINKING_ENDS.split(text)[-1], maxsplit=1)[0]


def truncate_run_on(text: str, run_on: re.Pattern[str] = _RUN_ON) -> str:
    """Cut a text at the first match of `run_on` (another problem) that has something before it."""
    for match in run_on.finditer(text):
        if text[: match.start()].strip():
            return text[: match.start()]
    return text


def answer_parts(text: str) -> Iterator[str]:
    """Yield the parts of a generated text to read an answer from, the one to believe first.

    None holds thinking or the template's next problem. The first ends before "Question:". The second does not: this
    problem may have been repeated there.
    """
    text = truncate_run_on(without_thinking(text))
    problem = truncate_run_on(text, _QUESTION)
    yield from dict.fromkeys((problem, text))


@dataclass(frozen=True)
class Statement:
    """A statement of a final answer.

    tail: what follows "The answer is" in its line, or stands in the box. label: whether it is a bare "Answer:" or
    "####", which may also head a whole solution, so that only what follows at once counts.
    """

    tail: str
    label: bool


class Form(NamedTuple):
    """A form of statement: `example` states 18. A lower rank is more deliberate and wins over a higher one."""

    rank: int
    label: bool
    pattern: str
    example: str


_ANSWER = (
    r"\b(?:answer(?! (?:every|all|each|any|this|that|these|those)\b)|(?:correct|right|best) (?:option|choice|letter))\b"
)
_ABOUT = r"[\"”']?(?: [\"“][^\"”\n]{0,200}[\"”]|[^.:=\n\"“]){0,80}?"  # "The answer to the question" before " is"
_IS = (
    r"\b(?:is|was|are|equals|(?:would|will|should|must) be|comes (?:out )?to)\b *:?"
    r"(?! *(?:not|worth)\b)"  # "The answer is not", "Each answer is worth" state nothing
)
_OOPS = (
    r"(?:wait|no|nope|oops|sorry|hmm|hold on|correction|edit|scratch that|on second thoughts?"
    r"|actually(?=,? (?:it|that|the|no|wait)\b))\b"
)
_RETRACTION = (
    r"(?:(?<=[.!?…\n—-])|(?<=[.!?…\n,—-] )|(?<=[.!?…] {2}))"  # at the start of a sentence, or behind a comma or dash
    rf"(?:{_OOPS}(?: *[,.:;!…—-]+| (?={_OOPS}|it\b)) {{0,3}}){{1,4}}"
    r"|\b(?:I made an? (?:mistake|error)|(?:that|this)(?:['’]s| is) (?:wrong|not right|incorrect))\b"
    r"|\b(?:corrected|revised|updated) (?:final )?answer\b[^\w\n]{0,4}"
)
_BOX, _RETRACTED = 1, 5  # ranks
FORMS = (
    Form(_BOX, False, r"(?:\\|\x08|\bb)?(?:boxed|fbox|oxed)(?= ?[{\d])", r"First \boxed{6}, then \boxed{18}"),
    Form(2, True, r"(?<!#)####(?!#)", "#### 18"),
    Form(2, True, r"[<\[](?:final[_ ]?)?ans(?:wer)?[>\]]", "<answer>\n18\n</answer>"),
    Form(2, False, rf"\bfinal[_ ](?:answer|result)\b{_ABOUT}(?:{_IS}|[:=→]| -(?= ))", "Final answer: 18"),
    Form(2, False, r"^[^\w\n]{0,6}final answer[^\w\n]{0,6}$", "## Final Answer\n18"),
    Form(3, False, rf"{_ANSWER}{_ABOUT}{_IS}", "The best choice for her is 18"),
    Form(3, False, rf"\b(?:respuesta|risposta|réponse|antwort){_ABOUT}\b(?:es|è|est|ist):?", "La respuesta es 18"),
    Form(3, False, r"答案\s?(?:是|为)|答え\s?は|정답\s?은|ответ:", "答案是18"),
    Form(4, True, rf"(?:{_ANSWER}(?: choice)?|\bans\b)[\"']?(?: ?\([^)\n]{{0,40}}\))? *[:=]", '{"answer": 18'),
    Form(4, True, r"\bans\b *[.-]|(?:答案?|答え|정답) ?:", "Ans. 18"),
    Form(4, True, r"^[^\w\n]{0,6}answer[^\w\n]{0,6}$", "**Answer**\n18"),
    Form(_RETRACTED, True, _RETRACTION, "The answer is 17. No, wait, 18"),  # what follows it is believed first
)
# What may stand between a statement and its answer: "about", "Rs. ", "x = ", "it should be", "the correct option".
LEAD = (
    r"[\W_]*(?:(?:(?i:the|that|this|it|s|is|are|be|should|must|would|about|approximately|approx|around|roughly|exactly"
    r"|only|just|rs|usd|total|final|result|correct|right|best|most|likely|definitely|clearly|probably|number|letter"
    r"|answer|option|choice|alternative|solution|ending)\b|[a-z] ?=)[\W_]*)*"
)
_COMPILED = [(form, re.compile(form.pattern, re.I | re.M)) for form in FORMS]
_NO_FINAL_ANSWER = re.compile(
    r"\b(?:to|each|every|per|any|an|other|first|second|third|next|wrong|incorrect)(?: correct)? $", re.I
)
_TAIL = re.compile(r"\s{0,20}([^\n]{0,200})")
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$|[A-Z])|</")


def first_sentence(text: str) -> str:
    return _SENTENCE_END.split(text, maxsplit=1)[0]


def statements(text: str) -> list[Statement]:
    """Return the statements of a final answer in a text that `normalize` returned, the one to believe first.

    What follows a retraction of an earlier statement comes before that. Of one rank the first wins, since a model may
    run on into another problem; of boxes the last.
    """
    matches = [(match.start(), form, match) for form, pattern in _COMPILED for match in pattern.finditer(text)]
    ordered: list[tuple[tuple[bool, int, int, int], Statement]] = []
    retractions = 0
    for start, form, match in sorted(matches, key=lambda each: each[0]):
        if _NO_FINAL_ANSWER.search(text, max(0, start - 20), start) or (form.rank == _RETRACTED and not ordered):
            continue
        retractions += form.rank == _RETRACTED
        tail = _TAIL.match(text, match.end())
        assert tail is not None
        boxed = form.rank == _BOX and tail[1].startswith("{")
        statement = Statement(_in_braces(tail[1]) if boxed else tail[1], form.label)
        end = _SENTENCE_END.search(statement.tail)
        doubted = end is not None and end[0] == "?"  # "So the answer is 13? No."
        belief = (doubted, -retractions, form.rank, -start if form.rank == _BOX else start)
        ordered.append((belief, statement))
    return [statement for _, statement in sorted(ordered, key=lambda each: each[0])]


def _in_braces(text: str) -> str:
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:position]
    return text[1:]
