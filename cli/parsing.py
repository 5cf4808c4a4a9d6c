"""From the words of a command line to dataclasses. All that is wrong with a line is said at once, before any work.

The words are split here and not by `fire`: it runs the function first and complains after, lets the last of two equal
flags win, reads `--nox` as `--x False`, gives `-` and `--` meanings of its own, and turns `Q,K,V` into a tuple.
"""

import os
import re
import sys
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, TypeVar

from cli.exits import fail
from cli.helptext import help_text
from cli.knobs import SWITCHED, Knob, knobs_of, nearest

T = TypeVar("T")

# A word that begins with a dash and is a value all the same: `--lr -1`, `--blr -6e-3`, `--bias -.5`, `--save_path -`.
DASHED_VALUE = re.compile(r"-(\.?\d.*)?")


class Parsed(NamedTuple):
    """`values`: one instance per dataclass, in the order asked for. `given`: the names of the flags that were typed."""

    values: list[Any]
    given: frozenset[str]


def first_word(argv: Sequence[str], words: Collection[str], overview: str, *, where: str = "the first word") -> str:
    """The command that a line begins with, of `words`. `--help` in its place prints the overview, exit 0; anything else
    is an error that says `where` the word was to stand, exit 2."""
    if list(argv[:1]) in (["--help"], ["-h"]):
        print(overview.strip())
        raise SystemExit(0)
    if not argv or argv[0] not in words:
        found = f"not {argv[0]!r}" if argv else "nothing was given"
        fail(f"{where} must be one of {', '.join(words)}: {found}", status=2)
    return argv[0]


def parse(cls: type[T], argv: Sequence[str] | None = None, *, prog: str | None = None, description: str = "") -> T:
    """An instance of the dataclass `cls` from `argv` (None: this process's); see `parse_into`."""
    return parse_into([cls], argv, prog=prog, description=description).values[0]


def parse_into(
    classes: Sequence[type], argv: Sequence[str] | None = None, *, prog: str | None = None, description: str = ""
) -> Parsed:
    """Instances of several dataclasses that share one command line; their field names must not clash.

    Whatever is wrong (unknown flag, bad value, flag given twice, missing flag, a ValueError of a dataclass's own
    `__post_init__`) is printed as `error: ...` on stderr, with exit status 2. `--help` prints all flags, exit 0.
    """
    owned = [knobs_of(cls) for cls in classes]
    knobs = [knob for part in owned for knob in part]
    names = [knob.name for knob in knobs]
    assert len(set(names)) == len(names), f"flags that clash: {sorted({n for n in names if names.count(n) > 1})}"
    assert names and not {"help", "h"} & set(names), "--help is taken, and there must be a flag"
    argv = sys.argv[1:] if argv is None else argv
    prog = prog or os.path.basename(sys.argv[0])
    if "--help" in argv or "-h" in argv:
        print(help_text(knobs, prog, description))
        raise SystemExit(0)

    line = _Line(knobs)
    line.read(list(argv))
    values: list[Any] = []
    if not line.problems:
        for cls, part in zip(classes, owned, strict=True):
            try:
                values.append(cls(**{knob.name: line.found[knob.name] for knob in part if knob.name in line.found}))
            except ValueError as error:
                line.problems.append(str(error))
    if line.problems:
        fail("\nerror: ".join(line.problems) + f"\n`{prog} --help` lists the flags.", status=2)
    return Parsed(values, frozenset(line.found))


class _Line:
    """One command line: `found` maps the names of the typed flags to their values, `problems` lists what is wrong."""

    def __init__(self, knobs: Sequence[Knob]) -> None:
        self.knobs = {knob.name: knob for knob in knobs}
        self.free = [knob for knob in knobs if knob.positional]
        self.seen: set[str] = set()
        self.found: dict[str, Any] = {}
        self.problems: list[str] = []

    def read(self, words: list[str]) -> None:
        """Take every word, then miss what is required."""
        while words:
            word = words.pop(0)
            if _is_flag(word):
                self._flag(word, words)
            else:
                self._argument(word)
        for knob in self.knobs.values():
            if knob.required and knob.name not in self.seen:
                self.problems.append(f"--{knob.name} is required: {knob.help}")

    def _flag(self, word: str, rest: list[str]) -> None:
        name, equals, text = word.removeprefix("--").partition("=")
        knob = self.knobs.get(name)
        if knob is None:
            if not equals and rest and not _is_flag(rest[0]):
                rest.pop(0)  # most likely the unknown flag's value, and not worth a second complaint
            self.problems.append(self._unknown(word.partition("=")[0]))
        elif equals:
            self._set(knob, text)
        elif knob.takes_bare and not self._takes_next(knob, rest):
            self._set(knob, "True")
        elif rest and not _is_flag(rest[0]):
            self._set(knob, rest.pop(0))
        else:
            self.seen.add(name)
            dashed = f" (write --{name}=VALUE if it begins with a dash)" if rest and rest[0][:2] != "--" else ""
            self.problems.append(f"--{name} needs a value{dashed}")

    def _takes_next(self, knob: Knob, rest: list[str]) -> bool:
        """Whether the word after a flag that may stand alone is its value, and not the argument that some commands
        take."""
        if not rest or _is_flag(rest[0]):
            return False
        return not self.free or rest[0].lower() in SWITCHED or rest[0] in knob.choices

    def _argument(self, word: str) -> None:
        if self.free:
            self._set(self.free[0], word)
        else:
            near = nearest(word.partition("=")[0], self.knobs)
            self.problems.append(f"unexpected argument {word!r} (values follow their flag; nearest flag: --{near})")

    def _set(self, knob: Knob, text: str) -> None:
        if knob.positional and knob in self.free:
            self.free.remove(knob)
        if knob.name in self.seen:
            self.problems.append(f"--{knob.name} is given twice")
            return
        self.seen.add(knob.name)
        try:
            self.found[knob.name] = knob.convert(text)
        except ValueError as error:
            self.problems.append(str(error))

    def _unknown(self, flag: str) -> str:
        name = flag.lstrip("-")
        negated = self.knobs.get(re.sub("^no[_-]?", "", name))
        if negated is not None and negated.takes_bare:
            return f"unknown flag {flag}; write --{negated.name} False"
        return f"unknown flag {flag}; the nearest is --{nearest(name, self.knobs)}"


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not DASHED_VALUE.fullmatch(word)
