"""A plain LoRA merged into its base: W + (alpha / rank) B A, as a checkpoint in Meta's layout like any other."""

import shutil
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from convert import meta_format
from convert.adapters import Update, load_plain_lora
from convert.shards import bare_model, open_shards
from llama.checkpoint import load_params_and_tokenizer, shard_specs


class Merged(NamedTuple):
    folder: Path
    shards: int
    matrices: int  # that changed

    def __str__(self) -> str:
        return f"wrote {self.folder} ({self.matrices} matrices changed, shards: {self.shards})"


def merge(
    ckpt_dir: str | Path,
    adapter_path: str | Path,
    output_dir: str | Path,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Merged:
    """Write the base of `ckpt_dir` with an adapter's LoRAs in its weights, in as many shards as the base has.

    dtype: bf16, fp32 or fp16; None: each tensor keeps its own. Sums are float32. Memory holds one shard's changed
    tensors, the rest stays in the mapped files. Raises ValueError or OSError naming the file and what does not fit, is
    not plain LoRA or not finite; then nothing was written.
    """
    source, output_dir = Path(ckpt_dir), meta_format.check_output(output_dir, overwrite)
    args, _ = load_params_and_tokenizer(source)
    meta_format.require_elsewhere(output_dir, source)
    _, updates = load_plain_lora(adapter_path, args)
    model = bare_model(args)
    files, states, dims = open_shards(source, model)
    with meta_format.new_folder(output_dir, overwrite) as new:
        for name in ("params.json", "tokenizer.model"):
            shutil.copyfile(source / name, new / name)
        for i, (file, shard) in enumerate(zip(files, states, strict=True)):
            state = dict(shard)
            for key in shard_specs(model):
                target_dtype = shard[key].dtype if dtype is None else meta_format.DTYPES[dtype]
                if key in updates:
                    state[key] = shard[key].float() + _piece(updates[key], dims[key], i, len(files))
                state[key] = state[key].to(target_dtype)
                meta_format.require_finite(state[key], f"{file}: {key}{', merged,' if key in updates else ''}")
            meta_format.save_shard(state, new / file.name)
    return Merged(output_dir, len(files), len(updates))


def _piece(update: Update, dim: int | None, shard: int, n_shards: int) -> Tensor:
    """A shard's part of (alpha / rank) B A, float32."""
    a, b = update.lora_A, update.lora_B
    if dim == 0:
        b = b.chunk(n_shards, 0)[shard]
    elif dim == 1:
        a = a.chunk(n_shards, 1)[shard]
    return update.scale * (b @ a)
