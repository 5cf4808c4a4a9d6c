"""Whether a checkpoint in Meta's layout is whole: everything in it is read, and all that is wrong is listed."""

import bisect
import contextlib
import hashlib
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from convert.meta_format import bare_model
from convert.reshard import State, sharded_dim
from llama.args import ModelArgs
from llama.checkpoint import load_params_and_tokenizer, open_shard, require_whole, shard_files, shard_specs
from llama.tokenizer import Tokenizer

PARAMS, TOKENIZER, CHECKLIST = "params.json", "tokenizer.model", "checklist.chk"
MD5_LINE = re.compile(r"([0-9a-fA-F]{32})[ \t]+\*?(\S.*)")  # as md5sum writes it
CHUNK = 1 << 22  # bytes read at a time


class Verdict(NamedTuple):
    file: Path
    content: str  # what is in it, where that can be told
    problems: list[str]  # sentences; each names the file


class _Problems(list[str]):
    def attempt(self, function: Callable, *values: Any) -> Any:
        """Return what the function returns; None where it raises, and then its sentence is one more problem."""
        try:
            return function(*values)
        except OSError as error:
            self.append(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except ValueError as error:
            self.append(str(error))
        return None


def check(ckpt_dir: str | Path, progress: Callable[[int], object] = lambda n: None) -> Iterator[Verdict]:
    """Yield a verdict on each file of a checkpoint: params.json, the tokenizer, the shards, and the list of MD5 sums
    that Meta's downloads have (`checklist.chk`, where there is one).

    Of a shard: names, shapes and types of its tensors (against params.json, and against the other shards once all can
    be opened), the CRC-32 of each, and numbers that are not finite.
    progress: is told how many bytes of the shards were read. ValueError where there is no such folder.
    """
    folder = Path(ckpt_dir)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder (expected {PARAMS}, {TOKENIZER} and consolidated.NN.pth)")
    md5_sums, checklist_verdict = _read_checklist(folder)

    problems = _Problems()
    args = problems.attempt(ModelArgs.from_file, folder / PARAMS)
    problems += _md5_problems(folder / PARAMS, md5_sums)
    yield Verdict(folder / PARAMS, f"{args.n_layers} layers of width {args.dim}" if args else "", problems)

    problems = _Problems()
    tokenizer = problems.attempt(Tokenizer, folder / TOKENIZER)
    if args and tokenizer:
        args, _ = problems.attempt(load_params_and_tokenizer, folder) or (args, None)  # now with a vocabulary
    problems += _md5_problems(folder / TOKENIZER, md5_sums)
    yield Verdict(folder / TOKENIZER, f"{tokenizer.n_words} tokens" if tokenizer else "", problems)

    yield from _check_shards(folder, args if args and args.vocab_size > 0 else None, md5_sums, progress)
    if checklist_verdict is not None:
        yield checklist_verdict


def print_verdicts(ckpt_dir: str | Path) -> None:
    """Print a line on each file of a checkpoint. ValueError listing all problems of all files."""
    problems, size = [], sum(file.stat().st_size for file in existing_shards(ckpt_dir))
    with tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:
        for file, content, wrong in check(ckpt_dir, bar.update):
            verdict = f"{len(wrong)} problem{'s' * (len(wrong) > 1)}" if wrong else "ok"
            bar.write(f"{file}: {verdict}{f' ({content})' if content else ''}")
            problems += wrong
    if problems:
        raise ValueError("\nerror: ".join(problems))


def existing_shards(folder: str | Path) -> list[Path]:
    """List the shards of a folder, whether or not they are all."""
    return sorted(file for file in Path(folder).glob("consolidated.*.pth") if file.is_file())


def _check_shards(
    folder: Path, args: ModelArgs | None, md5_sums: dict[str, str], progress: Callable[[int], object]
) -> Iterator[Verdict]:
    problems = _Problems()  # of all shards, before any is read through
    numbered = problems.attempt(shard_files, folder)
    files = numbered or existing_shards(folder)
    states = [problems.attempt(open_shard, file) for file in files]
    model = problems.attempt(bare_model, args) if args else None
    if model is not None:
        specs = shard_specs(model)
        for file, state in zip(files, states, strict=True):
            if state is not None:
                problems.attempt(require_whole, file, state, specs)
        if numbered:
            for key, spec in specs.items():
                if all(state is not None and key in state for state in states):
                    problems.attempt(sharded_dim, model, key, spec, files, states)
    for file, state in zip(files, states, strict=True):
        own = [p for p in problems if p.startswith(str(file))]
        own += _content_problems(file, state or {}, progress)
        own += _md5_problems(file, md5_sums)
        yield Verdict(file, _describe(file, state or {}), own)
    others = [p for p in problems if not any(p.startswith(str(file)) for file in files)]
    if others:
        yield Verdict(folder, "", others)


def _content_problems(file: Path, state: State, progress: Callable[[int], object]) -> Iterator[str]:
    """Read a shard through. A sentence for each part of it that is not what was written, and for each tensor that has
    infinite values or NaN."""
    left = file.stat().st_size
    unread = dict(state)
    with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        keys_of = _keys_by_member(file, members) if state else {}
        for member in members:
            keys = keys_of.get(member.filename, [])
            try:
                with archive.open(member) as content:
                    while chunk := content.read(CHUNK):
                        progress(len(chunk))
                        left -= len(chunk)
            except zipfile.BadZipFile:
                for what in keys or [f"the archive's {member.filename.partition('/')[2]}"]:
                    yield f"{file}: {what} is damaged: its CRC-32 is not that of what was written"
            for key in keys:
                yield from _not_finite(file, key, unread.pop(key))
    for key, tensor in unread.items():
        yield from _not_finite(file, key, tensor)
    progress(left)


def _keys_by_member(file: Path, members: list[zipfile.ZipInfo]) -> dict[str, list[str]]:
    """Name of each member of a shard's archive -> keys of the tensors whose numbers lie in it."""
    begins, keys_of = [member.header_offset for member in members], {}
    for key, tensor in torch.load(file, map_location="meta", weights_only=True).items():
        offset = tensor.untyped_storage()._checkpoint_offset  # torch sets it where it loads no numbers
        keys_of.setdefault(members[bisect.bisect(begins, offset) - 1].filename, []).append(key)
    return keys_of


def _not_finite(file: Path, key: str, tensor: Tensor) -> Iterator[str]:
    """A sentence where a tensor has infinite values or NaN."""
    # The least and the greatest are NaN where any number is, and need no memory as a mask does.
    if tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
        count = int((~tensor.isfinite()).sum())
        yield f"{file}: {key} has {count} of {tensor.numel()} values that are not finite numbers"


def _describe(file: Path, state: State) -> str:
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())
    size = tqdm.format_sizeof(file.stat().st_size, "B")
    return ", ".join([f"{count} tensors of {name}" for name, count in dtypes.most_common()] + [size])


def _read_checklist(folder: Path) -> tuple[dict[str, str], Verdict | None]:
    """File name -> MD5 sum in hex, and the verdict on the list itself; None where there is no list."""
    file, sums, problems = folder / CHECKLIST, {}, []
    if not file.is_file():
        return {}, None
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = MD5_LINE.fullmatch(line.strip())
        if match and Path(match[2]).name == match[2]:
            sums[match[2]] = match[1].lower()
        elif line.strip():
            problems.append(f"{file}: line {number} is not an MD5 sum and the name of a file in this folder")
    with_verdict = {PARAMS, TOKENIZER} | {shard.name for shard in existing_shards(folder)}
    for name, listed in sums.items():
        if not (folder / name).is_file():
            problems.append(f"{file}: lists {name}, which is not there")
        elif name not in with_verdict and (md5 := _md5(folder / name)) != listed:
            problems.append(f"{file}: lists {name}, whose MD5 sum is {md5}, not {listed}")
    return sums, Verdict(file, f"{len(sums)} MD5 sums", problems)


def _md5_problems(file: Path, sums: dict[str, str]) -> list[str]:
    """A sentence where a file is not what the list of MD5 sums says."""
    if file.name not in sums or not file.is_file() or (md5 := _md5(file)) == sums[file.name]:
        return []
    return [f"{file}: its MD5 sum is {md5}, {CHECKLIST} says {sums[file.name]}"]


def _md5(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
