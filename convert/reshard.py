"""A checkpoint in Meta's layout in another number of shards, cut as Meta cuts them."""

import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

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
    require_shapes,
    require_whole,
    shard_files,
    shard_specs,
)
from llama.model import Transformer

MAX_SHARDS = 99  # consolidated.NN.pth has two digits
State = dict[str, Tensor]


class Update(NamedTuple):
    """What is added to a weight (out, in): scale * B A."""

    lora_A: Tensor  # (r, in)
    lora_B: Tensor  # (out, r)
    scale: float

    def part(self, dim: int | None, index: int, n: int) -> Tensor:
        """Part `index` of `n` along a dimension, float32."""
        a = self.lora_A.chunk(n, 1)[index] if dim == 1 else self.lora_A
        b = self.lora_B.chunk(n, 0)[index] if dim == 0 else self.lora_B
        return self.scale * (b @ a)


def reshard(
    ckpt_dir: str | Path,
    output_dir: str | Path,
    shards: int | None,
    dtype: str | None = None,
    overwrite: bool = False,
    updates: Mapping[str, Update] | None = None,
) -> Written:
    """Write the checkpoint of `ckpt_dir` in `shards` files, with its params.json and tokenizer.model unchanged.

    shards: None for as many as there are. dtype: bf16, fp32 or fp16; None: each tensor keeps its own. updates: Meta's
    key -> what is added to that weight, in float32. Memory holds one written shard; what is read stays in the mapped
    files. Raises ValueError or OSError naming the file, the tensor and the sizes that do not fit or divide; then
    nothing was written.
    """
    source, output_dir = Path(ckpt_dir), check_output(output_dir, overwrite)
    args, _ = load_params_and_tokenizer(source)
    if output_dir.exists() and output_dir.samefile(source):
        raise ValueError(f"{output_dir}: is the base itself, which is never replaced; give another --output_dir")
    model, updates = bare_model(args), updates or {}
    specs, files = shard_specs(model), shard_files(source)
    shards = len(files) if shards is None else shards
    _require_divisible(source, args, specs, shards)
    states = [open_shard(file) for file in files]
    for file, state in zip(files, states, strict=True):
        require_whole(file, state, specs)
    for key, spec in specs.items():
        require_consistent(model, key, spec, files, states)
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
                    tensor = assemble(specs[key], [state[key] for state in states], i, shards)
                    target = tensor.dtype if dtype is None else DTYPES[dtype]
                    if key in updates:
                        tensor = tensor.float() + updates[key].part(specs[key].dim, i, shards)
                    tensor = tensor.to(target)
                    require_finite(tensor, f"{source}: {key}")
                    bar.update()
                shard[key] = tensor.clone()  # a view would bring the whole tensor into the file
            save_shard(shard, new / f"consolidated.{i:02d}.pth")
            del shard, tensor
    return Written(output_dir, args, f"shards: {len(files)} before, now {shards}", [])


def require_consistent(model: Transformer, key: str, spec: ShardSpec, files: list[Path], states: list[State]) -> None:
    """ValueError naming file and tensor where a piece has another shape or type than it should, or where files that
    should hold the same piece do not."""
    heads = getattr(model.get_submodule(key.rpartition(".")[0]), "heads", None)  # of keys and values, at wk and wv
    require_shapes(key, spec, files, states, heads)
    first = states[0][key]
    # of each piece
    copies = len(files) if spec.dim is None else first.shape[spec.dim] * len(files) // spec.shape[spec.dim]
    for i, (file, state) in enumerate(zip(files, states, strict=True)):
        if state[key].dtype != first.dtype:
            raise ValueError(f"{file}: {key} has type {state[key].dtype}, in {files[0].name} {first.dtype}")
        j = i - i % copies
        # As bytes, since NaN is not equal to itself
        if i != j and not torch.equal(*(tensors[key].contiguous().view(torch.uint8) for tensors in (state, states[j]))):
            raise ValueError(f"{file}: {key} differs from that in {files[j].name}, which should be the same")


def _require_divisible(source: Path, args: ModelArgs, specs: dict[str, ShardSpec], shards: int) -> None:
    if not 1 <= shards <= MAX_SHARDS:
        raise ValueError(f"{source}: can be cut into 1 to {MAX_SHARDS} shards, not {shards}")
    sizes = [(args.n_heads, "n_heads")]
    if shards % args.n_kv_heads:  # else several shards share a head
        sizes.append((args.n_kv_heads, "n_kv_heads"))
    sizes += [(shape[dim], key) for key, (shape, dim) in specs.items() if dim is not None]
    first_of = {size: name for size, name in reversed(sizes) if size % shards}
    if first_of:
        numbers = ", ".join(f"{size} ({first_of[size]})" for size in dict(sizes) if size in first_of)
        raise ValueError(f"{source}: cannot be cut into {shards} shards: {shards} does not divide {numbers}")
