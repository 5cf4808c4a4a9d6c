"""Convert a checkpoint into Meta's layout (params.json, consolidated.00.pth, tokenizer.model).

python -m convert hf   --input DIR  --output DIR [--dtype bf16|fp32|fp16] [--overwrite]
python -m convert gguf --input FILE --output DIR [--dtype bf16|fp32|fp16] [--overwrite]
"""

import sys
from dataclasses import dataclass

import cli
from cli import knob


@dataclass
class HfFlags:
    input: str = knob(help="folder with config.json, *.safetensors and tokenizer.json or tokenizer.model")
    output: str = knob(help="folder to make")
    dtype: str = knob("bf16", help="number format of the written tensors", choices=("bf16", "fp32", "fp16"))
    overwrite: bool = knob(False, help="replace a checkpoint that is already in --output")


@dataclass
class GgufFlags(HfFlags):
    input: str = knob(help="a .gguf file of the llama architecture")


FORMATS = {
    "hf": (HfFlags, "Convert a Hugging Face folder (LLaMA-3.x, SmolLM2) into Meta's layout."),
    "gguf": (GgufFlags, "Convert a GGUF file (llama architecture) into Meta's layout."),
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["--help"], ["-h"]):
        print(__doc__.strip() + "\n\nThe flags of each: python -m convert hf --help")
        return
    if not argv or argv[0] not in FORMATS:
        found = f"not {argv[0]!r}" if argv else "nothing was given"
        cli.fail(f"the first word must be the input's format, one of {', '.join(FORMATS)}: {found}", status=2)
    flags_type, description = FORMATS[argv[0]]
    flags = cli.parse(flags_type, argv[1:], prog=f"python -m convert {argv[0]}", description=description)
    with cli.errors():
        # Imported here, so that wrong flags are refused before torch is loaded.
        if argv[0] == "hf":
            from convert.hf import convert
        else:
            from convert.gguf import convert
        result = convert(flags.input, flags.output, dtype=flags.dtype, overwrite=flags.overwrite)
        for note in result.notes:
            print(f"note: {note}")
        print(
            f"wrote {result.folder} ({result.args.n_layers} layers, vocabulary {result.args.vocab_size}, {flags.dtype})"
        )


if __name__ == "__main__":
    main()
