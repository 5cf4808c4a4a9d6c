"""Reading Meta's checkpoints: any number of shards, at any model-parallel size, memory-mapped and complete.

Where a tensor is cut follows from the layer that holds it (`shard_specs`), never from its name.
"""

import hashlib
import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llama.args import ModelArgs
from llama.model import Transformer
from llama.parallel_layers import ColumnParallel, RowParallel, VocabParallel
from llama.tokenizer import Tokenizer
from moa.adapter import AdapterModule
from moa.files import file_hash, read_torch
from moa.parallel import Cut, mp_rank
from moa.state import require_same_keys

IGNORED = {"rope.freqs"}  # worked out from params.json instead


class ShardSpec(NamedTuple):
    shape: tuple[int, ...]  # whole
    cut: int | None  # dimension cut over ranks and shards; None: every one holds the whole


def shard_specs(model: Transformer) -> dict[str, ShardSpec]:
    """Key -> whole shape and how it is cut, for every base tensor."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, AdapterModule):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, ColumnParallel):
                place = ShardSpec((module.out_features, module.in_features), 0)
            elif isinstance(module, RowParallel):
                place = ShardSpec((module.out_features, module.in_features), 1)
            elif isinstance(module, VocabParallel):
                place = ShardSpec((module.num_embeddings, module.embedding_dim), 0)
            else:
                place = ShardSpec(tuple(parameter.shape), None)
            found[f"{path}.{name}"] = place
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

    A rank reads its own part of the files and no more. Files stay mapped, so what needs no other type or device is
    neither read nor copied here, and processes of a machine share it (the system's page cache): all of a shard's
    tensor, or some of its rows. Some columns of it (wo and w2, with fewer shards than ranks), and what is put together
    from several shards, are copies. Raises ValueError naming the file and tensor where anything is missing, left over,
    of another shape or unreadable.
    """
    files = shard_files(Path(ckpt_dir))
    shards = [open_shard(file) for file in files]
    wanted = shard_specs(model)
    for file, shard in zip(files, shards, strict=True):
        require_same_keys(wanted, set(shard) - IGNORED, str(file), "tensor")
    state = {}
    for key, place in wanted.items():
        path, _, name = key.rpartition(".")
        layer = model.get_submodule(path)
        cut = shard_dim(key, place, files, shards, getattr(layer, "heads", None))
        mine = _assemble(place, cut, getattr(layer, name).shape, [shard[key] for shard in shards])
        state[key] = mine.to(device, dtype)
    model.load_state_dict(state, strict=False, assign=True)
    model.to(device)
    for name, tensor in model.named_parameters():
        assert not tensor.is_meta, name
        if name in wanted:
            tensor.requires_grad_(False)


def shard_files(folder: Path) -> list[Path]:
    """All `consolidated.NN.pth` of a checkpoint, in order. ValueError where there is none, or one is missing."""
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


def open_shard(file: Path) -> dict[str, Tensor]:
    """The tensors of a shard, mapped. ValueError naming the file."""
    shard = read_torch(file, mmap=True)
    if not all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in shard.items()):
        raise ValueError(f"{file}: expected a dictionary of tensors")
    return shard


def shard_dim(
    key: str, place: ShardSpec, files: list[Path], shards: list[dict[str, Tensor]], heads: int | None = None
) -> int | None:
    """The dimension along which the shards cut a base tensor; None where each holds the whole.

    LLaMA-2's writers cut the embedding along its width, LLaMA-3's along the vocabulary: the shapes tell. heads: of wk
    and wv, the number of key/value heads; where there are more shards, neighbours may hold the same head. ValueError
    naming file and tensor where a shard's piece is of another type or shape.
    """
    n, held = len(shards), tuple(shards[0][key].shape)
    for file, shard in zip(files, shards, strict=True):
        if not shard[key].is_floating_point():
            raise ValueError(f"{file}: {key} has type {shard[key].dtype}, expected floating-point numbers")
        if tuple(shard[key].shape) != held:
            raise ValueError(f"{file}: {key} has shape {tuple(shard[key].shape)}, in {files[0].name} {held}")
    cut = place.cut if n > 1 else None
    for dim in (None,) if cut is None else (cut, 1 - cut):
        if held == tuple(size / n if d == dim else size for d, size in enumerate(place.shape)):
            return dim
    if heads is not None and n % heads == 0 and held == (place.shape[0] // heads, *place.shape[1:]):
        return cut
    several = f" of {n} shards" if n > 1 else ""
    raise ValueError(f"{files[0]}{several}: {key} has shape {held}, params.json asks for {place.shape} in all")


def _assemble(place: ShardSpec, dim: int | None, local: torch.Size, pieces: list[Tensor]) -> Tensor:
    """This rank's part, of shape `local`, of a base tensor that shards hold in pieces along `dim`."""
    if place.cut is None:
        return pieces[0]
    size = local[place.cut]
    begin = size * Cut(place.cut, place.shape[place.cut] // size).part(mp_rank())
    if dim != place.cut:  # each piece has some of what is this rank's
        mine = [piece.narrow(place.cut, begin, size) for piece in pieces]
    else:
        mine, width = [], pieces[0].shape[dim]
        for i, piece in enumerate(pieces[:: len(pieces) * width // place.shape[dim]]):  # the first of those alike
            first, last = max(begin, i * width), min(begin + size, (i + 1) * width)
            if first < last:
                mine.append(piece.narrow(dim, first - i * width, last - first))
    return mine[0].contiguous() if len(mine) == 1 else torch.cat(mine, dim)


def fingerprint(ckpt_dir: str | Path) -> str:
    """Tells one base from another without reading all of it: a hash of params.json, tokenizer.model, and of each
    shard's size and 64 samples of its bytes."""
    folder = Path(ckpt_dir)
    digest = hashlib.sha256()
    for file in (folder / "params.json", folder / "tokenizer.model"):
        digest.update(file_hash(file).encode())
    for shard in shard_files(folder):
        size = shard.stat().st_size
        digest.update(str(size).encode())
        with open(shard, "rb") as file:
            for i in range(64):
                file.seek(size * i // 64)
                digest.update(file.read(4096))
    return digest.hexdigest()
