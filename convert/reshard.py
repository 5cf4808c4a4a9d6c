"""A checkpoint in Meta's layout in another number of shards, cut as Meta cuts them."""

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from convert.meta_format import DTYPES, Written, bare_model, check_output, new_folder, require_finite, save_shard
from llama.args import ModelArgs
from llama.checkpoint import (
    ShardSpec,
    assemble,
    load_params_and_tokenizer,
    open_shard,
    require_whole,
    shard_dim,
    shard_files,
    shard_specs,
)
from llama.model import Transformer

MAX_SHARDS = 99  # consolidated.NN.pth has two digits
State = dict[str, Tensor]
# (key, a shard's part of that tensor, the dimension it is cut along, index and number of shards) -> what to write
Change = Callable[[str, Tensor, int | None, int, int], Tensor]


def reshard(
    ckpt_dir: str | Path,
    output_dir: str | Path,
    shards: int | None,
    dtype: str | None = None,
    overwrite: bool = False,
    change: Change = lambda key, tensor, *_: tensor,
) -> Written:
    """Write the checkpoint of `ckpt_dir` in `shards` files, with its params.json and tokenizer.model unchanged.

    shards: None for as many as there are. dtype: bf16, fp32 or fp16; None: each tensor keeps its own. change: makes
    each written part from the read one. Memory holds one written shard; what is read stays in the mapped files. Raises
    ValueError or OSError naming the file, the tensor and the sizes that do not fit or divide; then nothing was written.
    """
    source, output_dir = Path(ckpt_dir), check_output(output_dir, overwrite)
    args, _ = load_params_and_tokenizer(source)
    if output_dir.exists() and output_dir.samefile(source):
        raise ValueError(f"{output_dir}: is the base itself, which is never replaced; give another --output_dir")
    model = bare_model(args)
    specs, files = shard_specs(model), shard_files(source)
    shards = len(files) if shards is None else shards
    _require_divisible(source, args, specs, shards)
    states = [open_shard(file) for file in files]
    for file, state in zip(files, states, strict=True):
        require_whole(file, state, specs)
    dims = {key: sharded_dim(model, key, spec, files, states) for key, spec in specs.items()}
    # What is made of the files gets new checksums, which would hide damage
    for file in tqdm(files, desc="checksums", unit="file", leave=False, disable=None):
        with zipfile.ZipFile(file) as archive:
            if damaged := archive.testzip():
                raise ValueError(f"{file}: damaged (checksum of {damaged} does not match)")
    with new_folder(output_dir, overwrite) as new, tqdm(total=shards * len(specs), unit="tensor", disable=None) as bar:
        for name in ("params.json", "tokenizer.model"):
            shutil.copyfile(source / name, new / name)
        for i in range(shards):
            shard = {}
            for key, tensor in states[0].items():  # in their order; some are no weights (`rope.freqs`)
                if key in specs:
                    tensor = assemble(specs[key], dims[key], [state[key] for state in states], i, shards)
                    target = tensor.dtype if dtype is None else DTYPES[dtype]
                    tensor = change(key, tensor, specs[key].dim, i, shards).to(target)
                    require_finite(tensor, f"{source}: {key}")
                    bar.update()
                shard[key] = tensor.clone()  # a view would bring the whole tensor into the file
            save_shard(shard, new / f"consolidated.{i:02d}.pth")
            del shard, tensor
    return Written(output_dir, f"shards: {len(files)} before, now {shards}")


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


def _require_divisible(source: Path, args: ModelArgs, specs: dict[str, ShardSpec], shards: int) -> None:
    if not 1 <= shards <= MAX_SHARDS:
        raise ValueError(f"{source}: can be cut into 1 to {MAX_SHARDS} shards, not {shards}")
    sizes = {} if args.n_heads % shards == 0 else {args.n_heads: ["n_heads"]}
    if args.n_kv_heads % shards and shards % args.n_kv_heads:  # beyond the number of heads, several shards share one
        sizes.setdefault(args.n_kv_heads, []).append("n_kv_heads")
    for key, (shape, dim) in specs.items():
        if dim is not None and shape[dim] % shards:
            sizes.setdefault(shape[dim], []).append(key)
    if sizes:
        numbers = ", ".join(
            f"{size} ({keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''})" for size, keys in sizes.items()
        )
        raise ValueError(f"{source}: cannot be cut into {shards} shards: {shards} does not divide {numbers}")
