"""Reading Meta's checkpoints: any number of shards, at any model-parallel size, memory-mapped and complete.

Where a tensor is cut follows from the layer that holds it (`placements`), never from its name.
"""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor

from llama.args import ModelArgs
from llama.model import Transformer
from llama.tokenizer import Tokenizer
from moa.adapter import AdapterModule
from moa.files import file_hash, read_torch
from moa.parallel import mp_rank, mp_size
from moa.state import require_same_keys

IGNORED = {"rope.freqs"}  # worked out from params.json instead


class Placement(NamedTuple):
    shape: tuple[int, ...]  # whole
    cut: int | None  # dimension cut over ranks and shards; None: every one holds the whole


def placements(model: Transformer) -> dict[str, Placement]:
    """Key -> whole shape and cut dimension, for every base tensor."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, AdapterModule):
            continue
        if isinstance(module, (ColumnParallelLinear, VocabParallelEmbedding)):
            cut = 0
        elif isinstance(module, RowParallelLinear):
            cut = 1
        else:
            cut = None
        for name, parameter in module.named_parameters(recurse=False):
            shape = list(parameter.shape)
            if cut is not None:
                shape[cut] *= mp_size()
            found[f"{path}.{name}"] = Placement(tuple(shape), cut)
    return found


def read_base(ckpt_dir: str | Path) -> tuple[ModelArgs, Tokenizer]:
    """`params.json` and `tokenizer.model` of a checkpoint folder, checked against each other. ValueError otherwise."""
    folder = Path(ckpt_dir)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder (expected params.json, tokenizer.model and consolidated.NN.pth)")
    args = ModelArgs.from_file(folder / "params.json")
    tokenizer = Tokenizer(folder / "tokenizer.model")
    if args.vocab_size == -1:
        args = replace(args, vocab_size=tokenizer.n_words)
    if args.vocab_size != tokenizer.n_words:
        raise ValueError(
            f"{folder / 'tokenizer.model'}: has {tokenizer.n_words} tokens with the special ones, but params.json says "
            f"vocab_size {args.vocab_size}: not this model's tokenizer"
        )
    return args, tokenizer


def load_base(model: Transformer, ckpt_dir: str | Path, dtype: torch.dtype, device: torch.device) -> None:
    """Fill the base of `model` from all shards in `ckpt_dir`, as `dtype` on `device`; adapters go to `device` too.

    Files stay mapped: what is not converted or moved is never copied, and a rank reads its own part alone. Raises
    ValueError naming the file and tensor where anything is missing, left over, of another shape or unreadable.
    """
    files = _shard_files(Path(ckpt_dir))
    shards = [_open(file) for file in files]
    wanted = placements(model)
    for file, shard in zip(files, shards, strict=True):
        require_same_keys(wanted, set(shard) - IGNORED, str(file), "tensor")
    state = {key: _assemble(key, place, files, shards).to(device, dtype) for key, place in wanted.items()}
    model.load_state_dict(state, strict=False, assign=True)
    model.to(device)
    for name, tensor in model.named_parameters():
        assert not tensor.is_meta, name
        if name in wanted:
            tensor.requires_grad_(False)


def _shard_files(folder: Path) -> list[Path]:
    found = {}
    for file in folder.glob("consolidated.*.pth"):
        match = re.fullmatch(r"consolidated\.(\d+)\.pth", file.name)
        if match:
            found[int(match[1])] = file
    if not found:
        raise ValueError(f"{folder}: no consolidated.NN.pth (a Meta checkpoint's weights)")
    missing = sorted(set(range(max(found) + 1)) - set(found))
    if missing:
        raise ValueError(f"{folder}: shard consolidated.{missing[0]:02d}.pth is missing ({len(found)} found)")
    return [found[i] for i in sorted(found)]


def _open(file: Path) -> dict[str, Tensor]:
    shard = read_torch(file, mmap=True)
    if not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in shard.items()):
        raise ValueError(f"{file}: expected a dictionary of tensors")
    return shard


def _assemble(key: str, place: Placement, files: list[Path], shards: list[dict[str, Tensor]]) -> Tensor:
    """This rank's part of a base tensor, out of the shards that hold it."""
    pieces = [shard[key] for shard in shards]
    for file, piece in zip(files, pieces, strict=True):
        if not piece.is_floating_point():
            raise ValueError(f"{file}: {key} has type {piece.dtype}, expected floating-point numbers")
        if piece.shape != pieces[0].shape:
            raise ValueError(
                f"{file}: {key} has shape {tuple(piece.shape)}, in {files[0].name} {tuple(pieces[0].shape)}"
            )
    if place.cut is None or len(pieces) == 1:
        whole = pieces[0]
        if whole.shape != place.shape:
            raise _wrong_shape(key, whole, place, files)
        if place.cut is None:
            return whole
        part = place.shape[place.cut] // mp_size()
        return whole.narrow(place.cut, mp_rank() * part, part).contiguous()
    held = tuple(pieces[0].shape)
    # LLaMA-2's writers cut the embedding along its width, LLaMA-3's along the vocabulary: the shapes tell.
    for dim in (place.cut, 1 - place.cut):
        if held == tuple(n / len(pieces) if d == dim else n for d, n in enumerate(place.shape)):
            break
    else:
        raise _wrong_shape(key, pieces[0], place, files)
    if dim != place.cut:
        part = place.shape[place.cut] // mp_size()
        return torch.cat([p.narrow(place.cut, mp_rank() * part, part) for p in pieces], dim)
    begin, end = (place.shape[dim] * (mp_rank() + i) // mp_size() for i in (0, 1))
    per_shard = held[dim]
    mine = []
    for i, piece in enumerate(pieces):
        first, last = max(begin, i * per_shard), min(end, (i + 1) * per_shard)
        if first < last:
            mine.append(piece.narrow(dim, first - i * per_shard, last - first))
    return mine[0].contiguous() if len(mine) == 1 else torch.cat(mine, dim)


def _wrong_shape(key: str, tensor: Tensor, place: Placement, files: list[Path]) -> ValueError:
    shards = "" if len(files) == 1 else f" of {len(files)} shards"
    return ValueError(
        f"{files[0]}{shards}: {key} has shape {tuple(tensor.shape)}, params.json asks for {place.shape} in all"
    )


def fingerprint(ckpt_dir: str | Path) -> str:
    """Tells one base from another without reading all of it: a hash of params.json, tokenizer.model, and of each
    shard's size and 64 samples of its bytes."""
    folder = Path(ckpt_dir)
    digest = hashlib.sha256()
    for file in (folder / "params.json", folder / "tokenizer.model"):
        digest.update(file_hash(file).encode())
    for shard in _shard_files(folder):
        size = shard.stat().st_size
        digest.update(str(size).encode())
        with open(shard, "rb") as file:
            for i in range(64):
                file.seek(size * i // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()
