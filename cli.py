"""Command lines from dataclasses: every field is a flag, and no work begins before every flag is right.

    @dataclass
    class Flags:
        input: str = flag(help="folder with config.json")
        dtype: str = flag("bf16", help="type of the written tensors", choices=("bf16", "fp32"))

    flags = parse(Flags, prog="python -m convert hf", description="...")

`fire` calls a function that only converts texts and builds the dataclasses. Every value reaches it as text, so `Q,K,V`
is no tuple and a path `2024` no number. All that is wrong with a line is named at once.
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
from inspect import Parameter, Signature
from types import NoneType
from typing import Any, NamedTuple, NoReturn, TypeVar

import fire

T = TypeVar("T")

EXPECTED = {str: "text", int: "a whole number", float: "a number", bool: "True or False"}
NO_VALUE = "\0"  # the value of a flag that stands alone; no word of a shell can hold it
IS_FLAG = re.compile("--|-[a-zA-Z]")  # how a flag begins; `-`, `-1` and `-.5` are values
COLUMN = 32  # where the help texts of --help begin; its lines end at column 100
OUT_OF_MEMORY = re.compile("out ?of ?memory|_STATUS_ALLOC_FAILED|DefaultCPUAllocator", re.IGNORECASE)


@dataclass(frozen=True)
class Flag:
    """One flag, read off a dataclass field. `type` is str, int, float or bool; `optional`: None is a value too.

    group: the heading it stands under in `--help`. positional: it may be given without its name as well.
    alone: what the flag means without a value; a bool's is True. least, above: bounds of a number that is typed.
    none: a word that stands for None.
    """

    name: str
    type: type
    optional: bool
    default: Any
    help: str = ""
    choices: Sequence[Any] | None = None
    group: str | None = None
    positional: bool = False
    alone: str | None = None
    least: float | None = None
    above: float | None = None
    none: str = "None"

    def convert(self, text: str) -> Any:
        """Return the value that `text` stands for; ValueError names the flag, the value and what was expected."""
        if text == NO_VALUE:
            if self.alone is None:
                raise ValueError(f"--{self.name} needs a value (write --{self.name}=VALUE if it begins with a dash)")
            text = self.alone
        choices = self.choices or ()
        if self.optional and text in ("None", "none", self.none) and text not in choices:
            return None
        try:
            value = ("false", "true").index(text.lower()) == 1 if self.type is bool else self.type(text)
        except ValueError:
            value = None
        # nan and inf are numbers to Python, but no rate, size or temperature
        is_value = value is not None and (self.type is not float or math.isfinite(value))
        if not is_value or (choices and value not in choices):
            words = [str(choice) for choice in choices]
            expected = (
                f"one of {', '.join(words)}" if words else EXPECTED[self.type] + f" or {self.none}" * self.optional
            )
            near = f" (nearest: {nearest(text, words)})" if words else ""
            raise ValueError(f"--{self.name}: expected {expected}, got {text[:60]!r}{near}")
        if self.least is not None and value < self.least:
            raise ValueError(f"--{self.name} must be at least {self.least}, not {value}")
        if self.above is not None and value <= self.above:
            raise ValueError(f"--{self.name} must be above {self.above}, not {value}")
        return value


def flag(default: Any = MISSING, **options: Any) -> Any:
    """Make a dataclass field that is a flag; without a `default` the flag is required. options: fields of `Flag`."""
    return dataclasses.field(default=default, kw_only=True, metadata=options)


def flags_of(cls: type) -> list[Flag]:
    """List the flags of a dataclass, in the order of its fields."""
    hints, flags = typing.get_type_hints(cls), []
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        types = [t for t in typing.get_args(hint) if t is not NoneType] or [hint]
        assert types[0] in EXPECTED and len(types) == 1, f"{cls.__name__}.{field.name}: a flag cannot be of type {hint}"
        options = {"alone": "True" if types[0] is bool else None} | field.metadata
        flags.append(Flag(field.name, types[0], NoneType in typing.get_args(hint), field.default, **options))
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
    argv = list(sys.argv[1:] if argv is None else argv)
    prog = prog or os.path.basename(sys.argv[0])
    if {"--help", "-h"} & set(argv):
        _print_and_exit(_help(list(flags.values()), prog, description))
    completion = argv == ["--", "--completion"]
    words, problems = ([], []) if completion else _named_words(argv, flags)

    def build(**texts: str) -> Parsed:
        values, instances = {}, []
        for flag in flags.values():
            try:
                if flag.name in texts:
                    values[flag.name] = flag.convert(texts[flag.name])
                elif flag.default is MISSING:
                    raise ValueError(f"--{flag.name} is required: {flag.help}")
            except ValueError as error:
                problems.append(str(error))
        for cls, part in [] if problems else zip(classes, owned, strict=True):
            try:
                instances.append(cls(**{flag.name: values[flag.name] for flag in part if flag.name in values}))
            except ValueError as error:
                problems.append(str(error))
        return Parsed(instances, frozenset(values))

    build.__signature__ = Signature([Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in flags])
    parsed = fire.Fire(
        fire.decorators.SetParseFn(str)(build),
        command=argv if completion else words,
        name=prog.split()[-1],
        # A text is the completion script; a Parsed is not for printing
        serialize=lambda result: _print_and_exit(_for_python(result, prog)) if isinstance(result, str) else None,
    )
    if problems:
        die("\nerror: ".join(problems) + f"\n`{prog} --help` lists the flags.", 2)
    return parsed


def _named_words(argv: list[str], flags: dict[str, Flag]) -> tuple[list[str], list[str]]:
    """Write a line as `--name=value` words, for fire to guess nothing -> the words, and what is wrong with the line.

    Fire would take `--data_path` without a value for True and `--nox` for x=False, and the last of two equal flags.
    """
    words, problems, left = {}, [], list(reversed(argv))
    positional = [flag.name for flag in flags.values() if flag.positional]
    is_argument = iter(positional)
    while left:
        word = left.pop()
        if IS_FLAG.match(word):
            name, equals, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            if not equals:
                value = left.pop() if left and _is_value(left[-1], flags.get(name), positional) else NO_VALUE
        else:
            name, value = next(is_argument, None), word
        if name is None:
            near = nearest(word.partition("=")[0], flags)
            problems.append(f"unexpected argument {word!r} (values follow their flag; nearest flag: --{near})")
        elif name not in flags:
            problems.append(f"unknown flag --{name}; the nearest is --{nearest(name, flags)}")
        elif name in words:
            problems.append(f"--{name} is given twice")
        else:
            words[name] = f"--{name}={value}"
    return list(words.values()), problems


def _is_value(word: str, flag: Flag | None, positional: list[str]) -> bool:
    """Whether a word behind a flag is its value. Beside arguments, a flag that can stand alone takes True or False."""
    if flag and flag.alone and positional:
        return word.lower() in ("true", "false")
    return not IS_FLAG.match(word)


def _for_python(script: str, prog: str) -> str:
    """Bind fire's completion script to `python` and `torchrun`, where the words of `prog` stand on the line."""
    words = prog.removeprefix("python ")
    script = re.sub(r"--[a-z]\w*(-\w+)+", lambda match: "--" + match[0][2:].replace("-", "_"), script)
    condition = f'[[ " ${{COMP_WORDS[*]}} " == *[\\ /]"{words} "* ]] && lastcommand={words.split()[-1]}'
    script = script.replace("lastcommand=$(get_lastcommand)", condition)
    return re.sub("^complete -F", "complete -o default -F", script.rstrip(), flags=re.MULTILINE) + " python torchrun"


def _help(flags: Sequence[Flag], prog: str, description: str) -> str:
    """Return usage, description and all flags, group by group in order of first appearance."""
    usage, groups = ["usage:", prog], {}
    for flag in sorted(flags, key=lambda flag: not flag.positional):
        if flag.positional or flag.default is MISSING:
            word = flag.name.upper() if flag.positional else f"--{flag.name} {flag.type.__name__.upper()}"
            usage.append(word if flag.default is MISSING else f"[{word}]")
        group = "arguments" if flag.positional else flag.group or "flags"
        groups.setdefault(group, [f"{group}:"]).append(_help_entry(flag))
    end = f"Tab completion in bash: source <(python {prog.removeprefix('python ')} -- --completion)"
    blocks = [" ".join([*usage, "[flags]"]), description.strip(), *map("\n".join, groups.values()), end]
    return "\n\n".join(filter(None, blocks))


def _help_entry(flag: Flag) -> str:
    kind = "True|False" if flag.type is bool else flag.type.__name__
    kind = f"[{kind}]" if flag.alone else kind  # in brackets: the flag alone has a meaning
    left = f"  {flag.name.upper() if flag.positional else '--' + flag.name} {kind}"
    notes = [f"one of {', '.join(map(str, flag.choices))}"] if flag.choices else []
    if flag.default not in (None, ""):  # what leaving out such a flag means, its own text says
        notes.append("required" if flag.default is MISSING else f"default: {flag.default}")
    text = flag.help + (f" ({'; '.join(notes)})" if notes else "")
    lines = textwrap.indent(textwrap.fill(text, 100 - COLUMN, break_on_hyphens=False), " " * COLUMN)
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
