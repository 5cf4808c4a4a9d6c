"""Command lines from dataclasses: every field is a flag, and no work begins before every flag is right.

    @dataclass
    class Flags:
        input: str = flag(help="folder with config.json")
        dtype: str = flag("bf16", help="type of the written tensors", choices=("bf16", "fp32"))

    flags = parse(Flags, prog="python -m convert hf", description="...")

`fire` reads the words and calls a function that only checks them and builds the dataclasses. Every value reaches it as
text, so `Q,K,V` is no tuple and a path `2024` no number. All that is wrong with a line is named at once.
"""

import dataclasses
import difflib
import math
import os
import re
import select
import sys
import textwrap
import typing
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass
from functools import partial
from inspect import Parameter, Signature
from itertools import pairwise
from types import NoneType
from typing import Any, NamedTuple, NoReturn, TypeVar

import fire

T = TypeVar("T")

SWITCHED = ("false", "true")
EXPECTED = {str: "text", int: "a whole number", float: "a number", bool: "True or False"}
NAMED = re.compile("--|-[a-zA-Z]")  # how a word begins that is a flag to fire; `-`, `-1` and `-.5` are values
NO_VALUE = "\0"  # the value of a flag that stands alone; no word of a shell can hold it
COLUMN = 32  # where the help texts of --help begin; its lines end at column 100
OUT_OF_MEMORY = re.compile("out ?of ?memory|_STATUS_ALLOC_FAILED|DefaultCPUAllocator", re.IGNORECASE)

_fill = partial(textwrap.fill, break_on_hyphens=False)


@dataclass(frozen=True)
class Flag:
    """One flag, read off a dataclass field. `type` is str, int, float or bool; `optional`: None is a value too."""

    name: str
    type: type
    optional: bool
    default: Any
    help: str = ""
    choices: Sequence[Any] = ()
    group: str = "flags"
    positional: bool = False
    switch: tuple[str, str] | None = None
    least: float | None = None
    above: float | None = None

    @property
    def is_switch(self) -> bool:
        """Whether the flag alone, without a value, means True."""
        return self.type is bool or self.switch is not None

    def convert(self, text: str) -> Any:
        """Return the value that `text` stands for; ValueError names the flag, the value and what was expected."""
        if text == NO_VALUE and not self.is_switch:
            raise ValueError(f"--{self.name} needs a value (write --{self.name}=VALUE if it begins with a dash)")
        text = "True" if text == NO_VALUE else text
        if self.optional and text in ("None", "none") and text not in self.choices:
            return None
        if self.switch and text.lower() in SWITCHED:
            text = self.switch[SWITCHED.index(text.lower())]
        try:
            value = SWITCHED.index(text.lower()) == 1 if self.type is bool else self.type(text)
        except ValueError:
            value = None
        # nan and inf are numbers to Python, but no rate, size or temperature
        is_value = value is not None and (self.type is not float or math.isfinite(value))
        if is_value and (value in self.choices or not self.choices):
            if self.least is not None and value < self.least:
                raise ValueError(f"--{self.name} must be at least {self.least}, not {value}")
            if self.above is not None and value <= self.above:
                raise ValueError(f"--{self.name} must be above {self.above}, not {value}")
            return value
        words = [str(choice) for choice in self.choices]
        expected = f"one of {', '.join(words)}" if words else EXPECTED[self.type] + " or None" * self.optional
        near = f" (nearest: {nearest(text, words)})" if words else ""
        short = text if len(text) <= 60 else text[:57] + "..."
        raise ValueError(f"--{self.name}: expected {expected}, got {short!r}{near}")


def flag(
    default: Any = MISSING,
    *,
    help: str,
    choices: Sequence[Any] | None = None,
    group: str | None = None,
    positional: bool = False,
    switch: tuple[str, str] | None = None,
    least: float | None = None,
    above: float | None = None,
) -> Any:
    """Make a dataclass field that is a flag; without a `default` the flag is required.

    group: the heading it stands under in `--help`. positional: it may be given without its name as well.
    switch: two of the choices that may also be typed as False and as True; the flag alone means True.
    least, above: bounds of a number that is typed.
    """
    metadata = {"help": help, "choices": choices, "group": group, "positional": positional, "switch": switch}
    metadata |= {"least": least, "above": above}
    return dataclasses.field(
        default=default, kw_only=True, metadata=metadata
    )  # required flags may follow optional ones


def flags_of(cls: type) -> list[Flag]:
    """List the flags of a dataclass, in the order of its fields."""
    hints, flags = typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        types = [t for t in typing.get_args(hint) if t is not NoneType] or [hint]
        assert types[0] in EXPECTED and len(types) == 1, f"{cls.__name__}.{field.name}: a flag cannot be of type {hint}"
        metadata = {key: value for key, value in field.metadata.items() if value is not None}
        flags.append(Flag(field.name, types[0], NoneType in typing.get_args(hint), field.default, **metadata))
    return flags


def nearest(word: str, words: Iterable[str]) -> str:
    """Return the one of `words` (at least one) that is spelled most like `word`."""
    return difflib.get_close_matches(word, words, n=1, cutoff=0.0)[0]


class Parsed(NamedTuple):
    """`values`: one instance per dataclass, in the order of the classes. `given`: the names of the typed flags."""

    values: list[Any]
    given: frozenset[str]


def subcommand(argv: Sequence[str], words: Collection[str], overview: str) -> str:
    """Return the command that a line begins with, one of `words`. `--help` in its place prints the overview, exit 0."""
    if list(argv[:1]) in (["--help"], ["-h"]):
        _print_and_exit(overview.strip())
    if not argv or argv[0] not in words:
        problem = f"not {argv[0]!r}" if argv else "nothing was given"
        die(f"the first word must be one of {', '.join(words)}: {problem}", 2)
    return argv[0]


def parse(cls: type[T], argv: Sequence[str] | None = None, *, prog: str | None = None, description: str = "") -> T:
    """Return an instance of the dataclass `cls` from `argv` (None: this process's); see `parse_into`."""
    return parse_into([cls], argv, prog=prog, description=description).values[0]


def parse_into(
    classes: Sequence[type], argv: Sequence[str] | None = None, *, prog: str | None = None, description: str = ""
) -> Parsed:
    """Return instances of several dataclasses that share one command line; their field names must not clash.

    Whatever is wrong (unknown flag, bad value, flag given twice, missing flag, a ValueError of a dataclass's own
    `__post_init__`) is printed as `error: ...` on stderr, with exit status 2. `--help` prints all flags, exit 0.
    """
    owned = [flags_of(cls) for cls in classes]
    flags = {flag.name: flag for part in owned for flag in part}
    assert len(flags) == sum(map(len, owned)), f"flags of {classes} clash: {[[f.name for f in part] for part in owned]}"
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = prog or os.path.basename(sys.argv[0])
    if {"--help", "-h"} & set(argv):
        _print_and_exit(_help(list(flags.values()), prog, description))
    problems: list[str] = []
    completion = ["--completion"] if argv == ["--", "--completion"] else []
    words = [] if completion else _without_traps(argv, flags, problems)

    def build(*arguments: str, **texts: str) -> Parsed:
        values, instances = _convert(flags, arguments, texts, problems), []
        for cls, part in [] if problems else zip(classes, owned, strict=True):
            try:
                instances.append(cls(**{flag.name: values[flag.name] for flag in part if flag.name in values}))
            except ValueError as error:
                problems.append(str(error))
        return Parsed(instances, frozenset(values))

    # The names serve completion. As build takes any name and any words, fire has nothing to refuse or to look up.
    named = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in flags]
    arguments, texts = Parameter("_arguments", Parameter.VAR_POSITIONAL), Parameter("_texts", Parameter.VAR_KEYWORD)
    build.__signature__ = Signature([arguments, *named, texts])
    parsed = fire.Fire(
        fire.decorators.SetParseFn(str)(build),
        command=[*words, "--", *completion, "--separator", NO_VALUE],  # without one, `-` would be it
        name=prog.split()[-1],
        # A text is the completion script; a Parsed is not for printing.
        serialize=lambda result: _print_and_exit(_for_python(result, prog)) if isinstance(result, str) else None,
    )
    if problems:
        die("\nerror: ".join(problems) + f"\n`{prog} --help` lists the flags.", 2)
    return parsed


def _without_traps(argv: list[str], flags: dict[str, Flag], problems: list[str]) -> list[str]:
    """Rewrite what fire would misread. What is wrong is added to `problems`.

    Fire lets the last of two equal flags win, reads `--data_path` without a value as True and `--nox` as x=False, and
    takes what follows `--` for itself.
    """
    if "--" in argv:
        count = argv.index("--")
        problems.append(f"unexpected {' '.join(argv[count:])!r}: only --completion may stand behind --")
        argv = argv[:count]
    line, names, arguments = [], [], any(flag.positional for flag in flags.values())
    for word, after in pairwise([*argv, "--"]):
        if re.match("--+(=|$)", word):
            problems.append(f"unknown flag {word}")
            continue
        if NAMED.match(word):
            names.append(word.lstrip("-").partition("=")[0].replace("-", "_"))
            flag, has_value = flags.get(names[-1]), not NAMED.match(after)
            if flag and flag.is_switch and arguments:
                has_value = after.lower() in SWITCHED or after in flag.choices  # else it is an argument
            word = word if "=" in word or has_value else f"{word}={NO_VALUE}"
        line.append(word)
    problems += [f"--{name} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    return line


def _convert(flags: dict[str, Flag], arguments: Sequence[str], texts: dict[str, str], problems: list[str]) -> dict:
    """Return the value of every typed flag by name. What is wrong, or missing, is added to `problems`."""
    values, positional = {}, [name for name, flag in flags.items() if flag.positional]
    pairs = [*texts.items(), *zip(positional, arguments, strict=False)]
    for word in arguments[len(positional) :]:
        near = nearest(word.partition("=")[0], flags)
        problems.append(f"unexpected argument {word!r} (values follow their flag; nearest flag: --{near})")
    for name, text in pairs:
        positive = re.sub("^no_?", "", name)
        if name not in flags:
            is_negation = positive in flags and flags[positive].is_switch
            hint = f"write --{positive} False" if is_negation else f"the nearest is --{nearest(name, flags)}"
            problems.append(f"unknown flag --{name}; {hint}")
        elif name in values:
            problems.append(f"--{name} is given twice")
        else:
            try:
                values[name] = flags[name].convert(text)
            except ValueError as error:
                problems.append(str(error))
    missing = [flag for flag in flags.values() if flag.default is MISSING and flag.name not in dict(pairs)]
    problems += [f"--{flag.name} is required: {flag.help}" for flag in missing]
    return values


def _for_python(script: str, prog: str) -> str:
    """Bind fire's completion script to `python` and `torchrun`, as no program is called by its own name alone.

    Flags are offered with underscores, as they are documented, wherever the words of `prog` stand on the line.
    """
    words = prog.removeprefix("python ")
    script = re.sub(r"--[a-z]\w*(-\w+)+", lambda match: "--" + match[0][2:].replace("-", "_"), script)
    condition = f'[[ " ${{COMP_WORDS[*]}} " == *[\\ /]"{words} "* ]] && lastcommand={words.split()[-1]}'
    script = script.replace("lastcommand=$(get_lastcommand)", condition)
    return re.sub("^complete -F", "complete -o default -F", script.rstrip(), flags=re.MULTILINE) + " python torchrun"


def _help(flags: Sequence[Flag], prog: str, description: str) -> str:
    """Return usage, description and all flags, group by group in order of first appearance; at most 100 columns."""
    usage, groups = [prog], {}
    for flag in sorted(flags, key=lambda flag: not flag.positional):
        if flag.positional or flag.default is MISSING:
            word = flag.name.upper() if flag.positional else f"--{flag.name} {flag.type.__name__.upper()}"
            usage.append(word if flag.default is MISSING else f"[{word}]")
        groups.setdefault("arguments" if flag.positional else flag.group, []).append(_help_entry(flag))
    # Prose is filled; a paragraph with indented lines (an example) stays as it is
    prose = [
        text if "\n " in f"\n{text}" else _fill(text, width=100) for text in description.strip().split("\n\n") if text
    ]
    blocks = ["\n".join([f"{group}:", *entries]) for group, entries in groups.items()]
    line = f"usage: {' '.join(usage)} [flags]"
    end = f"Tab completion in bash: source <(python {prog.removeprefix('python ')} -- --completion)"
    return "\n\n".join([_fill(line, width=100, subsequent_indent="    "), *prose, *blocks, end])


def _help_entry(flag: Flag) -> str:
    kind = "True|False" if flag.type is bool else flag.type.__name__
    kind = f"[{kind}]" if flag.is_switch else kind  # in brackets: the flag alone means True
    left = f"  {flag.name.upper() if flag.positional else '--' + flag.name} {kind}"
    notes = [f"one of {', '.join(map(str, flag.choices))}"] if flag.choices else []
    if flag.default not in (None, ""):  # what leaving out such a flag means, its own text says
        notes.append("required" if flag.default is MISSING else f"default: {flag.default}")
    text = _fill(flag.help + (f" ({'; '.join(notes)})" if notes else ""), width=100 - COLUMN)
    lines = textwrap.indent(text, " " * COLUMN)
    return f"{left}\n{lines}" if len(left) > COLUMN - 2 else left.ljust(COLUMN) + lines.lstrip()


def _print_and_exit(text: str) -> NoReturn:
    with cli_errors():
        print(text)
    raise SystemExit(0)


def die(message: str, status: int = 1) -> NoReturn:
    """Print `error: message` on stderr and exit with `status` (2 for flags, 1 for the rest).

    Control characters, in a file's name say, are escaped: a terminal would obey them.
    """
    escaped = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)
    print(f"error: {escaped}", file=sys.stderr, flush=True)
    raise SystemExit(status)


@contextmanager
def cli_errors(status: int = 1, memory_advice: str = "") -> Iterator[None]:
    """Turn ValueError, OSError and lack of memory into `error: ...` with exit `status`, Ctrl-C into exit status 130.

    `memory_advice` ends the message about lack of memory. A reader of stdout that has gone (`| head`) ends the command
    quietly, status 141. Other exceptions are faults of the program and keep their traceback.
    """
    stdout = select.poll()
    stdout.register(1, 0)
    try:
        yield
        print(end="", flush=True)
    except KeyboardInterrupt:
        die("interrupted", 130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and stdout.poll(0):  # its reader has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is left to write
            raise SystemExit(141) from None
        message = str(error) or type(error).__name__
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            message = f"{error.filename}: {error.strerror}"
        elif out_of_memory(error):
            message = f"out of memory: {message.splitlines()[0].rstrip('.')}"
            message += f"; {memory_advice}" if memory_advice else ""
        elif isinstance(error, RuntimeError):
            raise
        die(message, status)


def out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: Python's own error, or torch's for a GPU or the CPU, known by its text."""
    is_torch = isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(f"{type(error).__name__}: {error}") is not None
    return is_torch or isinstance(error, MemoryError)
