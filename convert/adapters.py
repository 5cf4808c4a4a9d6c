"""Adapters on their way to other formats: plain LoRA, merged into its base or exchanged, and the authors' format."""

from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from convert.meta_format import Written, bare_model, check_output, new_folder
from convert.reshard import Update, reshard
from llama.args import ModelArgs
from llama.checkpoint import load_params_and_tokenizer
from moa.adapter_file import PARAMS, adapter_file, load_adapter, save_reference_adapter
from moa.config import AdapterConfig
from moa.files import read_json
from moa.methods import META_NAMES
from moa.reference_format import unsupported_settings
from moa.state import check_state_dict, require_same_keys

# Types of adapters that other formats can express, each alone: what it is called, its settings that they can express,
# and its tensors.
KINDS = {
    "lora": ("plain LoRA", ("layers", "targets", "rank", "alpha", "rslora", "lr_ratio"), ("lora_A", "lora_B")),
    "dora": ("DoRA alone", ("layers", "targets", "rank", "alpha"), ("lora_A", "lora_B", "magnitude")),
    "ia3": ("IA3 alone", ("layers", "targets"), ("factor",)),
    "vera": ("VeRA alone", ("layers", "targets", "rank", "seed"), ("lambda_d", "lambda_b")),
}
# Settings beside an adapter's own, and the values that they may have.
BESIDE: dict[str, Collection] = {"block_router": ("none",), "expert_num": (1,), "train_bias_norm": (False,)}
ADAPTER_FILES = ("adapter.pth", PARAMS)  # of an output folder


def merge(
    ckpt_dir: str | Path,
    adapter_path: str | Path,
    output_dir: str | Path,
    dtype: str | None = None,
    overwrite: bool = False,
) -> Written:
    """Write a base with an adapter's LoRAs in its weights, W + (alpha / rank) B A, in as many shards as it has.

    dtype: bf16, fp32 or fp16; None: each tensor keeps its own. Raises ValueError or OSError naming the file and what
    does not fit, is not plain LoRA or not finite; then nothing was written.
    """
    args, _ = load_params_and_tokenizer(ckpt_dir)
    config, state = load_adapter(adapter_path, args)
    check_alone(config, state, args, str(adapter_path), "lora")
    scale = config.adapters["lora"].scale
    updates = {
        key: Update(state[f"{lora}.lora_A"].float(), state[f"{lora}.lora_B"].float(), scale)
        for key, lora in adapter_keys(config).items()
    }
    written = reshard(ckpt_dir, output_dir, None, dtype, overwrite, updates)
    return written._replace(summary=f"matrices changed: {len(updates)}, {written.summary}")


def kind_of(config: AdapterConfig) -> str:
    """The first of KINDS that stands in some layer; lora where none does."""
    return next((kind for kind in KINDS if config.adapters[kind].layers), "lora")


def require_alone(config: AdapterConfig, origin: str, kind: str = "lora") -> None:
    """ValueError naming all settings that make more of an adapter than adapters of this kind at linear layers."""
    name, settings, _ = KINDS[kind]
    unsupported = unsupported_settings(config, BESIDE | dict.fromkeys(f"{kind}_{setting}" for setting in settings))
    if unsupported:
        raise ValueError(f"{origin}: only {name} can be converted, but this adapter has {', '.join(unsupported)}")


def adapter_keys(config: AdapterConfig) -> dict[str, str]:
    """Meta's key of each weight with an adapter (`layers.0.attention.wq.weight`) -> our key of that adapter."""
    return {
        f"layers.{layer}.{META_NAMES[slot.target]}.weight": f"layers.{layer}.{part}.adapters.{slot.name}"
        for layer in range(config.n_layers)
        for slot in config.slots(layer)
        for part in [META_NAMES[slot.target].partition(".")[0]]
    }


def check_alone(config: AdapterConfig, state: dict[str, Tensor], args: ModelArgs, origin: str, kind: str) -> None:
    """ValueError, beginning with `origin`, unless an adapter is of this kind and nothing else: its settings, the names
    of its tensors, and their shapes for a base of this shape."""
    require_alone(config, origin, kind)
    keys = [f"{key}.{name}" for key in adapter_keys(config).values() for name in KINDS[kind][2]]
    require_same_keys(keys, state, origin, "tensor")
    check_state_dict(bare_model(args, config), state, origin)


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
    path = adapter_file(adapter_path).with_name(PARAMS)
    base = read_json(path).get("base")
    if base is None:
        raise ValueError(f"{path}: does not tell the shape of the adapter's base; give the base as --ckpt_dir")
    try:
        return ModelArgs.from_dict(base)
    except ValueError as error:
        raise ValueError(f"{path}: base: {error}") from None
