"""Another number of shards for a checkpoint in Meta's layout, cut as Meta cuts them."""

import shutil
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from convert import meta_format
from convert.shards import bare_model, open_shards
from llama.args import ModelArgs
from llama.checkpoint import ShardSpec, assemble, load_params_and_tokenizer, shard_specs

MAX_SHARDS = 99  # consolidated.NN.pth has two digits


class Resharded(NamedTuple):
    folder: Path
    shards_before: int
    shards_after: int

    def __str__(self) -> str:
        return f"wrote {self.folder} (shards: {self.shards_before} before, now {self.shards_after})"


def reshard(
    ckpt_dir: str | Path, output_dir: str | Path, shards: int, dtype: str | None = None, overwrite: bool = False
) -> Resharded:
    """Write the checkpoint of `ckpt_dir` in `shards` files, with its params.json and tokenizer.model unchanged.

    dtype: bf16, fp32 or fp16; None: each tensor keeps its own. Memory holds one written shard; what is read stays in
    the mapped files. Raises ValueError or OSError naming the file, the tensor and the sizes that do not fit or do not
    divide; then nothing was written.
    """
    source, output_dir = Path(ckpt_dir), meta_format.check_output(output_dir, overwrite)
    args, _ = load_params_and_tokenizer(source)
    meta_format.require_elsewhere(output_dir, source)
    model = bare_model(args)
    specs = shard_specs(model)
    _require_divisible(source, args, specs, shards)
    files, states, dims = open_shards(source, model)
    with (
        meta_format.new_folder(output_dir, overwrite) as new,
        tqdm(total=shards * len(specs), unit="tensor", disable=None) as bar,
    ):
        for name in ("params.json", "tokenizer.model"):
            shutil.copyfile(source / name, new / name)
        for i in range(shards):
            shard = {}
            for key, tensor in states[0].items():  # in their order; some are no weights (`rope.freqs`)
                if key in specs:
                    pieces = [state[key] for state in states]
                    tensor = assemble(specs[key], dims[key], pieces, i, shards)
                    tensor = tensor if dtype is None else tensor.to(meta_format.DTYPES[dtype])
                    meta_format.require_finite(tensor, f"{source}: {key}")
                    bar.update()
                shard[key] = tensor.clone()  # a view would bring the whole tensor into the file
            meta_format.save_shard(shard, new / f"consolidated.{i:02d}.pth")
            del shard, tensor
    return Resharded(output_dir, len(files), shards)


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
