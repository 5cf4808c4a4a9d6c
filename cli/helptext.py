"""The text of `--help`."""

import textwrap
from collections.abc import Sequence

from cli.knobs import Knob

WIDTH = 100
COLUMN = 32  # where the help texts begin


def help_text(knobs: Sequence[Knob], prog: str, description: str = "") -> str:
    """Usage, description and every knob, group by group in order of first appearance; at most 100 columns."""
    named = [knob for knob in knobs if not knob.positional]
    words = [knob.name.upper() if knob.required else f"[{knob.name.upper()}]" for knob in knobs if knob.positional]
    words += [f"--{knob.name} {knob.type.__name__.upper()}" for knob in named if knob.required]
    words += ["[flags]"] if any(not knob.required for knob in named) else []
    usage = f"usage: {prog} {' '.join(words)}"
    blocks = [textwrap.fill(usage, WIDTH, subsequent_indent="    ", break_on_hyphens=False)]
    blocks += [_paragraph(text) for text in description.strip().split("\n\n") if text]
    groups: dict[str, list[str]] = {}
    for knob in knobs:
        groups.setdefault("arguments" if knob.positional else knob.group, []).append(_entry(knob))
    blocks += ["\n".join([f"{group}:", *entries]) for group, entries in groups.items()]
    return "\n\n".join(blocks)


def _paragraph(text: str) -> str:
    """Prose is filled; a paragraph with indented lines (an example) stays as it is."""
    is_example = any(line.startswith(" ") for line in text.splitlines())
    return text if is_example else textwrap.fill(text, WIDTH, break_on_hyphens=False)


def _entry(knob: Knob) -> str:
    kind = "True|False" if knob.type is bool else knob.type.__name__
    kind = f"[{kind}]" if knob.takes_bare else kind  # in brackets, for `--x` alone means True
    left = f"  {knob.name.upper() if knob.positional else '--' + knob.name} {kind}"
    # What leaving out an optional flag means, its own text says
    unset = knob.optional and knob.default is None
    notes = ["required"] if knob.required else [] if unset else [f"default: {_shown(knob.default)}"]
    if knob.choices:
        notes.insert(0, f"one of {', '.join(str(choice) for choice in knob.choices)}")
    text = (knob.help + (f" ({'; '.join(notes)})" if notes else "")).strip()
    lines = textwrap.wrap(text, WIDTH - COLUMN, break_on_hyphens=False)
    if len(left) < COLUMN - 1:
        lines[0] = left.ljust(COLUMN) + lines[0]
    else:
        lines.insert(0, left)
    return "\n".join([lines[0], *(" " * COLUMN + line for line in lines[1:])])


def _shown(default: object) -> str:
    return str(default) if default != "" else "''"
