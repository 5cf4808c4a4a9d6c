"""How methods are told apart in figures: colour, dashes and the shape of marks, so that colour is never alone."""

from typing import NamedTuple

from inspection.page.markup import Html, Part, el, listed

COLOURS = 7  # of Okabe and Ito's palette; its yellow is too faint on white. In style.py as --c0 to --c6
_DASHES = ("none", "7 3", "2 2.5", "9 3 2 3")
_SHAPES = (
    "M-4 0A4 4 0 1 0 4 0A4 4 0 1 0 -4 0Z",  # circle
    "M-3.6 -3.6H3.6V3.6H-3.6Z",  # square
    "M0 -4.6L4.4 3.4H-4.4Z",  # triangle
    "M0 -5L4.6 0L0 5L-4.6 0Z",  # diamond
    "M0 4.6L4.4 -3.4H-4.4Z",  # triangle on its point
    "M-1.6 -4.6H1.6V-1.6H4.6V1.6H1.6V4.6H-1.6V1.6H-4.6V-1.6H-1.6Z",  # plus
    "M0 -5L1.3 -1.6L4.8 -1.5L2 0.7L3 4.2L0 2.2L-3 4.2L-2 0.7L-4.8 -1.5L-1.3 -1.6Z",  # star
)


class Style(NamedTuple):
    """The look of a method's lines and marks; unlike any other's of the first 28 lines, of the first 14 marks."""

    colour: int
    dash: str
    shape: str
    hollow: bool

    @property
    def classes(self) -> str:
        return f"c{self.colour}"

    def mark(self, x: float, y: float, size: float = 1.0, told: str = "") -> Html:
        """The mark at a place; told: what a pointer over it shows."""
        place = f"translate({x:.1f} {y:.1f})" + ("" if size == 1.0 else f" scale({size:g})")
        kind = f"mark {self.classes}" + (" hollow" if self.hollow else "")
        return el("path", el("title", told) if told else None, d=self.shape, transform=place, class_=kind)


def style(index: int) -> Style:
    """The look of the method with that number, from 0."""
    turn = index // COLOURS
    return Style(index % COLOURS, _DASHES[index % len(_DASHES)], _SHAPES[index % len(_SHAPES)], turn % 2 == 1)


PLAIN = style(0)
PUBLISHED, ROBUST = Style(0, _DASHES[0], _SHAPES[0], False), Style(1, _DASHES[1], _SHAPES[1], True)


def legend(entries: list[tuple[str, Style]], lines: bool = False) -> Html:
    """Which look is whose; lines: with a piece of the line."""

    def swatch(look: Style) -> Html:
        line = el("path", d="M1 8H33", class_=f"line {look.classes}", stroke_dasharray=look.dash) if lines else None
        return el("svg", line, look.mark(17, 8), viewBox="0 0 34 16", width=34, height=16, aria_hidden="true")

    return listed([_entry(swatch(look), name) for name, look in entries], class_="legend")


def _entry(swatch: Html, name: Part) -> Html:
    return Html(swatch + el("span", name))
