"""Command lines from dataclasses: every field is a flag, and nothing runs before every flag is right.

@dataclass
class Flags:
    input: str = flag(help="folder with config.json")
    dtype: str = flag("bf16", help="type of the written tensors", choices=("bf16", "fp32"))

def main(argv: list[str] | None = None) -> None:
    flags = parse(Flags, argv, prog="python -m convert hf", description="...")
    with cli_errors():
        ...
"""

from cli.exits import errors, fail, out_of_memory
from cli.knobs import Knob, knob, knobs_of, nearest
from cli.parsing import Parsed, first_word, parse, parse_into

flag, flags_of, Flag = knob, knobs_of, Knob
cli_errors, die, subcommand = errors, fail, first_word

__all__ = ["Flag", "Parsed", "cli_errors", "die", "errors", "fail", "first_word", "flag", "flags_of", "knob", "nearest"]
__all__ += ["out_of_memory", "parse", "parse_into", "subcommand"]
