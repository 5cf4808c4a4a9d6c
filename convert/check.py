"""Whether a checkpoint in Meta's layout is whole: everything in it is read once, and all that is wrong is listed."""

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from convert.archive import homes, read_through
from convert.shards import State, bare_model, check_state_dict, require_keys, require_plain
from llama.args import ModelArgs
from llama.checkpoint import open_shard, read_base, shard_files, shard_specs
from llama.tokenizer import Tokenizer
from moa.archive import SMALL, Member, members

PARAMS, TOKENIZER, SUMS = "params.json", "tokenizer.model", "checklist.chk"
SUM = re.compile(r"([0-9a-fA-F]{32})[ \t]+\*?(\S.*)")  # a line of md5sum's
CHECKSUM = "(checksum of "  # how a shard's refusal speaks of one that does not match
PART = 1 << 24  # numbers looked at in one go


class Verdict(NamedTuple):
    file: Path
    found: str  # what is in it, where that can be told
    problems: list[str]  # sentences; each names the file


class _Problems(list[str]):
    def attempt(self, function: Callable, *values: Any) -> Any:
        """What the function returns; None where it raises, and then its sentence is one more problem."""
        try:
            return function(*values)
        except OSError as error:
            self.append(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except ValueError as error:
            self.append(str(error))
        return None


def check(ckpt_dir: str | Path, progress: Callable[[int], object] = lambda n: None) -> Iterator[Verdict]:
    """A verdict on each file of a checkpoint: params.json, the tokenizer, the shards, and the list of MD5 sums that
    Meta's downloads have (`checklist.chk`, where there is one).

    Of a shard: names, shapes and types of its tensors (against params.json, and against the other shards once all can
    be opened), the CRC-32 of each, and numbers that are not finite. Shards are mapped and read in passing.
    progress: is told how many bytes of them were read. ValueError where there is no such folder.
    """
    folder = Path(ckpt_dir)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder (expected {PARAMS}, {TOKENIZER} and consolidated.NN.pth)")
    sums, of_the_sums = _read_sums(folder)

    problems = _Problems()
    args = problems.attempt(ModelArgs.from_file, folder / PARAMS)
    problems += _wrong_sum(folder / PARAMS, sums)
    shape = f"{args.n_layers} layers of width {args.dim}" if args else ""
    yield Verdict(folder / PARAMS, shape, problems)

    problems = _Problems()
    tokenizer = problems.attempt(Tokenizer, folder / TOKENIZER)
    if args and tokenizer:
        args, _ = problems.attempt(read_base, folder) or (args, None)  # now with a vocabulary
    problems += _wrong_sum(folder / TOKENIZER, sums)
    yield Verdict(folder / TOKENIZER, f"{tokenizer.n_words} tokens" if tokenizer else "", problems)

    yield from _check_shards(folder, args if args and args.vocab_size > 0 else None, sums, progress)
    if of_the_sums is not None:
        yield of_the_sums


def shards_there(folder: str | Path) -> list[Path]:
    """The shards of a folder, whether or not they are all."""
    return sorted(file for file in Path(folder).glob("consolidated.*.pth") if file.is_file())


class _Opened(NamedTuple):
    held: list[Member]
    state: State  # tensors that can be looked at
    keys: set[str] | None  # of all; None: cannot be told
    refusal: str | None  # why the shard would not be loaded


def _open(file: Path, problems: _Problems) -> _Opened:
    refused = _Problems()
    state, held = refused.attempt(open_shard, file), []
    with contextlib.suppress(OSError, ValueError), open(file, "rb") as opened:  # then it is refused already
        held = members(opened)
    if refused and CHECKSUM in refused[0]:  # all else is in order, so it can be said which tensor it is
        with contextlib.suppress(Exception):
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            tensors = ((key, value) for key, value in loaded.items() if isinstance(value, Tensor))
            state = {key: tensor for key, tensor in tensors if isinstance(key, str) and key.isprintable()}
    plain = {}
    for key, tensor in (state or {}).items():
        if problems.attempt(require_plain, file, key, tensor) is not None:
            plain[key] = tensor
    return _Opened(held, plain, None if state is None else set(state), refused[0] if refused else None)


def _check_shards(
    folder: Path, args: ModelArgs | None, sums: dict[str, str], progress: Callable[[int], object]
) -> Iterator[Verdict]:
    problems = _Problems()  # of all shards, before any is read through
    numbered = problems.attempt(shard_files, folder)
    files = numbered or shards_there(folder)
    shards = [_open(file, problems) for file in files]
    model = problems.attempt(bare_model, args) if args else None
    if model is not None:
        wanted = shard_specs(model)
        for file, shard in zip(files, shards, strict=True):
            if shard.keys is not None:
                problems.attempt(require_keys, file, shard.keys, wanted)
        if numbered:
            for key in (key for key in wanted if all(key in shard.state for shard in shards)):
                problems.attempt(check_state_dict, model, key, wanted[key], files, [shard.state for shard in shards])
    for file, shard in zip(files, shards, strict=True):
        mine = [p for p in problems if p.startswith(str(file))]
        digest = _new_md5()
        seen = digest.update if file.name in sums else lambda chunk: None
        mine += _bad_numbers(file, shard, seen, progress)
        mine += _wrong_sum(file, sums, digest.hexdigest())
        yield Verdict(file, _described(file, shard.state), mine)
    elsewhere = [p for p in problems if not any(p.startswith(str(file)) for file in files)]
    if elsewhere:
        yield Verdict(folder, "", elsewhere)


def _bad_numbers(
    file: Path, shard: _Opened, seen: Callable[[bytes], object], progress: Callable[[int], object]
) -> Iterator[str]:
    """Read a shard through; what is wrong with the bytes and the numbers of its tensors, as they go by."""
    home, damaged = homes(shard.held, shard.state), False
    for member, intact in read_through(file, shard.held, seen, progress):
        keys = home.get(member.name, [])
        if not intact:
            damaged = damaged or member.size <= SMALL
            for what in keys or [f"the archive's {member.name.partition('/')[2]}"]:
                yield f"{file}: {what} is damaged: its CRC-32 is not that of what was written"
        yield from _not_finite(file, {key: shard.state[key] for key in keys})
    looked_at = {key for keys in home.values() for key in keys}
    yield from _not_finite(file, {key: tensor for key, tensor in shard.state.items() if key not in looked_at})
    if shard.refusal and not damaged:  # else it has been said, with the tensor's name
        yield shard.refusal


def _not_finite(file: Path, tensors: State) -> Iterator[str]:
    """A sentence for each tensor that has infinite values or NaN. Tensors are looked at in parts."""
    for key, tensor in tensors.items():
        whole, count = torch.atleast_1d(tensor), 0
        for part in whole.split(max(1, PART * len(whole) // max(1, whole.numel()))):
            if part.numel() and not torch.stack(part.aminmax()).isfinite().all():  # NaN where any is
                count += int((~part.isfinite()).sum())
        if count:
            yield f"{file}: {key} has {count} of {tensor.numel()} values that are not finite numbers"


def _described(file: Path, state: State) -> str:
    types = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in state.values())
    size = tqdm.format_sizeof(file.stat().st_size, "B")
    return ", ".join([f"{count} tensors of {name}" for name, count in types.most_common()] + [size])


def _read_sums(folder: Path) -> tuple[dict[str, str], Verdict | None]:
    """File name -> MD5 sum in hex, and the verdict on the list itself; None where there is no list."""
    file, sums, problems = folder / SUMS, {}, _Problems()
    if not file.is_file():
        return {}, None
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = SUM.fullmatch(line.strip())
        if match and Path(match[2]).name == match[2]:
            sums[match[2]] = match[1].lower()
        elif line.strip():
            problems.append(f"{file}: line {number} is not an MD5 sum and the name of a file in this folder")
    looked_at = {PARAMS, TOKENIZER} | {shard.name for shard in shards_there(folder)}
    for name, listed in sums.items():
        if not (folder / name).is_file():
            problems.append(f"{file}: lists {name}, which is not there")
        elif name not in looked_at and (found := _md5(folder / name)) != listed:
            problems.append(f"{file}: lists {name}, whose MD5 sum is {found}, not {listed}")
    return sums, Verdict(file, f"{len(sums)} MD5 sums", problems)


def _wrong_sum(file: Path, sums: dict[str, str], digest: str | None = None) -> list[str]:
    """One sentence where a file is not what the list of MD5 sums says. digest: the file's sum; None: it is read."""
    if file.name not in sums or not file.is_file():
        return []
    digest = digest or _md5(file)
    wrong = digest != sums[file.name]
    return [f"{file}: its MD5 sum is {digest}, {SUMS} says {sums[file.name]}"] if wrong else []


def _md5(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, _new_md5).hexdigest()


def _new_md5() -> Any:
    return hashlib.md5(usedforsecurity=False)
