"""Command lines from dataclasses: every field is a flag, and nothing runs before every flag is right.

@dataclass
class Flags:
    input: str = knob(help="folder with config.json")
    dtype: str = knob("bf16", help="type of the written tensors", choices=("bf16", "fp32"))

def main(argv: list[str] | None = None) -> None:
    flags = parse(Flags, argv, prog="python -m convert hf", description="...")
    with errors():
        ...
"""

from cli.exits import errors, fail, out_of_memory
from cli.knobs import knob
from cli.parsing import Parsed, first_word, parse, parse_into

__all__ = ["Parsed", "errors", "fail", "first_word", "knob", "out_of_memory", "parse", "parse_into"]
