"""Where a text states its final answer: for the robust rule of all tasks that are answered in words.

Every pattern is bounded, so that the time to read a text is linear in its length.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Extraction:
    """What a rule took from a text as its answer.

    text: the answer as it is written, for people to read. candidates: the values that it can mean ("2 dozen" is 2 or
    24); a program has one. tolerance: how far a candidate may lie from a number.
    """

    text: str
    candidates: tuple[Any, ...]
    tolerance: float = 0.0

    def is_correct(self, answer: Any) -> bool:
        """Tell whether some candidate is the answer."""
        if self.tolerance:
            return any(abs(answer - candidate) <= self.tolerance for candidate in self.candidates)
        return answer in self.candidates


# Letters of scripts that put no space between words: Thai to Khmer, Chinese and Japanese, Korean.
_UNSPACED = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]"
_SIGNED = r"(?:(?<=\bis )|(?<=\bbe )|(?<=\bto )|(?<=[=:(] )|(?<=[=:({])|(?<=^))"  # no "8 minus 5", which subtracts

# Pattern, what each match becomes, an example, what that becomes; in this order. Where a word would melt with its
# neighbour, a space remains.
REWRITES = (
    (rf"(?<={_UNSPACED})(?=[\da-zA-Z$])|(?<=[\da-zA-Z%])(?={_UNSPACED})", " ", "共14个", "共 14 个"),
    (r"\{,\}", ",", r"1{,}234", "1,234"),
    (r"\\[,!;:]", "", r"1\,234", "1234"),
    (r"(?<=\d)['’](?=\d{3}(?!\d))", ",", "1'234'567", "1,234,567"),
    (r"\\([$%#&_])", r"\1", r"50\%", "50%"),
    (r"\\(?:left|right|displaystyle)\b", "", r"\left(5\right)", "(5)"),
    (r"\\(?:times|cdot)\b", "×", r"2 \times 9", "2 × 9"),
    (r"\\div\b|÷", "/", r"18 \div 9", "18 / 9"),
    (r"\\approx\b|[≈≃]", "=", r"100/3 ≈ 33.33", "100/3 = 33.33"),
    (r"\\(?:text[a-z]{0,6}|math[a-z]{0,6}) ?\{([^{}]{0,200})\}", r" \1 ", r"5\text{ eggs}", "5 eggs "),
    (r"\\sqrt ?\{(\d{1,20})\}|√ ?(\d{1,20})", r"(\1\2)^0.5", r"\sqrt{16} = 4", "(16)^0.5 = 4"),
    (r"\\[cdt]?frac ?(\d) ?(\d)", r"\\frac{\1}{\2}", r"\frac34 x", r"3/4 x"),
    (r"(?<=\d)\\[cdt]?frac(?= ?\{)", r" \\frac", r"1\dfrac{x}{2}", r"1 \frac{x}{2}"),
    (r"\\[cdt]?frac ?\{ ?(-?[\d.,]{1,40}) ?\} ?\{ ?([\d.,]{1,40}) ?\}", r"\1/\2", r"1\dfrac{3}{4}", "1 3/4"),
    (r"(?<=\d)\*\*(?=\d)", "^", "2**3", "2^3"),
    (r"\\[()\[\]]|\*\*|`", " ", r"\[ **18** \]", " 18 "),
    (r"(?<!\w)_{1,2}(?=[\w$(-])|_{1,2}(?!\w)", " ", "__18__", " 18 "),
    (r"(?<=-) ?[$€£¥₹]", "", "-$7", "-7"),
    (r"[$€£¥₹]", " ", "$7", " 7"),
    (rf"(?i){_SIGNED}minus +(?=\d)|(?<![\w-])negative +(?=\d)", "-", "It is minus 5", "It is -5"),
    (r"(?i)(?<=\d) and (?:a|one)[ -]half\b", " 1/2", "2 and a half", "2 1/2"),
    (r"(?i)(?<=\d) and (?:a|one)[ -]quarter\b", " 1/4", "2 and a quarter", "2 1/4"),
    (r"(?<=\d) ?[×x*] ?10 ?\^ ?\{?([+-]?\d{1,3})\}?(?!\d)", r"e\1 ", "3 x 10^5", "3e5 "),
    (r"(?<![\w.,])10 ?\^ ?\{?([+-]?\d{1,3})\}?(?!\d)", r"1e\1 ", "10^{6}", "1e6 "),
    (r" {2,}", " ", "5  eggs", "5 eggs"),
)
_REWRITES = [(re.compile(pattern), replacement) for pattern, replacement, *_ in REWRITES]
_CHARACTERS = str.maketrans(
    dict.fromkeys("\u2212\u2013\ufe63\uff0d", "-")  # minus signs
    | dict.fromkeys("\u00a0\u202f\u2009\u3000", " ")
    | {"。": ". ", "，": ", ", "、": ", ", "：": ": ", "；": "; ", "？": "? ", "（": "(", "）": ")", "％": "%"}
)
_FRACTION_CHARACTER = re.compile("[¼½¾⅐-⅞]")


def normalize(text: str) -> str:
    """Return a text without Markdown emphasis, LaTeX wrappers and currency signs.

    Writes "½" as "1/2" and every minus sign as "-".
    """
    text = _FRACTION_CHARACTER.sub(_spell_fraction, text.translate(_CHARACTERS))
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return text


def _spell_fraction(match: re.Match[str]) -> str:
    fraction = unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/")
    follows_digit = match.string[match.start() - 1 : match.start()].isdigit()
    return f" {fraction}" if follows_digit else fraction


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
    """Yield the parts of a generated text to read an answer from, normalized, the one to believe first.

    None holds thinking or the template's next problem. The first ends before "Question:". The second does not: this
    problem may have been repeated there.
    """
    text = truncate_run_on(without_thinking(text))
    problem = truncate_run_on(text, _QUESTION)
    yield from map(normalize, dict.fromkeys((problem, text)))


@dataclass(frozen=True)
class Statement:
    """A statement of a final answer.

    tail: what follows "The answer is" in its line, or stands in the box. label: whether it is a bare "Answer:" or
    "####", which may also head a whole solution, so that only what follows at once counts.
    """

    tail: str
    label: bool


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
# Rank, whether it is a label, pattern, and an example that states 18. A lower rank is more deliberate and wins.
FORMS = (
    (_BOX, False, r"(?:\\|\x08|\bb)?(?:boxed|fbox|oxed)(?= ?[{\d])", r"First \boxed{6}, then \boxed{18}"),
    (2, True, r"(?<!#)####(?!#)", "#### 18"),
    (2, True, r"[<\[](?:final[_ ]?)?ans(?:wer)?[>\]]", "<answer>\n18\n</answer>"),
    (2, False, rf"\bfinal[_ ](?:answer|result)\b{_ABOUT}(?:{_IS}|[:=→]| -(?= ))", "Final answer: 18"),
    (2, False, r"^[^\w\n]{0,6}final answer[^\w\n]{0,6}$", "## Final Answer\n18"),
    (3, False, rf"{_ANSWER}{_ABOUT}{_IS}", "The best choice for her is 18"),
    (3, False, rf"\b(?:respuesta|risposta|réponse|antwort){_ABOUT}\b(?:es|è|est|ist):?", "La respuesta es 18"),
    (3, False, r"答案\s?(?:是|为)|答え\s?は|정답\s?은|ответ:", "答案是18"),
    (4, True, rf"(?:{_ANSWER}(?: choice)?|\bans\b)[\"']?(?: ?\([^)\n]{{0,40}}\))? *[:=]", '{"answer": 18'),
    (4, True, r"\bans\b *[.-]|(?:答案?|答え|정답) ?:", "Ans. 18"),
    (4, True, r"^[^\w\n]{0,6}answer[^\w\n]{0,6}$", "**Answer**\n18"),
    (_RETRACTED, True, _RETRACTION, "The answer is 17. No, wait, 18"),  # what follows it is believed first
)
# What may stand between a statement and its answer: "about", "Rs. ", "x = ", "it should be", "the correct option".
LEAD = (
    r"[\W_]*(?:(?:(?i:the|that|this|it|s|is|are|be|should|must|would|about|approximately|approx|around|roughly|exactly"
    r"|only|just|rs|usd|total|final|result|correct|right|best|most|likely|definitely|clearly|probably|number|letter"
    r"|answer|option|choice|alternative|solution|ending)\b|[a-z] ?=)[\W_]*)*"
)
_FORMS = [(rank, label, re.compile(pattern, re.I | re.M)) for rank, label, pattern, _ in FORMS]
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
    matches = [(match.start(), rank, label, match) for rank, label, form in _FORMS for match in form.finditer(text)]
    ordered: list[tuple[Any, ...]] = []
    retractions = 0
    for start, rank, label, match in sorted(matches, key=lambda each: each[0]):
        if _NO_FINAL_ANSWER.search(text, max(0, start - 20), start) or (rank == _RETRACTED and not ordered):
            continue
        retractions += rank == _RETRACTED
        tail = _TAIL.match(text, match.end())[1]
        if rank == _BOX and tail.startswith("{"):
            tail = _in_braces(tail)
        end = _SENTENCE_END.search(tail)
        doubted = end is not None and end[0] == "?"  # "So the answer is 13? No."
        ordered.append((doubted, -retractions, rank, -start if rank == _BOX else start, Statement(tail, label)))
    return [statement for *_, statement in sorted(ordered, key=lambda each: each[:4])]


def _in_braces(text: str) -> str:
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:position]
    return text[1:]
