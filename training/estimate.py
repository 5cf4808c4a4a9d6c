"""What a run will need, from sizes alone: for `--dry_run`, before any weight is read.

Activations are what the backward pass keeps: matrices of the frozen base need none of their inputs, adapters do. Under
model parallelism they are counted as if whole, which is too much.
"""

import math

import torch

from llama.checkpoint import placements
from llama.loss import CHUNK_ELEMENTS
from llama.model import Transformer
from moa.state import count


def base_parameters(model: Transformer) -> int:
    """Parameters of the whole base."""
    return sum(math.prod(shape) for shape, _ in placements(model).values())


def activation_bytes(model: Transformer, tokens: int, bf16: bool, device: torch.device, recompute: bool) -> int:
    """Bytes kept for the backward pass of a micro-batch of `tokens` tokens.

    Per token and layer, in numbers of the base's type: the feed-forward block's gate, its silu, up and their product
    (4F); the blocks' inputs and outputs, normed inputs, rotated queries, heads' outputs (7D); in float32 the norms'
    inputs (2D); in attention's type q, k, v and its output (2D + 2 kv); float32 router middles; the adapters' rank.
    """
    args, config, width = model.args, model.config, 2 if bf16 else 4
    attention = 4 if device.type == "cpu" else width
    kv = args.n_kv_heads * args.head_dim
    layer = width * (4 * args.ffn_dim + 7 * args.dim) + 4 * 2 * args.dim + attention * (2 * args.dim + 2 * kv)
    if config is not None:
        slots = max(len(config.slots(i)) for i in range(args.n_layers))
        layer += slots * (
            16 * config.router.swi_x + 2 * width * config.adapters["lora"].rank * config.experts.expert_num
        )
    kept = args.n_layers * args.dim * width + layer if recompute else args.n_layers * layer
    return tokens * kept


def estimate(
    model: Transformer, bf16: bool, device: torch.device, tokens: int, recompute: bool, ranks: int
) -> dict[str, int]:
    """Bytes on each of `ranks` model-parallel ranks, by what takes them, for micro-batches of `tokens` tokens."""
    trained = count(model)["total"]
    parts = {
        "base": base_parameters(model) * (2 if bf16 else 4) // ranks,
        "adapters": trained * 4,
        "gradients": trained * 4,
        "optimizer": trained * 8,
        "activations": activation_bytes(model, tokens, bf16, device, recompute),
        "logits": 3 * 4 * min(CHUNK_ELEMENTS, tokens * model.args.vocab_size // ranks),
    }
    return parts | {"total": sum(parts.values())}
