"""Convert checkpoints and adapters from one format to another.

Checkpoints into Meta's layout (params.json, consolidated.00.pth, tokenizer.model):
    python -m convert hf        --input DIR  --output DIR [--dtype bf16|fp32|fp16] [--overwrite]
    python -m convert gguf      --input FILE --output DIR [--dtype bf16|fp32|fp16] [--overwrite]

Checkpoints in Meta's layout: another number of shards, and whether one is whole:
    python -m convert reshard   --ckpt_dir DIR --output DIR --shards N [--dtype ...] [--overwrite]
    python -m convert check     DIR

Plain LoRA into its base, into a PEFT folder, and out of one:
    python -m convert merge     --ckpt_dir DIR --adapter_path FILE --output DIR [--dtype ...] [--overwrite]
    python -m convert peft      --adapter_path FILE --output DIR [--base_model NAME] [--ckpt_dir DIR] [--overwrite]
    python -m convert from_peft --input DIR --ckpt_dir DIR --output DIR [--overwrite]

An adapter of ours in the format of the paper's authors (theirs is read as it is):
    python -m convert authors   --adapter_path FILE --output DIR [--overwrite]
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cli
from cli import flag

DTYPES = ("bf16", "fp32", "fp16")


@dataclass
class HfFlags:
    input: str = flag(help="folder with config.json, *.safetensors and tokenizer.json or tokenizer.model")
    output: str = flag(help="folder to make")
    dtype: str = flag("bf16", help="number format of the written tensors", choices=DTYPES)
    overwrite: bool = flag(False, help="replace a checkpoint that is already in --output")


@dataclass
class GgufFlags(HfFlags):
    input: str = flag(help="a .gguf file of the llama architecture")


@dataclass
class MergeFlags:
    ckpt_dir: str = flag(help="the base, in Meta's layout; it stays as it is")
    adapter_path: str = flag(help="adapter.pth, ours or the authors'; its adapter_params.json lies beside it")
    output: str = flag(help="folder to make")
    dtype: str | None = flag(None, help="number format of the written tensors (None: the base's)", choices=DTYPES)
    overwrite: bool = flag(False, help="replace a checkpoint that is already in --output")


@dataclass
class ReshardFlags:
    ckpt_dir: str = flag(help="the checkpoint, in Meta's layout; it stays as it is")
    output: str = flag(help="folder to make")
    shards: int = flag(help="how many files consolidated.NN.pth to cut it into")
    dtype: str | None = flag(None, help="number format of the written tensors (None: as they are)", choices=DTYPES)
    overwrite: bool = flag(False, help="replace a checkpoint that is already in --output")

    def __post_init__(self) -> None:
        if self.shards < 1:
            raise ValueError(f"--shards {self.shards} must be 1 or more")


@dataclass
class CheckFlags:
    ckpt_dir: str = flag(help="a checkpoint in Meta's layout", positional=True)


@dataclass
class PeftFlags:
    adapter_path: str = flag(help="adapter.pth, ours or the authors'; its adapter_params.json lies beside it")
    output: str = flag(help="folder to make")
    base_model: str | None = flag(None, help="name or path of the Hugging Face model that PEFT is to load with it")
    ckpt_dir: str | None = flag(None, help="the base, for an adapter that does not tell its shape (the authors')")
    overwrite: bool = flag(False, help="replace a PEFT adapter that is already in --output")


@dataclass
class FromPeftFlags:
    input: str = flag(help="folder with adapter_config.json and adapter_model.safetensors")
    ckpt_dir: str = flag(help="the base that the adapter is for, in Meta's layout")
    output: str = flag(help="folder to make: adapter.pth, adapter_params.json")
    overwrite: bool = flag(False, help="replace an adapter that is already in --output")


@dataclass
class AuthorsFlags:
    adapter_path: str = flag(help="adapter.pth of ours; its adapter_params.json lies beside it")
    output: str = flag(help="folder to make: adapter.pth, adapter_params.json")
    overwrite: bool = flag(False, help="replace an adapter that is already in --output")


# What each command does. Imports are late, so that wrong flags are refused before torch is loaded.


def _checkpoint(convert: Callable, flags: HfFlags) -> None:
    result = convert(flags.input, flags.output, dtype=flags.dtype, overwrite=flags.overwrite)
    for note in result.notes:
        print(f"note: {note}")
    print(f"wrote {result.folder} ({result.args.n_layers} layers, vocabulary {result.args.vocab_size}, {flags.dtype})")


def _hf(flags: HfFlags) -> None:
    from convert.hf import convert

    _checkpoint(convert, flags)


def _gguf(flags: GgufFlags) -> None:
    from convert.gguf import convert

    _checkpoint(convert, flags)


def _merge(flags: MergeFlags) -> None:
    from convert.merge import merge

    result = merge(flags.ckpt_dir, flags.adapter_path, flags.output, flags.dtype, flags.overwrite)
    print(f"wrote {result.folder} ({result.matrices} matrices changed, shards: {result.shards})")


def _reshard(flags: ReshardFlags) -> None:
    from convert.reshard import reshard

    result = reshard(flags.ckpt_dir, flags.output, flags.shards, flags.dtype, flags.overwrite)
    print(f"wrote {result.folder} (shards: {result.before} before, now {result.after})")


def _check(flags: CheckFlags) -> None:
    from tqdm import tqdm

    from convert.check import check, shards_there

    problems = []
    size = sum(file.stat().st_size for file in shards_there(flags.ckpt_dir))
    with tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
        for file, found, wrong in check(flags.ckpt_dir, bar.update):
            verdict = f"{len(wrong)} problem{'s' * (len(wrong) > 1)}" if wrong else "ok"
            bar.write(f"{file}: {verdict}{f' ({found})' if found else ''}")
            problems += wrong
    if problems:
        cli.fail("\nerror: ".join(problems))


def _peft(flags: PeftFlags) -> None:
    from convert.peft import to_peft

    print(f"wrote {to_peft(flags.adapter_path, flags.output, flags.base_model, flags.ckpt_dir, flags.overwrite)}")


def _from_peft(flags: FromPeftFlags) -> None:
    from convert.peft import from_peft

    print(f"wrote {from_peft(flags.input, flags.ckpt_dir, flags.output, flags.overwrite)}")


def _authors(flags: AuthorsFlags) -> None:
    from convert.authors import to_authors

    print(f"wrote {to_authors(flags.adapter_path, flags.output, flags.overwrite)}")


class Command(NamedTuple):
    flags: type
    run: Callable[[Any], None]
    description: str


COMMANDS = {
    "hf": Command(HfFlags, _hf, "Convert a Hugging Face folder (LLaMA-3.x, SmolLM2) into Meta's layout."),
    "gguf": Command(GgufFlags, _gguf, "Convert a GGUF file (llama architecture) into Meta's layout."),
    "merge": Command(MergeFlags, _merge, "Add a plain LoRA to its base's weights: a checkpoint like any other."),
    "reshard": Command(ReshardFlags, _reshard, "Write a checkpoint in Meta's layout in another number of shards."),
    "check": Command(
        CheckFlags,
        _check,
        "Read a checkpoint in Meta's layout once and say of each file whether it is whole: params.json, the tokenizer, "
        "tensors' names, shapes, types, checksums and numbers, and Meta's MD5 sums where checklist.chk lists them.",
    ),
    "peft": Command(PeftFlags, _peft, "Write a plain LoRA as a folder that PEFT loads beside transformers' LLaMA."),
    "from_peft": Command(FromPeftFlags, _from_peft, "Write a PEFT folder's plain LoRA as an adapter of ours."),
    "authors": Command(AuthorsFlags, _authors, "Write an adapter of ours in the format of the paper's authors."),
}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    word = cli.subcommand(argv, COMMANDS, __doc__ + "\nThe flags of each: python -m convert hf --help")
    command = COMMANDS[word]
    flags = cli.parse(command.flags, argv[1:], prog=f"python -m convert {word}", description=command.description)
    with cli.errors():
        command.run(flags)


if __name__ == "__main__":
    main()
