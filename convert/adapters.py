"""Adapters on their way to other formats: plain LoRA, merged into its base or exchanged, and the authors' format."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from convert.meta_format import Written, bare_model, check_output, new_folder
from convert.reshard import reshard
from llama.args import ModelArgs
from llama.checkpoint import load_params_and_tokenizer
from moa.adapter_file import PARAMS, load_adapter, save_reference_adapter
from moa.config import AdapterConfig
from moa.files import read_json
from moa.methods import META_NAMES
from moa.reference_format import unsupported_settings
from moa.state import check_state_dict, require_same_keys

# The settings that W + scale * B A can express, and the values that they may have (None: all).
EXPRESSIBLE: dict[str, Collection | None] = {
    **dict.fromkeys(("lora_layers", "lora_targets", "lora_rank", "lora_alpha", "lora_rslora", "lora_lr_ratio")),
    **{"block_router": ("none",), "expert_num": (1,), "train_bias_norm": (False,)},
}
ADAPTER_FILES = ("adapter.pth", PARAMS)  # of an output folder


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


def merge(
    ckpt_dir: str | Path,
    adapter_path: str | Path,
    output_dir: str | Path,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Written:
    """Write a base with an adapter's LoRAs in its weights, W + (alpha / rank) B A, in as many shards as it has.

    dtype: bf16, fp32 or fp16; None: each tensor keeps its own. Sums are float32. Raises ValueError or OSError naming
    the file and what does not fit, is not plain LoRA or not finite; then nothing was written.
    """
    args, _ = load_params_and_tokenizer(ckpt_dir)
    _, updates = load_plain_lora(adapter_path, args)

    def add(key: str, tensor: Tensor, dim: int | None, index: int, n: int) -> Tensor:
        return tensor.float() + updates[key].part(dim, index, n) if key in updates else tensor

    written = reshard(ckpt_dir, output_dir, None, dtype, overwrite, add)
    return written._replace(summary=f"matrices changed: {len(updates)}, {written.summary}")


def require_plain_lora(config: AdapterConfig, origin: str) -> None:
    """ValueError naming all settings that make more of an adapter than W + (alpha / rank) B A at linear layers."""
    unsupported = unsupported_settings(config, EXPRESSIBLE)
    if unsupported:
        raise ValueError(f"{origin}: only plain LoRA can be converted, but this adapter has {', '.join(unsupported)}")


def lora_keys(config: AdapterConfig) -> dict[str, str]:
    """Meta's key of each weight that a plain LoRA changes (`layers.0.attention.wq.weight`) -> our key of that LoRA."""
    return {
        f"layers.{layer}.{META_NAMES[slot.target]}.weight": f"layers.{layer}.{part}.adapters.{slot.name}"
        for layer in range(config.n_layers)
        for slot in config.slots(layer)
        for part in [META_NAMES[slot.target].partition(".")[0]]
    }


def check_plain_lora(config: AdapterConfig, state: dict[str, Tensor], args: ModelArgs, origin: str) -> None:
    """ValueError, beginning with `origin`, unless an adapter is plain LoRA: its settings, the names of its tensors, and
    their shapes for a base of this shape."""
    require_plain_lora(config, origin)
    keys = [f"{lora}.lora_{ab}" for lora in lora_keys(config).values() for ab in "AB"]
    require_same_keys(keys, state, origin, "tensor")
    check_state_dict(bare_model(args, config), state, origin)


def load_plain_lora(adapter_path: str | Path, args: ModelArgs) -> tuple[AdapterConfig, dict[str, Update]]:
    """Read an adapter file for a base of this shape: its configuration, and Meta's key of each weight that changes ->
    what is added to it, float32. Raises ValueError naming the file, and what does not fit or is not plain LoRA."""
    config, state = load_adapter(adapter_path, args)
    check_plain_lora(config, state, args, str(adapter_path))
    scale = config.adapters["lora"].scale
    updates = {
        key: Update(state[f"{lora}.lora_A"].float(), state[f"{lora}.lora_B"].float(), scale)
        for key, lora in lora_keys(config).items()
    }
    return config, updates


def to_reference(adapter_path: str | Path, output_dir: str | Path, overwrite: bool = False) -> Path:
    """Write an adapter of ours in the format of the paper's authors. ValueError or OSError naming the file, and the
    setting or tensor that the format cannot express; then nothing was written."""
    output_dir = check_output(output_dir, overwrite, ADAPTER_FILES)
    config, state = load_adapter(adapter_path, recorded_shape(Path(adapter_path)))
    with new_folder(output_dir, overwrite, ADAPTER_FILES) as new:
        try:
            save_reference_adapter(new, state, config)
        except ValueError as error:
            raise ValueError(f"{adapter_path}: {error}") from None
    return output_dir


def recorded_shape(adapter_path: Path) -> ModelArgs:
    """Return the shape of the base that an adapter of ours was trained on. ValueError naming the file."""
    path = adapter_path / PARAMS if adapter_path.is_dir() else adapter_path.with_name(PARAMS)
    base = read_json(path).get("base")
    if base is None:
        raise ValueError(f"{path}: does not tell the shape of the adapter's base; give the base as --ckpt_dir")
    try:
        return ModelArgs.from_dict(base)
    except ValueError as error:
        raise ValueError(f"{path}: base: {error}") from None
