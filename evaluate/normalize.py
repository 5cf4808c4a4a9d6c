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


# In this order. Where a word would melt with its neighbour, a space remains.
REWRITES = (
    Rewrite(r"\{,\}", ",", r"1{,}234", "1,234"),
    Rewrite(r"\\[,!;:]", "", r"1\,234", "1234"),
    Rewrite(r"\\([$%#&_])", r"\1", r"50\%", "50%"),
    Rewrite(r"\\(?:left|right|displaystyle)\b", "", r"\left(5\right)", "(5)"),
    Rewrite(r"\\(?:times|cdot)\b", "×", r"2 \times 9", "2 × 9"),
    Rewrite(r"\\approx\b|[≈≃]", "=", r"100/3 ≈ 33.33", "100/3 = 33.33"),
    Rewrite(r"\\(?:text[a-z]{0,6}|math[a-z]{0,6}) ?\{([^{}]{0,200})\}", r" \1 ", r"5\text{ eggs}", "5  eggs "),
    Rewrite(r"(?<=\d)\\[dt]?frac(?=\{)", r" \\frac", r"1\dfrac{x}{2}", r"1 \frac{x}{2}"),
    Rewrite(r"\\[dt]?frac\{ ?(-?[\d.,]{1,40}) ?\}\{ ?([\d.,]{1,40}) ?\}", r"\1/\2", r"\dfrac{3}{4}", "3/4"),
    Rewrite(r"\\[()\[\]]|\*\*|`", " ", r"\[ **18** \]", "   18   "),
    Rewrite(r"(?<!\w)_{1,2}(?=[\w$(-])|_{1,2}(?!\w)", " ", "__18__", " 18 "),
    Rewrite(r"(?<=-) ?[$€£¥₹]", "", "-$7", "-7"),
    Rewrite(r"[$€£¥₹]", " ", "$7", " 7"),
    Rewrite(r"(?<=\d) ?[×x*] ?10 ?\^ ?\{?([+-]?\d{1,3})\}?(?!\d)", r"e\1 ", "3 x 10^5", "3e5 "),
    Rewrite(r"(?<![\w.,])10 ?\^ ?\{?([+-]?\d{1,3})\}?(?!\d)", r"1e\1 ", "10^{6}", "1e6 "),
)
_COMPILED = [(re.compile(rewrite.pattern), rewrite.replacement) for rewrite in REWRITES]
_SAME_CHARACTER = str.maketrans("\u2212\u2013\ufe63\uff0d\u00a0\u202f\u2009", "----   ")  # minus signs, special spaces
_FRACTION_CHARACTER = re.compile("[¼½¾⅐-⅞]")


def normalize(text: str) -> str:
    """Return a text without Markdown emphasis, LaTeX wrappers and currency signs.

    Writes "½" as "1/2" and every minus sign as "-".
    """
    text = _FRACTION_CHARACTER.sub(_spell_fraction, text.translate(_SAME_CHARACTER))
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    return text


def _spell_fraction(match: re.Match[str]) -> str:
    fraction = unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/")
    follows_digit = match.string[match.start() - 1 : match.start()].isdigit()
    return f" {fraction}" if follows_digit else fraction
