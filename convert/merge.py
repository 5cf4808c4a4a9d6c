"""A plain LoRA merged into its base: W + (alpha / rank) B A, as a checkpoint in Meta's layout like any other."""

import shutil
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from convert import layout, plain_lora
from convert.shards import open_shards
from llama.checkpoint import read_base, shard_specs
from moa.lora import LoRA


class Merged(NamedTuple):
    folder: Path
    shards: int
    matrices: int  # that changed


def merge(
    ckpt_dir: str | Path,
    adapter_path: str | Path,
    output: str | Path,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Merged:
    """Write the base of `ckpt_dir` with an adapter's LoRAs in its weights, in as many shards as the base has.

    dtype: bf16, fp32 or fp16; None: each tensor keeps its own. Sums are float32. One shard's changed tensors are in
    memory at a time, the rest stays in the mapped files. Raises ValueError or OSError naming the file and what does
    not fit, is not plain LoRA or not finite; then nothing was written.
    """
    source, output = Path(ckpt_dir), layout.check_output(output, overwrite)
    args, _ = read_base(source)
    layout.require_elsewhere(output, source)
    model = plain_lora.load(adapter_path, args)
    wanted, loras = shard_specs(model), dict(plain_lora.loras(model))
    files, shards, cuts = open_shards(source, model)
    with layout.new_folder(output, overwrite) as new:
        for name in ("params.json", "tokenizer.model"):
            shutil.copyfile(source / name, new / name)
        for i, (file, shard) in enumerate(zip(files, shards, strict=True)):
            state = dict(shard)
            for key in wanted:
                kind = shard[key].dtype if dtype is None else layout.DTYPES[dtype]
                if key in loras:
                    state[key] = (shard[key].float() + _delta(loras[key], cuts[key], i, len(files))).to(kind)
                else:
                    state[key] = shard[key].to(kind)
                layout.require_finite(state[key], f"{file}: {key}{', merged,' if key in loras else ''}")
            layout.save_shard(state, new / file.name)
    return Merged(output, len(files), len(loras))


def _delta(lora: LoRA, cut: int | None, shard: int, n_shards: int) -> Tensor:
    """A shard's part of (alpha / rank) B A, float32."""
    a, b = lora.A, lora.B
    if cut == 0:
        b = b.chunk(n_shards, 0)[shard]
    elif cut == 1:
        a = a.chunk(n_shards, 1)[shard]
    return lora.scale * (b @ a)
