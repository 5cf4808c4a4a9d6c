"""HTML and SVG as text. Whatever is not `Html` is escaped, so that no text from a run can become markup."""

import re
import zlib
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

_VOID = {"meta", "link", "wbr", "use"}


class Html(str):
    """Markup that stands in a page as it is."""

    __slots__ = ()


Part = str | None  # of an element's content: markup as it is, other text escaped, None left out


def el(name: str, /, *content: Part, **attributes: object) -> Html:
    """An element. Underscores of attribute names become hyphens, one at the end goes ("class_"); attributes that are
    None or False are left out, one that is True has no value."""
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{escape(visible(_plain(value)))}"')
    if name in _VOID:
        return Html(f"<{' '.join(words)}>" if name != "use" else f"<{' '.join(words)}/>")
    return Html(f"<{' '.join(words)}>{join(content)}</{name}>")


def join(parts: Iterable[Part], between: str = "") -> Html:
    """Parts one after another."""
    return Html(between.join(part if isinstance(part, Html) else escape(visible(part)) for part in parts if part))


def _plain(value: object) -> str:
    """Coordinates need no more than two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def visible(text: str) -> str:
    """A text as readers can see it: control characters, marks that change the direction of writing, halves of
    surrogate pairs and whatever else has no look of its own are spelt as Python spells them; lines and tabs stay."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() or one in "\n\t" else _spelt(one) for one in text)


def _spelt(one: str) -> str:
    # Line separators, no-break and thin spaces are spaces, though not "printable"
    return " " if one.isspace() and ord(one) > 0x7F else one.encode("unicode_escape").decode()


def cut(text: str, length: int) -> tuple[str, str]:
    """A text's first `length` characters, and a note on how many more there are ("" where there are none)."""
    more = len(text) - length
    return (text, "") if more <= 0 else (text[:length], f"{more:,} more characters are not shown")


class Column(NamedTuple):
    """A column of a table. number: its cells are numbers, set to the right."""

    head: str
    number: bool = False


def table(caption: str, columns: Sequence[Column], rows: Iterable[Sequence[Part]]) -> Html:
    """A table in a box that scrolls by itself where it is too wide. The first cell of each row is its header."""
    head = [el("th", column.head, scope="col", class_="number" if column.number else None) for column in columns]
    body = []
    for row in rows:
        assert len(row) == len(columns), (caption, row)
        cells = [el("th", _breakable(row[0]), scope="row")]
        cells += [
            el("td", cell, class_="number" if column.number else None)
            for cell, column in zip(row[1:], columns[1:], strict=True)
        ]
        body.append(el("tr", *cells))
    content = el("table", el("caption", el("span", caption)), el("thead", el("tr", *head)), el("tbody", *body))
    return el("div", content, class_="scroll", role="group", aria_label=caption, tabindex=0)


def _breakable(name: Part) -> Part:
    """A name that a narrow column breaks behind an underscore rather than anywhere."""
    if name is None or isinstance(name, Html):
        return name
    first, *others = name.split("_")
    return join([first, *(join(["_", el("wbr"), other]) for other in others)])


def folded(summary: Part, *content: Part) -> Html:
    """Content that the reader opens."""
    return el("details", el("summary", summary), *content)


def listed(items: Iterable[Part], class_: str | None = None) -> Html:
    return el("ul", *(el("li", item) for item in items), class_=class_)


def identity(text: str) -> str:
    """An id made from a text: the same from the same."""
    readable = re.sub(r"[^a-z0-9]+", "-", text.lower())[:60].strip("-")
    return f"{readable or 'x'}-{zlib.crc32(text.encode('utf-8', 'backslashreplace')):08x}"
