"""HTML pages from Jinja2 templates, in which no text from a file or a model can become markup."""

from pathlib import Path
from typing import Any


def visible(text: str) -> str:
    """Spell characters that have no look of their own as Python does: control characters, marks that turn the
    direction of writing, halves of surrogate pairs. Lines and tabs stay."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char in "\n\t" else _spell(char) for char in text)


def _spell(char: str) -> str:
    # Line separators, no-break and thin spaces are spaces, though not "printable"
    return " " if char.isspace() and ord(char) > 0x7F else char.encode("unicode_escape").decode()


def render(template: str, **values: Any) -> str:
    """The page of a template beside this file. Every text in it is escaped and made visible. ValueError where Jinja2
    is not installed."""
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
    return environment.get_template(template).render(values)


def write_page(path: Path, page: str) -> None:
    """Write a page whole or not at all."""
    from moa.files import atomic_write

    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, page.encode("utf-8", "backslashreplace"))
