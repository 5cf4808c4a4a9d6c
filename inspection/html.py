"""HTML pages from Jinja2 templates, in which no text from a file or a model can become markup."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moa.files import atomic_write


class Table(NamedTuple):
    """A table of texts, which may have several lines. The first cell of a row is its header."""

    caption: str
    head: Sequence[str]
    rows: list[list[str]]


def visible(text: str) -> str:
    """Spell characters that have no look of their own as Python does: control characters, marks that turn the
    direction of writing, halves of surrogate pairs. Every kind of space becomes a plain one; lines and tabs stay."""
    shown = (c if c.isprintable() or c in "\n\t" else " " if c.isspace() else repr(c)[1:-1] for c in text)
    return text if text.isprintable() else "".join(shown)


def write_page(path: Path, template: str, **values: Any) -> None:
    """Fill a template beside this file. Every text in it is escaped and made visible. ValueError where Jinja2 is not
    installed."""
    try:
        import jinja2
    except ImportError:
        raise ValueError("HTML needs jinja2, which is not installed (requirements-dev.txt names it)") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    page = environment.get_template(template).render(values)
    atomic_write(path, page.encode("utf-8", "backslashreplace"))
