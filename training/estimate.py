"""What a run will need, from sizes alone: for `--dry_run`, before any weight is read.

Activations are what the backward pass keeps, counted per token and layer from the formulas of `llama.model`; matrices
of the frozen base need none of their inputs, only the adapters do.
"""

from llama.args import ModelArgs
from llama.checkpoint import placements
from llama.loss import CHUNK_ELEMENTS
from llama.model import Transformer
from moa.config import AdapterConfig
from moa.state import count


def base_parameters(model: Transformer) -> int:
    """Parameters of the whole base."""
    total = 0
    for shape, _ in placements(model).values():
        size = 1
        for n in shape:
            size *= n
        total += size
    return total


def activation_bytes(args: ModelArgs, config: AdapterConfig | None, tokens: int, width: int, recompute: bool) -> int:
    """Bytes kept for the backward pass of a micro-batch of `tokens` tokens; width: bytes per number of the base."""
    dim, kv, ffn = args.dim, args.n_kv_heads * args.head_dim, args.ffn_dim
    slots = max(len(config.slots(layer)) for layer in range(args.n_layers)) if config else 0
    # Norms keep their input and its normed float32; attention q, k, v before and after the rotation and its output;
    # the feed-forward block its three wide products; adapters their inputs and narrow middles.
    layer = dim * (2 * width + 2 * 4) + (2 * dim + 3 * kv + 3 * dim) * width + 4 * ffn * width
    layer += slots * 64 * width
    kept = args.n_layers * dim * width + layer if recompute else args.n_layers * layer
    return tokens * (kept + 2 * dim * width)


def estimate(
    model: Transformer, bf16: bool, batch_size: int, max_seq_len: int, recompute: bool, ranks: int
) -> dict[str, int]:
    """Bytes on each of `ranks` model-parallel ranks, by what takes them, for micro-batches of the longest rows."""
    width = 2 if bf16 else 4
    trained = count(model)["total"]
    parts = {
        "base": base_parameters(model) * width // ranks,
        "adapters": trained * 4,
        "gradients": trained * 4,
        "optimizer": trained * 8,
        "activations": activation_bytes(model.args, model.config, batch_size * max_seq_len, width, recompute),
        "logits": 3 * 4 * min(CHUNK_ELEMENTS, batch_size * max_seq_len * model.args.vocab_size // ranks),
    }
    return parts | {"total": sum(parts.values())}
