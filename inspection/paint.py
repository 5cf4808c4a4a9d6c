"""A row that was looked at, on a terminal and as an HTML page: in colours, with a number for those who see none."""

from html import escape
from typing import TYPE_CHECKING

from inspection.colours import colour, ink, web
from inspection.page.markup import Html, el, join, visible

if TYPE_CHECKING:
    from inspection.row import Look, View

RESET = "\x1b[0m"


def number(view: "View", value: float) -> str:
    return f"{value:.0f}" if view.whole else f"{value:.2f}"


def plain(token: str) -> str:
    """A token's text in one line: a line's end and a tab as signs, other things without a look of their own spelt."""
    return visible(token.replace("\r", "").replace("\n", "\u21b5").replace("\t", "\u21e5"))


def terminal(look: "Look", coloured: bool) -> str:
    """All views, one below the other."""
    lines = []
    for view in look.views:
        lines += [
            f"{look.method}: {view.title}",
            _legend(view) if coloured else f"[number behind each token, {view.least:g} to {view.most:g}]",
        ]
        for name, begin, end in (("prompt", 0, look.prompt_len), ("answer", look.prompt_len, len(look.tokens))):
            lines += [f"{name}:", _coloured(look, view, begin, end, coloured)]
        lines.append("")
    return "\n".join(lines)


def _coloured(look: "Look", view: "View", begin: int, end: int, coloured: bool) -> str:
    parts = []
    for token, value in zip(look.tokens[begin:end], view.values[begin:end], strict=True):
        shown = _on_colour(plain(token), view.share(value)) if coloured else f"{plain(token)}[{number(view, value)}]"
        parts.append(shown + "\n" * token.count("\n"))
    return "".join(parts).rstrip("\n")


def _on_colour(text: str, share: float) -> str:
    back = colour(share)
    codes = ";".join(map(str, (48, 2, *back, 38, 2, *ink(back))))
    return f"\x1b[{codes}m{text}{RESET}"


def _legend(view: "View") -> str:
    return "".join(_on_colour(f" {number(view, value)} ", view.share(value)) for value in view.marks())


STYLE = """
body { font: 1rem/1.5 system-ui, sans-serif; margin: 1rem auto; max-width: 50rem; padding: 0 1rem; color: #111;
  background: #fff }
h1 { font-size: 1.3rem } h2 { font-size: 1.1rem; margin-top: 2rem } h3 { font-size: 1rem; margin: .8rem 0 .2rem }
.text { font: .95rem/1.9 ui-monospace, monospace; overflow-wrap: anywhere }
.text span { padding: .15em 0; white-space: pre-wrap }
.legend span { display: inline-block; padding: .1rem .5rem; font-size: .85rem }
table { border-collapse: collapse; font-size: .9rem } th, td { padding: .1rem .8rem .1rem 0; text-align: left }
td.n { text-align: right; font-variant-numeric: tabular-nums }
"""


def page(look: "Look") -> str:
    """A page that needs no other file. A token tells its number when it is pointed at; a table below has them all."""
    title = f"A row through {look.method}"
    body = join([el("h1", title), *(_section(look, view, i) for i, view in enumerate(look.views)), _table(look)])
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body><main>{body}</main></body></html>\n'


def _section(look: "Look", view: "View", i: int) -> Html:
    marks = [_span(number(view, value), view.share(value), None) for value in view.marks()]
    parts = [el("h2", view.title, id=f"view{i}"), el("p", "Scale: ", *marks, class_="legend")]
    for name, begin, end in (("Prompt", 0, look.prompt_len), ("Answer", look.prompt_len, len(look.tokens))):
        spans = []
        for token, value in zip(look.tokens[begin:end], view.values[begin:end], strict=True):
            spans.append(_span(plain(token), view.share(value), number(view, value)))
            spans += [Html("<br>")] * token.count("\n")
        parts += [el("h3", name), el("p", *spans, class_="text")]
    return el("section", *parts, aria_labelledby=f"view{i}")


def _span(text: str, share: float, title: str | None) -> Html:
    back = colour(share)
    look = f"background:{web(back)};color:{web(ink(back))}"
    return el("span", text, style=look, title=title)


def _table(look: "Look") -> Html:
    heads = ["token", "of", *(view.title for view in look.views)]
    rows = [el("tr", *(el("th", head, scope="col") for head in heads))]
    for i, token in enumerate(look.tokens):
        cells = [el("td", plain(token)), el("td", "prompt" if i < look.prompt_len else "answer")]
        cells += [el("td", number(view, view.values[i]), class_="n") for view in look.views]
        rows.append(el("tr", *cells))
    return el("details", el("summary", "All numbers"), el("table", *rows))
