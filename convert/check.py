"""Whether a checkpoint in Meta's layout is whole: everything in it is read, and all that is wrong is listed."""

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from convert.meta_format import bare_model
from convert.reshard import State, require_consistent
from llama.checkpoint import load_params_and_tokenizer, open_shard, require_whole, shard_files, shard_specs

CHUNK = 1 << 22  # bytes read at a time


def check(ckpt_dir: str | Path) -> str:
    """Read params.json, the tokenizer and all shards of a checkpoint; return what is in it.

    Of a shard: names, shapes and types of its tensors, the CRC-32 of each, and numbers that are not finite. ValueError
    listing all that is wrong with the shards, a sentence each that names the file; what is wrong with params.json or
    the tokenizer alone, since without them shards cannot be judged.
    """
    folder = Path(ckpt_dir)
    args, tokenizer = load_params_and_tokenizer(folder)
    model, files, problems = bare_model(args), shard_files(folder), []

    def attempt(function: Callable, *values: Any) -> Any:
        try:
            return function(*values)
        except (ValueError, OSError) as error:
            problems.append(str(error))

    specs, states = shard_specs(model), [attempt(open_shard, file) for file in files]
    for file, state in zip(files, states, strict=True):
        if state is not None:
            attempt(require_whole, file, state, specs)
    for key, spec in specs.items():
        if all(state is not None and key in state for state in states):
            attempt(require_consistent, model, key, spec, files, states)
    for file, state in zip(files, states, strict=True):
        problems += [f"{file}: {problem}" for problem in _content_problems(file, state)] if state else []
    if problems:
        raise ValueError("\nerror: ".join(problems))
    size = tqdm.format_sizeof(sum(file.stat().st_size for file in files), "B")
    return f"{folder}: whole ({args.n_layers} layers, {tokenizer.n_words} tokens, shards: {len(files)}, {size})"


def _content_problems(file: Path, state: State) -> Iterator[str]:
    """Read a shard through. Yields a sentence for each part of it that is not what was written, and for each tensor
    that has infinite values or NaN."""
    keys_of: dict[int, list[str]] = {}  # of each storage, in the order in which torch numbers them
    for key, tensor in state.items():
        keys_of.setdefault(tensor.untyped_storage().data_ptr(), []).append(key)
    parts = {f"data/{number}": keys for number, keys in enumerate(keys_of.values())}
    with zipfile.ZipFile(file) as archive:
        for member in tqdm(archive.infolist(), desc=file.name, unit="part", leave=False, disable=None):
            name = member.filename.partition("/")[2]
            try:
                with archive.open(member) as content:
                    while content.read(CHUNK):
                        pass
            except zipfile.BadZipFile:
                for damaged in parts.get(name, [f"the archive's {name}"]):
                    yield f"{damaged} is damaged: its CRC-32 is not that of what was written"
            for key in parts.get(name, ()):
                tensor = state[key]
                # The least and the greatest are NaN where any number is, and need no memory as a mask does.
                if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                    count = int((~tensor.isfinite()).sum())
                    yield f"{key} has {count} of {tensor.numel()} values that are not finite numbers"
