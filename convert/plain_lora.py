"""Adapters that are plain LoRA, the part of ours that other formats and the base's own weights can express."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from llama.args import ModelArgs
from llama.distributed import init_distributed
from llama.model import Transformer
from moa.adapter_file import load_adapter
from moa.config import AdapterConfig
from moa.lora import LoRA
from moa.state import load_adapter_state_dict

# LoRA's site -> the linear layer there, by Meta's name within the attention or the feed-forward block.
LINEAR = {"Q": "wq", "K": "wk", "V": "wv", "O": "wo", "FFN_UP": "w3", "FFN_GATE": "w1", "FFN_DOWN": "w2"}
TARGETS = {linear: site for site, linear in LINEAR.items()}


def require_plain(config: AdapterConfig, origin: str) -> None:
    """ValueError naming all that is more than W + (alpha / rank) B A at some linear layers."""
    more = [
        f"adapters of kind {kind} (layers {knobs.layers})"
        for kind, knobs in config.adapters.items()
        if kind != "lora" and knobs.layers
    ]
    if config.router.block_router != "none":
        more.append(f"a router (block_router {config.router.block_router})")
    if config.experts.expert_num > 1:
        more.append(f"{config.experts.expert_num} experts in each adapter's place (expert_num)")
    if config.base.train_bias_norm:
        more.append("trained biases and norms (train_bias_norm)")
    if more:
        raise ValueError(f"{origin}: only plain LoRA can be converted, but this adapter has {', '.join(more)}")


def load(adapter_path: str | Path, args: ModelArgs) -> Transformer:
    """A model of the base's shape, without its weights, with the plain LoRAs of an adapter file in it.

    Raises ValueError naming the file, and what does not fit or is not plain LoRA.
    """
    config, state = load_adapter(adapter_path, asdict(args))
    require_plain(config, str(adapter_path))
    init_distributed(torch.device("cpu"))
    model = Transformer(args, config)
    load_adapter_state_dict(model, state, str(adapter_path))
    return model.requires_grad_(False)


def loras(model: Transformer) -> Iterator[tuple[str, LoRA]]:
    """(Meta's key of the weight that it changes, LoRA) for each LoRA of a model: `layers.0.attention.wq.weight`."""
    for path, module in model.named_modules():
        if isinstance(module, LoRA):
            block, _, slot = path.partition(".adapters.")
            yield f"{block}.{LINEAR[slot.removeprefix('lora_')]}.weight", module
