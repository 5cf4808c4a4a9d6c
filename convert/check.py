"""Whether a checkpoint in Meta's layout is whole: everything in it is read, and all that is wrong is listed."""

import hashlib
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from convert.meta_format import bare_model
from convert.reshard import State, require_consistent
from llama.args import ModelArgs
from llama.checkpoint import load_params_and_tokenizer, open_shard, require_whole, shard_files, shard_specs
from llama.model import Transformer
from llama.tokenizer import Tokenizer

CHECKLIST = "checklist.chk"
MD5_LINE = re.compile(r"([0-9a-fA-F]{32})[ \t]+\*?(\S.*)")  # as md5sum writes it
CHUNK = 1 << 22  # bytes read at a time


class Verdict(NamedTuple):
    file: Path
    content: str  # what is in it, where that can be told
    problems: list[str]  # sentences; each begins with the file


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


def check(ckpt_dir: str | Path) -> list[Verdict]:
    """Return a verdict on each file of a checkpoint: params.json, the tokenizer, the shards, and the list of MD5 sums
    that Meta's downloads have (`checklist.chk`, where there is one) with all that it lists.

    Of a shard: names, shapes and types of its tensors (against params.json, and against the other shards once all can
    be opened), the CRC-32 of each, and numbers that are not finite. ValueError where there is no such folder.
    """
    folder, problems = Path(ckpt_dir), _Problems()
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder (expected params.json, tokenizer.model and consolidated.NN.pth)")
    params, tokenizer_file, checklist = (folder / name for name in ("params.json", "tokenizer.model", CHECKLIST))
    args, tokenizer = problems.attempt(ModelArgs.from_file, params), problems.attempt(Tokenizer, tokenizer_file)
    contents = {
        params: f"{args.n_layers} layers of width {args.dim}" if args else "",
        tokenizer_file: f"{tokenizer.n_words} tokens" if tokenizer else "",
    }
    if args and tokenizer:
        args, _ = problems.attempt(load_params_and_tokenizer, folder) or (args, None)  # now with a vocabulary
    model = problems.attempt(bare_model, args) if args and args.vocab_size > 0 else None
    contents |= _check_shards(folder, model, problems)
    if checklist.is_file():
        sums = _check_sums(checklist, problems)
        contents |= {file: "" for file in sums if file.is_file() and file not in contents}
        contents[checklist] = f"{len(sums)} MD5 sums"
    verdicts = [
        Verdict(file, content, [text for text in problems if text.startswith((f"{file}:", f"{file} of "))])
        for file, content in {**contents, folder: ""}.items()
    ]
    return verdicts if verdicts[-1].problems else verdicts[:-1]


def print_verdicts(ckpt_dir: str | Path) -> None:
    """Print a line on each file of a checkpoint. ValueError listing all problems of all files."""
    verdicts = check(ckpt_dir)
    for file, content, problems in verdicts:
        verdict = f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "ok"
        print(f"{file}: {verdict}{f' ({content})' if content else ''}")
    if problems := [problem for verdict in verdicts for problem in verdict.problems]:
        raise ValueError("\nerror: ".join(problems))


def _check_shards(folder: Path, model: Transformer | None, problems: _Problems) -> dict[Path, str]:
    """Add what is wrong with the shards. Returns what is in each."""
    numbered = problems.attempt(shard_files, folder)
    files = numbered or sorted(file for file in folder.glob("consolidated.*.pth") if file.is_file())
    states = [problems.attempt(open_shard, file) for file in files]
    specs = {} if model is None else shard_specs(model)
    for file, state in zip(files, states, strict=True):
        if specs and state is not None:
            problems.attempt(require_whole, file, state, specs)
    for key, spec in specs.items() if numbered else ():
        if all(state is not None and key in state for state in states):
            problems.attempt(require_consistent, model, key, spec, files, states)
    contents = {}
    for file, state in zip(files, states, strict=True):
        problems += [f"{file}: {problem}" for problem in _content_problems(file, state)] if state else []
        dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in (state or {}).values())
        counts = [f"{count} tensors of {name}" for name, count in dtypes.most_common()]
        contents[file] = ", ".join([*counts, tqdm.format_sizeof(file.stat().st_size, "B")])
    return contents


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


def _check_sums(checklist: Path, problems: _Problems) -> list[Path]:
    """Add what is wrong with a list of MD5 sums, and files that have others. Returns the files that it lists."""
    listed = {}
    for number, line in enumerate(checklist.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        match = MD5_LINE.fullmatch(line.strip())
        if match and Path(match[2]).name == match[2]:
            listed[checklist.with_name(match[2])] = match[1].lower()
        elif line.strip():
            problems.append(f"{checklist}: line {number} is not an MD5 sum and the name of a file in this folder")
    for file, expected in listed.items():
        if not file.is_file():
            problems.append(f"{checklist}: lists {file.name}, which is not there")
            continue
        with open(file, "rb") as content:
            md5 = hashlib.file_digest(content, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if md5 != expected:
            problems.append(f"{file}: its MD5 sum is {md5}, {CHECKLIST} says {expected}")
    return list(listed)
