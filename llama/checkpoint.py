"""Reading Meta's checkpoints: any number of shards, at any model-parallel size, memory-mapped and complete.

Which dimension is sharded follows from the layer that holds it (`shard_specs`), never from its name.
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
from llama.parallel_layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from llama.quantize import is_quantizable, quantize_layer
from llama.tokenizer import Tokenizer
from moa.adapter import AdapterModule
from moa.files import file_hash, load_tensors
from moa.parallel import Shard, mp_rank
from moa.state import require_same_keys, require_tensors

IGNORED_KEYS = {"rope.freqs"}  # computed from params.json instead


class ShardSpec(NamedTuple):
    shape: tuple[int, ...]  # whole
    dim: int | None  # sharded over ranks and files; None: each holds the whole


def shard_specs(model: Transformer) -> dict[str, ShardSpec]:
    """Key -> whole shape and sharded dimension, for every base tensor of a checkpoint."""
    specs = {}
    for path, module in model.named_modules():
        if isinstance(module, AdapterModule):
            continue
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            dim = 0 if isinstance(module, ColumnParallelLinear) else 1
            specs[f"{path}.weight"] = ShardSpec((module.out_features, module.in_features), dim)
        elif isinstance(module, VocabParallelEmbedding):
            specs[f"{path}.weight"] = ShardSpec((module.num_embeddings, module.embedding_dim), 0)
        else:
            for name, parameter in module.named_parameters(recurse=False):
                specs[f"{path}.{name}"] = ShardSpec(tuple(parameter.shape), None)
    if model.args.tied_embeddings:
        del specs["output.weight"]
    return specs


def load_params_and_tokenizer(ckpt_dir: str | Path) -> tuple[ModelArgs, Tokenizer]:
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


def load_base_weights(
    model: Transformer, ckpt_dir: str | Path, dtype: torch.dtype, device: torch.device, quantize: str | None = None
) -> None:
    """Fill the base of `model` from all shards in `ckpt_dir`, as `dtype` on `device`; adapters go to `device` too.

    quantize: "nf4" stores each matrix of the blocks in 4 bits as soon as it is read (`llama.quantize`).

    A rank reads only its own part of the files. Files stay memory-mapped: a tensor, or rows of it, that needs no other
    type or device is not copied, and the processes of a machine share its pages. Columns of a tensor (wo and w2, with
    fewer shards than ranks) and tensors joined from several shards are copied. Raises ValueError naming the file and
    the tensor that is missing, unexpected, of another shape or unreadable.
    """
    files = shard_files(Path(ckpt_dir))
    shards = [open_shard(file) for file in files]
    wanted = shard_specs(model)
    for file, shard in zip(files, shards, strict=True):
        require_whole(file, shard, wanted)
    state = {}
    for key, spec in wanted.items():
        path, _, name = key.rpartition(".")
        layer = model.get_submodule(path)
        require_shapes(key, spec, files, shards, getattr(layer, "heads", None))
        n = 1 if spec.dim is None else spec.shape[spec.dim] // getattr(layer, name).shape[spec.dim]
        index = 0 if spec.dim is None else Shard(spec.dim, n).index(mp_rank())
        tensor = assemble(spec, [shard[key] for shard in shards], index, n).to(device, dtype)
        if quantize and is_quantizable(key):
            quantize_layer(layer, tensor)
        else:
            state[key] = tensor
    model.assign_base(state)
    model.to(device)
    for name, tensor in model.named_parameters():
        assert not tensor.is_meta, name
        if name in wanted:
            tensor.requires_grad_(False)


def shard_files(folder: Path) -> list[Path]:
    """All `consolidated.NN.pth` of a checkpoint, in order. ValueError where there is none, or one is missing."""
    shards = {}
    for file in folder.glob("consolidated.*.pth"):
        match = re.fullmatch(r"consolidated\.(\d+)\.pth", file.name)
        if match:
            shards[int(match[1])] = file
    if not shards:
        raise ValueError(f"{folder}: no consolidated.NN.pth (a Meta checkpoint's weights)")
    missing = sorted(set(range(max(shards) + 1)) - set(shards))
    if missing:
        raise ValueError(f"{folder}: shard consolidated.{missing[0]:02d}.pth is missing ({len(shards)} present)")
    return [shards[i] for i in sorted(shards)]


def open_shard(file: Path) -> dict[str, Tensor]:
    """The tensors of a shard, mapped. ValueError naming the file."""
    shard = load_tensors(file, mmap=True)
    require_tensors(shard, str(file), finite=False)
    return shard


def require_whole(file: Path, shard: dict[str, Tensor], specs: dict[str, ShardSpec]) -> None:
    """ValueError listing the missing and the unexpected tensors of a shard."""
    require_same_keys(specs, shard.keys() - IGNORED_KEYS, str(file), "tensor")


def require_shapes(
    key: str, spec: ShardSpec, files: list[Path], shards: list[dict[str, Tensor]], heads: int | None = None
) -> None:
    """ValueError naming file and tensor unless each file holds its piece of a base tensor.

    heads: of wk and wv, the number of key/value heads; where there are more files, neighbours may hold the same head.
    """
    n, held = len(shards), tuple(shards[0][key].shape)
    for file, shard in zip(files, shards, strict=True):
        if tuple(shard[key].shape) != held:
            raise ValueError(f"{file}: {key} has shape {tuple(shard[key].shape)}, in {files[0].name} {held}")
    expected = [tuple(size / n if dim == spec.dim else size for dim, size in enumerate(spec.shape))]
    if heads is not None and n % heads == 0:
        expected.append((spec.shape[0] // heads, *spec.shape[1:]))
    if held not in expected:
        several = f" of {n} shards" if n > 1 else ""
        raise ValueError(f"{files[0]}{several}: {key} has shape {held}, params.json asks for {spec.shape} in all")


def assemble(spec: ShardSpec, pieces: list[Tensor], index: int, n: int) -> Tensor:
    """Part `index` of `n` of a base tensor that files hold in pieces; all of one that is never sharded.
    What lies in one piece is a view of it."""
    if spec.dim is None:
        return pieces[0]
    whole, width = spec.shape[spec.dim], pieces[0].shape[spec.dim]
    begin, end, parts = index * whole // n, (index + 1) * whole // n, []
    for i, piece in enumerate(pieces[:: len(pieces) * width // whole]):  # the first of those alike
        first, last = max(begin, i * width), min(end, (i + 1) * width)
        if first < last:
            parts.append(piece.narrow(spec.dim, first - i * width, last - first))
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, spec.dim)


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
