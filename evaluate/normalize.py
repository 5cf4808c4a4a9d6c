"""Clean a generated text before an answer is looked for: for the robust metrics of all tasks answered in words."""

import re
import unicodedata
from typing import NamedTuple


class Rewrite(NamedTuple):
    """Each match of `pattern` becomes `replacement`; `example` becomes `result`."""

    pattern: str
    replacement: str
    example: str
    result: str


# Letters of scripts that put no space between words: Thai to Khmer, Chinese and Japanese, Korean.
_UNSPACED = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]"
_SIGNED = r"(?:(?<=\bis )|(?<=\bbe )|(?<=\bto )|(?<=[=:(] )|(?<=[=:({])|(?<=^))"  # no "8 minus 5", which subtracts

# In this order. Where a word would melt with its neighbour, a space remains.
REWRITES = (
    Rewrite(rf"(?<={_UNSPACED})(?=[\da-zA-Z$])|(?<=[\da-zA-Z%])(?={_UNSPACED})", " ", "共14个", "共 14 个"),
    Rewrite(r"\{,\}", ",", r"1{,}234", "1,234"),
    Rewrite(r"\\[,!;:]", "", r"1\,234", "1234"),
    Rewrite(r"(?<=\d)['’](?=\d{3}(?!\d))", ",", "1'234'567", "1,234,567"),
    Rewrite(r"\\([$%#&_])", r"\1", r"50\%", "50%"),
    Rewrite(r"\\(?:left|right|displaystyle)\b", "", r"\left(5\right)", "(5)"),
    Rewrite(r"\\(?:times|cdot)\b", "×", r"2 \times 9", "2 × 9"),
    Rewrite(r"\\div\b|÷", "/", r"18 \div 9", "18 / 9"),
    Rewrite(r"\\approx\b|[≈≃]", "=", r"100/3 ≈ 33.33", "100/3 = 33.33"),
    Rewrite(r"\\(?:text[a-z]{0,6}|math[a-z]{0,6}) ?\{([^{}]{0,200})\}", r" \1 ", r"5\text{ eggs}", "5 eggs "),
    Rewrite(r"\\sqrt ?\{(\d{1,20})\}|√ ?(\d{1,20})", r"(\1\2)^0.5", r"\sqrt{16} = 4", "(16)^0.5 = 4"),
    Rewrite(r"\\[cdt]?frac ?(\d) ?(\d)", r"\\frac{\1}{\2}", r"\frac34 x", r"3/4 x"),
    Rewrite(r"(?<=\d)\\[cdt]?frac(?= ?\{)", r" \\frac", r"1\dfrac{x}{2}", r"1 \frac{x}{2}"),
    Rewrite(r"\\[cdt]?frac ?\{ ?(-?[\d.,]{1,40}) ?\} ?\{ ?([\d.,]{1,40}) ?\}", r"\1/\2", r"1\dfrac{3}{4}", "1 3/4"),
    Rewrite(r"(?<=\d)\*\*(?=\d)", "^", "2**3", "2^3"),
    Rewrite(r"\\[()\[\]]|\*\*|`", " ", r"\[ **18** \]", " 18 "),
    Rewrite(r"(?<!\w)_{1,2}(?=[\w$(-])|_{1,2}(?!\w)", " ", "__18__", " 18 "),
    Rewrite(r"(?<=-) ?[$€£¥₹]", "", "-$7", "-7"),
    Rewrite(r"[$€£¥₹]", " ", "$7", " 7"),
    Rewrite(rf"(?i){_SIGNED}minus +(?=\d)|(?<![\w-])negative +(?=\d)", "-", "It is minus 5", "It is -5"),
    Rewrite(r"(?i)(?<=\d) and (?:a|one)[ -]half\b", " 1/2", "2 and a half", "2 1/2"),
    Rewrite(r"(?i)(?<=\d) and (?:a|one)[ -]quarter\b", " 1/4", "2 and a quarter", "2 1/4"),
    Rewrite(r"(?<=\d) ?[×x*] ?10 ?\^ ?\{?([+-]?\d{1,3})\}?(?!\d)", r"e\1 ", "3 x 10^5", "3e5 "),
    Rewrite(r"(?<![\w.,])10 ?\^ ?\{?([+-]?\d{1,3})\}?(?!\d)", r"1e\1 ", "10^{6}", "1e6 "),
    Rewrite(r" {2,}", " ", "5  eggs", "5 eggs"),
)
_COMPILED = [(re.compile(rewrite.pattern), rewrite.replacement) for rewrite in REWRITES]
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
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return text


def _spell_fraction(match: re.Match[str]) -> str:
    fraction = unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/")
    follows_digit = match.string[match.start() - 1 : match.start()].isdigit()
    return f" {fraction}" if follows_digit else fraction
