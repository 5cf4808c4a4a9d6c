"""Another number of shards for a checkpoint in Meta's layout, cut as Meta cuts them."""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from convert import layout
from convert.shards import Shards, State, bare_model, open_shards
from llama.args import ModelArgs
from llama.checkpoint import ShardSpec, read_base, shard_specs

MOST = 99  # consolidated.NN.pth has two digits


class Resharded(NamedTuple):
    folder: Path
    before: int  # shards
    after: int


def reshard(
    ckpt_dir: str | Path, output: str | Path, shards: int, dtype: str | None = None, overwrite: bool = False
) -> Resharded:
    """Write the checkpoint of `ckpt_dir` in `shards` files; its params.json and tokenizer.model go along unchanged.

    dtype: bf16, fp32 or fp16; None: each tensor keeps its own. One written shard is in memory at a time, the rest stays
    in the mapped files. Raises ValueError or OSError naming the file, the tensor and the sizes that do not fit or do
    not divide; then nothing was written.
    """
    source, output = Path(ckpt_dir), layout.check_output(output, overwrite)
    args, _ = read_base(source)
    layout.require_elsewhere(output, source)
    model = bare_model(args)
    wanted = shard_specs(model)
    _require_divisible(source, args, wanted, shards)
    found = open_shards(source, model)
    with (
        layout.new_folder(output, overwrite) as new,
        tqdm(total=shards * len(wanted), unit="tensor", disable=None) as bar,
    ):
        for name in ("params.json", "tokenizer.model"):
            shutil.copyfile(source / name, new / name)
        for i in range(shards):
            layout.save_shard(_shard(found, wanted, i, shards, dtype, bar), new / f"consolidated.{i:02d}.pth")
    return Resharded(output, len(found.files), shards)


def _require_divisible(source: Path, args: ModelArgs, wanted: dict[str, ShardSpec], shards: int) -> None:
    if not 1 <= shards <= MOST:
        raise ValueError(f"{source}: can be cut into 1 to {MOST} shards, not {shards}")
    sizes = {} if args.n_heads % shards == 0 else {args.n_heads: ["n_heads"]}
    if args.n_kv_heads % shards and shards % args.n_kv_heads:  # beyond the number of heads, several shards share one
        sizes.setdefault(args.n_kv_heads, []).append("n_kv_heads")
    for key, (shape, cut) in wanted.items():
        if cut is not None and shape[cut] % shards:
            sizes.setdefault(shape[cut], []).append(key)
    if sizes:
        named = (
            f"{size} ({keys[0]}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''})" for size, keys in sizes.items()
        )
        raise ValueError(f"{source}: cannot be cut into {shards} shards: {shards} does not divide {', '.join(named)}")


def _shard(found: Shards, wanted: dict[str, ShardSpec], i: int, n: int, dtype: str | None, bar: tqdm) -> State:
    """Shard `i` of `n`, copied out of those that were found."""
    state = {}
    for key, first in found.states[0].items():  # their order, and with them what is no weight (`rope.freqs`)
        if key not in wanted:
            state[key] = first.clone()
            continue
        piece = _piece(wanted[key], found.cuts[key], [tensors[key] for tensors in found.states], i, n)
        state[key] = piece if dtype is None else piece.to(layout.DTYPES[dtype])
        layout.require_finite(state[key], f"{found.files[0].parent}: {key}")
        bar.update()
    return state


def _piece(place: ShardSpec, cut: int | None, pieces: list[Tensor], i: int, n: int) -> Tensor:
    """Part `i` of `n` of a tensor, or all of one that is never cut, out of pieces that lie along `cut`; a copy."""
    if place.cut is None:
        return pieces[0].clone()
    size = place.shape[place.cut] // n
    begin = i * size
    if cut != place.cut:  # each piece has some of it
        return torch.cat([piece.narrow(place.cut, begin, size) for piece in pieces], cut or 0)
    width = pieces[0].shape[cut]
    parts = []
    for j, piece in enumerate(pieces[:: len(pieces) * width // place.shape[cut]]):  # the first of those alike
        first, last = max(begin, j * width), min(begin + size, (j + 1) * width)
        if first < last:
            parts.append(piece.narrow(cut, first - j * width, last - first))
    return torch.cat(parts, cut)
