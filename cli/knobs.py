"""Knobs: the fields of a dataclass as flags with a type, a default, a help text and, where there are any, choices."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass
from typing import Any

SWITCHED = ("false", "true")
EXPECTED = {str: "text", int: "a whole number", float: "a number", bool: "True or False"}


def knob(
    default: Any = MISSING,
    *,
    help: str,
    choices: Sequence[Any] | None = None,
    group: str | None = None,
    positional: bool = False,
    switch: tuple[str, str] | None = None,
) -> Any:
    """A dataclass field that is also a flag; without a `default` the flag is required.

    `group` is the heading it stands under in `--help`. A `positional` knob may be given without its name as well.
    `switch`: two of the choices, which may also be typed as False and as True; the flag alone means True, as of a bool.
    The field is keyword-only, so required knobs may follow optional ones (also in a dataclass built from several).
    A plain `dataclasses.field` whose metadata has some of these keys, or none, makes a flag just as well.
    """
    metadata = {"help": help, "choices": choices, "group": group, "positional": positional, "switch": switch}
    return dataclasses.field(default=default, kw_only=True, metadata=metadata)


@dataclass(frozen=True)
class Knob:
    """One flag, read off a dataclass field. `type` is str, int, float or bool; `optional`: None is a value too."""

    name: str
    type: type
    optional: bool
    default: Any
    help: str
    choices: tuple[Any, ...]
    group: str
    positional: bool
    switch: tuple[str, str] | None

    @property
    def takes_bare(self) -> bool:
        """The flag alone, without a value, means True."""
        return self.type is bool or self.switch is not None

    @property
    def required(self) -> bool:
        return self.default is MISSING

    def convert(self, text: str) -> Any:
        """The value that `text` stands for; ValueError names the flag, the value and what was expected."""
        if self.optional and text in ("None", "none") and text not in self.choices:
            return None
        if self.switch and text.lower() in SWITCHED:
            text = self.switch[SWITCHED.index(text.lower())]
        try:
            value = _convert(self.type, text)
        except ValueError:
            none = " or None" if self.optional else ""
            raise ValueError(f"--{self.name}: expected {EXPECTED[self.type]}{none}, got {_cut(text)}") from None
        if self.choices and value not in self.choices:
            listed = ", ".join(str(choice) for choice in self.choices)
            meant = nearest(text, map(str, self.choices))
            raise ValueError(f"--{self.name}: expected one of {listed}, got {_cut(text)} (nearest: {meant})")
        return value


def knobs_of(cls: type) -> list[Knob]:
    """The knobs of a dataclass, in the order of its fields."""
    assert dataclasses.is_dataclass(cls), f"{cls.__name__} is not a dataclass"
    hints = typing.get_type_hints(cls)
    return [_knob_of(cls, field, hints[field.name]) for field in dataclasses.fields(cls) if field.init]


def nearest(word: str, words: Iterable[str]) -> str:
    """The one of `words` (at least one) that is spelled most like `word`."""
    return difflib.get_close_matches(word, words, n=1, cutoff=0.0)[0]


def _knob_of(cls: type, field: dataclasses.Field, hint: Any) -> Knob:
    where = f"{cls.__name__}.{field.name}"
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    plain = [kind for kind in kinds if kind is not type(None)]
    assert len(plain) == 1 and plain[0] in EXPECTED, f"{where}: a flag cannot be of type {hint}"
    assert field.default_factory is MISSING, f"{where}: a flag needs a plain default"
    optional = len(plain) < len(kinds)
    choices = tuple(field.metadata.get("choices") or ())
    # Choices bind what a user types; an optional knob may be None beside them.
    allowed = not choices or field.default in (*choices, MISSING) or (optional and field.default is None)
    assert allowed, f"{where}: the default {field.default!r} is not among the choices"
    switch = field.metadata.get("switch")
    assert switch is None or set(switch) <= set(choices), f"{where}: {switch} are not among the choices"
    return Knob(
        name=field.name,
        type=plain[0],
        optional=optional,
        default=field.default,
        help=field.metadata.get("help") or "",
        choices=choices,
        group=field.metadata.get("group") or "flags",
        positional=bool(field.metadata.get("positional")),
        switch=switch,
    )


def _convert(kind: type, text: str) -> Any:
    if kind is bool:
        if text.lower() not in SWITCHED:
            raise ValueError(text)
        return text.lower() == "true"
    value = kind(text)
    # nan and inf are numbers to Python, but no rate, size or temperature.
    if kind is float and not math.isfinite(value):
        raise ValueError(text)
    return value


def _cut(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
