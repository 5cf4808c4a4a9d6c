"""Convert checkpoints and adapters from one format to another.

Checkpoints into Meta's layout (params.json, consolidated.00.pth, tokenizer.model):
    python -m convert hf        --input DIR  --output_dir DIR [--dtype bf16|fp32|fp16] [--overwrite]
    python -m convert gguf      --input FILE --output_dir DIR [--dtype bf16|fp32|fp16] [--overwrite]

Checkpoints in Meta's layout: another number of shards, and whether one is whole:
    python -m convert reshard   --ckpt_dir DIR --output_dir DIR --shards N [--dtype ...] [--overwrite]
    python -m convert check     DIR

Plain LoRA into its base; LoRA, DoRA, IA3 and VeRA into a PEFT folder, and out of one:
    python -m convert merge     --ckpt_dir DIR --adapter_path FILE --output_dir DIR [--dtype ...] [--overwrite]
    python -m convert peft      --adapter_path FILE --output_dir DIR [--base_model NAME] [--ckpt_dir DIR] [--overwrite]
    python -m convert from_peft --input DIR --ckpt_dir DIR --output_dir DIR [--overwrite]

An adapter of ours in the format of the paper's authors (theirs is read as it is; `authors` is the same command):
    python -m convert reference --adapter_path FILE --output_dir DIR [--overwrite]
"""

import sys
from dataclasses import dataclass
from importlib import import_module
from inspect import getdoc
from pathlib import Path

import cli
from cli import flag

DTYPES = ("bf16", "fp32", "fp16")


@dataclass
class _Output:
    output_dir: str = flag(help="folder to make")
    overwrite: bool = flag(False, help="replace what an earlier conversion of the same kind left in --output_dir")


@dataclass
class HfFlags(_Output):
    """Convert a Hugging Face folder (LLaMA-3.x, SmolLM2, Qwen3) into Meta's layout."""

    input: str = flag(help="folder with config.json, *.safetensors and tokenizer.json or tokenizer.model")
    dtype: str = flag("bf16", help="number format of the written tensors", choices=DTYPES)


@dataclass
class GgufFlags(HfFlags):
    """Convert a GGUF file (architecture llama or qwen3) into Meta's layout."""

    input: str = flag(help="a .gguf file of the architecture llama or qwen3")


@dataclass
class MergeFlags(_Output):
    """Add a plain LoRA to its base's weights: a checkpoint like any other."""

    ckpt_dir: str = flag(help="the base, in Meta's layout; it stays as it is")
    adapter_path: str = flag(help="adapter.pth, ours or the authors'; its adapter_params.json lies beside it")
    dtype: str | None = flag(None, help="number format of the written tensors (None: the base's)", choices=DTYPES)


@dataclass
class ReshardFlags(_Output):
    """Write a checkpoint in Meta's layout in another number of shards."""

    ckpt_dir: str = flag(help="the checkpoint, in Meta's layout; it stays as it is")
    shards: int = flag(help="how many files consolidated.NN.pth to cut it into")
    dtype: str | None = flag(None, help="number format of the written tensors (None: as they are)", choices=DTYPES)

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise ValueError(f"--shards {self.shards} must be 1 or more")


@dataclass
class CheckFlags:
    """Read a checkpoint in Meta's layout and say of each file whether it is whole: params.json, the tokenizer, tensors'
    names, shapes, types, checksums and numbers, and Meta's MD5 sums where checklist.chk lists them."""

    ckpt_dir: str = flag(help="a checkpoint in Meta's layout", positional=True)


@dataclass
class PeftFlags(_Output):
    """Write an adapter of LoRAs, DoRAs, IA3 or VeRA as a folder that PEFT loads beside transformers' model."""

    adapter_path: str = flag(help="adapter.pth, ours or the authors'; its adapter_params.json lies beside it")
    base_model: str | None = flag(None, help="name or path of the Hugging Face model that PEFT is to load with it")
    ckpt_dir: str | None = flag(None, help="the base, for an adapter that does not tell its shape (the authors')")


@dataclass
class FromPeftFlags(_Output):
    """Write a PEFT folder's LoRA, DoRA, IA3 or VeRA (as LoRA) as an adapter of ours."""

    input: str = flag(help="folder with adapter_config.json and adapter_model.safetensors")
    ckpt_dir: str = flag(help="the base that the adapter is for, in Meta's layout")


@dataclass
class ReferenceFlags(_Output):
    """Write an adapter of ours in the format of the paper's authors."""

    adapter_path: str = flag(help="adapter.pth of ours; its adapter_params.json lies beside it")


# Word -> its flags, and the "module:function" called with them; imported late, so that wrong flags cost no second.
COMMANDS = {
    "hf": (HfFlags, "hf:convert"),
    "gguf": (GgufFlags, "gguf:convert"),
    "merge": (MergeFlags, "adapters:merge"),
    "reshard": (ReshardFlags, "reshard:reshard"),
    "check": (CheckFlags, "check:print_verdicts"),
    "peft": (PeftFlags, "peft:to_peft"),
    "from_peft": (FromPeftFlags, "peft:from_peft"),
    "reference": (ReferenceFlags, "adapters:to_reference"),
}
ALIASES = {"authors": "reference"}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    word = cli.subcommand(argv, [*COMMANDS, *ALIASES], __doc__ + "\nThe flags of each: python -m convert hf --help")
    flags_type, function = COMMANDS[ALIASES.get(word, word)]
    flags = cli.parse(flags_type, argv[1:], prog=f"python -m convert {word}", description=getdoc(flags_type))
    with cli.cli_errors():
        module, _, name = function.partition(":")
        result = getattr(import_module(f"convert.{module}"), name)(**vars(flags))
        if result is not None:
            print(f"wrote {result}" if isinstance(result, Path) else result)


if __name__ == "__main__":
    main()
