"""The shards of a checkpoint in Meta's layout, opened together and held against params.json and each other."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llama.args import ModelArgs
from llama.checkpoint import IGNORED, ShardSpec, open_shard, shard_dim, shard_files, shard_specs
from llama.distributed import init_distributed
from llama.model import Transformer
from moa.archive import require_intact
from moa.files import tensor_problem
from moa.state import FLOATS, require_same_keys

State = dict[str, Tensor]


class Shards(NamedTuple):
    files: list[Path]
    states: list[State]  # their tensors, mapped
    cuts: dict[str, int | None]  # key -> dimension along which these shards cut it; None: each holds the whole


def bare_model(args: ModelArgs) -> Transformer:
    """A model without weights or adapters: it knows how a checkpoint of this shape is cut (`shard_specs`)."""
    init_distributed(torch.device("cpu"))
    return Transformer(args)


def open_shards(folder: Path, model: Transformer) -> Shards:
    """All shards of a checkpoint of this model's shape. Each file is read once against its checksums: what is made of
    it gets new ones, which would hide damage. Raises ValueError naming the file, and the tensor that does not fit."""
    files, wanted = shard_files(folder), shard_specs(model)
    states = [open_shard(file) for file in files]
    for file, state in zip(files, states, strict=True):
        require_keys(file, set(state), wanted)
        for key, tensor in state.items():
            require_plain(file, key, tensor)
    cuts = {key: check_state_dict(model, key, place, files, states) for key, place in wanted.items()}
    for file in files:
        require_intact(file)
    return Shards(files, states, cuts)


def require_keys(file: Path, keys: set[str], wanted: dict[str, ShardSpec]) -> None:
    """ValueError listing the tensors that a shard lacks or has too many."""
    require_same_keys(wanted, keys - IGNORED, str(file), "tensor")


def require_plain(file: Path, key: str, tensor: Tensor) -> Tensor:
    """The tensor; ValueError unless it is a plain one of floating-point numbers."""
    problem = tensor_problem(tensor)
    if problem is None and tensor.dtype not in FLOATS:
        problem = f"has type {tensor.dtype}, expected floating-point numbers"
    if problem:
        raise ValueError(f"{file}: {key} {problem}")
    return tensor.detach()


def check_state_dict(
    model: Transformer, key: str, place: ShardSpec, files: list[Path], states: list[State]
) -> int | None:
    """The dimension along which the shards cut a tensor that all of them have. ValueError naming file and tensor where
    a piece has another shape or type than it should, or where several that should hold the same do not."""
    heads = getattr(model.get_submodule(key.rpartition(".")[0]), "heads", None)  # of keys and values, at wk and wv
    cut, first = shard_dim(key, place, files, states, heads), states[0][key]
    for file, state in zip(files, states, strict=True):
        if state[key].dtype != first.dtype:
            raise ValueError(f"{file}: {key} has type {state[key].dtype}, in {files[0].name} {first.dtype}")
    alike = len(files) if cut is None else first.shape[cut] * len(files) // place.shape[cut]
    for i, (file, state) in enumerate(zip(files, states, strict=True)):
        j = i - i % alike
        if i != j and not torch.equal(_bytes(state[key]), _bytes(states[j][key])):
            raise ValueError(f"{file}: {key} differs from that in {files[j].name}, which should be the same")
    return cut


def _bytes(tensor: Tensor) -> Tensor:
    """To compare: NaN is equal to itself."""
    return tensor.contiguous().view(torch.uint8)
