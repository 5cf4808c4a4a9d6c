"""Checkpoints and adapters of other formats, to and from Meta's layout and our adapters: `python -m convert --help`."""

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

    input: str = flag(help="folder with config.json, *.safetensors and tokenizer.json")
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
    dtype: str | None = flag(None, help="number format of the written tensors (default: the base's)", choices=DTYPES)


@dataclass
class ReshardFlags(_Output):
    """Write a checkpoint in Meta's layout in another number of shards."""

    ckpt_dir: str = flag(help="the checkpoint, in Meta's layout; it stays as it is")
    shards: int = flag(help="how many files consolidated.NN.pth to cut it into", least=1)
    dtype: str | None = flag(None, help="number format of the written tensors (default: as they are)", choices=DTYPES)


@dataclass
class CheckFlags:
    """Say whether a checkpoint in Meta's layout is whole.

    Read are params.json, the tokenizer, and tensors' names, shapes, types, checksums and numbers."""

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
    "reshard": (ReshardFlags, "reshard:reshard"),
    "check": (CheckFlags, "check:check"),
    "merge": (MergeFlags, "adapters:merge"),
    "peft": (PeftFlags, "peft:to_peft"),
    "from_peft": (FromPeftFlags, "peft:from_peft"),
    "reference": (ReferenceFlags, "adapters:to_reference"),
    "authors": (ReferenceFlags, "adapters:to_reference"),  # its other name
}
OVERVIEW = "Convert checkpoints and adapters. The flags of each: python -m convert hf --help\n"
OVERVIEW += "".join(f"\n{word:10} {getdoc(flags).splitlines()[0]}" for word, (flags, _) in COMMANDS.items())


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    word = cli.subcommand(argv, COMMANDS, OVERVIEW)
    flags_type, function = COMMANDS[word]
    flags = cli.parse(flags_type, argv[1:], prog=f"python -m convert {word}", description=getdoc(flags_type))
    with cli.cli_errors():
        module, _, name = function.partition(":")
        result = getattr(import_module(f"convert.{module}"), name)(**vars(flags))
        if result is not None:
            print(f"wrote {result}" if isinstance(result, Path) else result)


if __name__ == "__main__":
    main()
