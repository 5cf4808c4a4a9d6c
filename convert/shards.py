"""The shards of a checkpoint in Meta's layout, opened together and compared with params.json and each other."""

import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from llama.args import ModelArgs
from llama.checkpoint import IGNORED_KEYS, ShardSpec, open_shard, shard_dim, shard_files, shard_specs
from llama.distributed import init_distributed
from llama.model import Transformer
from moa.files import tensor_problem
from moa.state import require_same_keys

State = dict[str, Tensor]


class Shards(NamedTuple):
    files: list[Path]
    states: list[State]  # mapped tensors of each file
    dims: dict[str, int | None]  # key -> dimension along which these files shard it; None: each holds the whole


def bare_model(args: ModelArgs) -> Transformer:
    """A model without weights or adapters, which tells how a checkpoint of this shape is sharded (`shard_specs`)."""
    init_distributed(torch.device("cpu"))
    return Transformer(args)


def open_shards(folder: Path, model: Transformer) -> Shards:
    """Open all shards of a checkpoint of this model's shape. Raises ValueError naming the file and the tensor that does
    not fit.

    Each file is compared with its checksums first: what is made of it gets new ones, which would hide damage.
    """
    files, specs = shard_files(folder), shard_specs(model)
    states = [open_plain_shard(file) for file in files]
    for file, state in zip(files, states, strict=True):
        require_keys(file, state, specs)
    dims = {key: sharded_dim(model, key, spec, files, states) for key, spec in specs.items()}
    for file in tqdm(files, desc="checksums", unit="file", leave=False, disable=None):
        with zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{file}: damaged (checksum of {damaged} does not match)")
    return Shards(files, states, dims)


def open_plain_shard(file: Path) -> State:
    """Map a shard. ValueError naming the file, also where it holds other than plain tensors."""
    state = open_shard(file)
    for key, tensor in state.items():
        problem = tensor_problem(tensor)
        if problem:
            raise ValueError(f"{file}: {key} {problem}")
    return state


def require_keys(file: Path, state: State, specs: dict[str, ShardSpec]) -> None:
    """ValueError listing the tensors that a shard lacks or has too many."""
    require_same_keys(specs, state.keys() - IGNORED_KEYS, str(file), "tensor")


def sharded_dim(model: Transformer, key: str, spec: ShardSpec, files: list[Path], states: list[State]) -> int | None:
    """Return the dimension along which the files shard a tensor. ValueError naming file and tensor where a piece has
    another shape or type than it should, or where files that should hold the same piece do not."""
    heads = getattr(model.get_submodule(key.rpartition(".")[0]), "heads", None)  # of keys and values, at wk and wv
    dim, first = shard_dim(key, spec, files, states, heads), states[0][key]
    copies = len(files) if dim is None else first.shape[dim] * len(files) // spec.shape[dim]  # of each piece
    for i, (file, state) in enumerate(zip(files, states, strict=True)):
        if state[key].dtype != first.dtype:
            raise ValueError(f"{file}: {key} has type {state[key].dtype}, in {files[0].name} {first.dtype}")
        j = i - i % copies
        # As bytes, since NaN is not equal to itself
        if i != j and not torch.equal(*(tensors[key].contiguous().view(torch.uint8) for tensors in (state, states[j]))):
            raise ValueError(f"{file}: {key} differs from that in {files[j].name}, which should be the same")
    return dim
