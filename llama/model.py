"""LLaMA-3 with adapters beside its layers, after the paper's figure:

    g   = gates of the block's adapters, from its router, computed on x
    y   = x + Attention(norm(x); g)
    out = y + FeedForward(norm(y); g) + g_parallel * ParallelAdapter(norm(y))

Layer names are Meta's. Inside, a batch is packed (`llama.packing`): the N tokens of all sequences, end to end, without
padding. Shapes: B sequences of T tokens at the interface, N tokens inside, D model width, H query heads, K key/value
heads, h head width, F feed-forward width, V vocabulary. Under model parallelism H, K, F and V are this rank's shards;
with more ranks than key/value heads K is 1, and neighbouring ranks hold the same one.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from llama.args import ModelArgs
from llama.data import IGNORE_INDEX
from llama.kv_cache import KVCache
from llama.packing import PackedBatch, async_to_device
from llama.parallel_layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding, meta_parameter
from moa.adapter import Target
from moa.bias_norm import TrainableNormWeight
from moa.block import AdapterDict, Routing, build_router
from moa.config import AdapterConfig, Slot
from moa.expert_routers import RouterStats, stack_stats
from moa.parallel import copy_to_model_parallel_region, divide, num_kv_shards
from moa.routers import Gates


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight. With `train_bias_norm` its weight trains, beside the base's.

    of_heads: x is this rank's heads, (N, heads, h), so that its gradient of a trained weight is a part of a sum.
    """

    def __init__(self, dim: int, eps: float, config: AdapterConfig | None = None, of_heads: bool = False):
        super().__init__()
        self.eps, self.of_heads = eps, of_heads
        self.weight = meta_parameter(dim)
        trained = config is not None and config.train_bias_norm
        self.adapters = nn.ModuleDict({"norm": TrainableNormWeight(dim, lambda: self.weight)} if trained else {})

    def current_weight(self, dtype: torch.dtype) -> Tensor:
        if not self.adapters:
            return self.weight
        weight = self.adapters["norm"].weight.to(dtype)
        return copy_to_model_parallel_region(weight) if self.of_heads else weight

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.current_weight(x.dtype), self.eps)


def rope_frequencies(args: ModelArgs) -> Tensor:
    """(h/2,) float32: radians per position of each pair of a head's components (arXiv 2104.09864).

    With `use_scaled_rope` (LLaMA-3.1), pairs whose wavelength exceeds the original context / low_freq_factor turn
    `rope_scaling_factor` times slower, those below context / high_freq_factor stay, those between are interpolated.
    """
    exponents = torch.arange(0, args.head_dim, 2, dtype=torch.float32) / args.head_dim
    freqs = 1.0 / args.rope_theta**exponents
    if not args.use_scaled_rope:
        return freqs
    turns = args.rope_original_max_seq_len * freqs / (2 * math.pi)  # full turns within the original context
    low, high = args.rope_low_freq_factor, args.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return freqs * (kept + (1 - kept) / args.rope_scaling_factor)


def precompute_freqs_cis(freqs: Tensor, positions: Tensor) -> Tensor:
    """positions (...) -> (..., h/2) complex64 of length 1: the rotation of each pair of components."""
    angles = positions.float()[..., None] * freqs
    return torch.complex(angles.cos(), angles.sin())


def apply_rotary_emb(x: Tensor, freqs_cis: Tensor) -> Tensor:
    """Rotate x (N, heads, h) by freqs_cis (N, h/2). Components 2i and 2i + 1 are a pair, as in Meta's checkpoints."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * freqs_cis[:, None]).flatten(-2).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
    """q (N, H, h), k and v (N, K, h) -> (N, H, h): a token attends to itself and the earlier ones of its sequence."""
    q, k, v = (t.transpose(0, 1) for t in (q, k, v))  # (heads, N, h)
    parts = [(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in batch.spans]
    heads = [F.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
    return torch.cat(heads, 1).transpose(0, 1)


def decode_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One new token per sequence, q (R, H, h), over k and v (R, T, K, h) -> (R, H, h). mask (R, 1, 1, T), additive.

    The H/K query heads that share a key head are treated as that many queries of one head: nothing is repeated.
    """
    q = q.unflatten(1, (k.shape[2], -1))  # (R, K, H/K, h)
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1, 2)


class ForwardContext(NamedTuple):
    """What all blocks of one forward pass share.

    batch: the packed sequences; None in a decode step, which has one token of every cached sequence.
    cache, cache_rows: in a prefill the cache, and the rows of it where the sequences go.
    """

    batch: PackedBatch | None
    freqs_cis: Tensor  # (N, h/2)
    cache: KVCache | None = None
    cache_rows: list[int] | None = None
    activation_checkpointing: str = "none"


class Attention(nn.Module):
    causal_attention = staticmethod(causal_attention)
    decode_attention = staticmethod(decode_attention)

    def __init__(self, args: ModelArgs, config: AdapterConfig | None, slots: list[Slot], layer: int):
        super().__init__()
        dim, heads, kv = args.dim, args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        self.layer, self.head_dim = layer, args.head_dim
        self.wq = ColumnParallelLinear(dim, heads)
        self.wk = ColumnParallelLinear(dim, kv, args.n_kv_heads)
        self.wv = ColumnParallelLinear(dim, kv, args.n_kv_heads)
        self.wo = RowParallelLinear(heads, dim)
        self.q_norm, self.k_norm = (
            RMSNorm(args.head_dim, args.norm_eps, config, of_heads=True) if args.qk_norm else nn.Identity()
            for _ in ("q", "k")
        )
        kv_shards = num_kv_shards(args.n_kv_heads)
        targets = {
            "wq": Target(dim, heads, "column", args.n_heads, [self.wq]),
            "wk": Target(dim, kv, "column", args.n_heads, [self.wk], kv_shards),
            "wv": Target(dim, kv, "column", args.n_heads, [self.wv], kv_shards),
            "attention": Target(dim, heads, "column", args.n_heads, [self.wk, self.wv, self.k_norm]),
            "wo": Target(heads, dim, "row", args.n_heads, [self.wo]),
        }
        self.adapters = AdapterDict(config, slots, targets)

    def forward(self, x: Tensor, routing: Routing, context: ForwardContext) -> Tensor:
        """x (N, D), normed -> (N, D)."""
        shared = copy_to_model_parallel_region(x)
        q = self.adapters.apply("wq", self.wq(shared), x, routing)
        k = self.adapters.apply("wk", self.wk(shared), x, routing)
        v = self.adapters.apply("wv", self.wv(shared), x, routing)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))  # (N, H or K, h)
        q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rotary_emb(q, context.freqs_cis), apply_rotary_emb(k, context.freqs_cis)
        heads = self.attend(q, k, v, context)
        heads = self.adapters.apply("attention", heads, x, routing, q).flatten(1)
        return self.adapters.apply("wo", self.wo(heads), heads, routing)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, context: ForwardContext) -> Tensor:
        """q (N, H, h), k and v (N, K, h) -> (N, H, h)."""
        cache, batch = context.cache, context.batch
        if batch is None:
            return self.decode_attention(q, *cache.append(self.layer, k, v), cache.mask)
        if cache is not None:
            cache.prefill(self.layer, context.cache_rows, batch.spans, k, v)
        return self.causal_attention(q, k, v, batch)


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs, config: AdapterConfig | None, slots: list[Slot]):
        super().__init__()
        dim, hidden = args.dim, args.ffn_dim
        self.w1 = ColumnParallelLinear(dim, hidden)
        self.w2 = RowParallelLinear(hidden, dim)
        self.w3 = ColumnParallelLinear(dim, hidden)
        targets = {
            "w1": Target(dim, hidden, "column", args.n_heads, [self.w1]),
            "w2": Target(hidden, dim, "row", args.n_heads, [self.w2]),
            "w3": Target(dim, hidden, "column", args.n_heads, [self.w3]),
            "FFN": Target(dim, dim, None, args.n_heads, [self.w2]),
        }
        self.adapters = AdapterDict(config, slots, targets)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (N, D), normed -> (N, D)."""
        shared = copy_to_model_parallel_region(x)
        up = self.adapters.apply("w3", self.w3(shared), x, routing)
        gate = self.adapters.apply("w1", self.w1(shared), x, routing)
        hidden = F.silu(gate) * up  # (N, F)
        out = self.adapters.apply("w2", self.w2(hidden), hidden, routing)
        return self.adapters.apply("FFN", out, x, routing, gate, up)


class TransformerBlock(nn.Module):
    def __init__(self, layer: int, args: ModelArgs, config: AdapterConfig | None):
        super().__init__()
        config = config.at_layer(layer) if config else None
        slots = config.slots(layer) if config else []
        self.layer = layer
        self.attention_norm = RMSNorm(args.dim, args.norm_eps, config)
        self.attention = Attention(args, config, slots, layer)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps, config)
        self.feed_forward = FeedForward(args, config, slots)
        self.adapters = AdapterDict(config, slots, {"block": Target(args.dim, args.dim, None, args.n_heads)})
        self.router = build_router(config, slots, args.dim)

    def forward(self, x: Tensor, context: ForwardContext) -> tuple[Tensor, list[RouterStats]]:
        """x (N, D) -> (N, D), and the statistics of the block's routers of experts."""
        routing = Routing(self.gates(x, context))
        y = x + self.attention(self.attention_norm(x), routing, context)
        selective = context.activation_checkpointing == "selective"
        out, stats = maybe_checkpoint(self.ffn_half, y, routing.gates, enabled=selective)
        return out, routing.stats + stats

    def ffn_half(self, y: Tensor, gates: Gates) -> tuple[Tensor, list[RouterStats]]:
        routing, z = Routing(gates), self.ffn_norm(y)
        out = y + self.feed_forward(z, routing)
        return self.adapters.apply("block", out, z, routing), routing.stats

    def gates(self, x: Tensor, context: ForwardContext) -> Gates:
        """(N, 1) by slot. A per-sequence router runs once, at prefill; decode steps read its gates from the cache."""
        if self.router is None:
            return {}
        if not self.router.per_sequence:
            return self.router(x)
        batch, cache = context.batch, context.cache
        if batch is None:
            return cache.load_gates(self.layer)
        gates = {slot: gate.to(x.dtype) for slot, gate in self.router(batch.mean_over_prompt(x)).items()}
        if cache is not None:
            cache.store_gates(self.layer, context.cache_rows, gates)
        return {slot: batch.expand_to_tokens(gate) for slot, gate in gates.items()}


def maybe_checkpoint(fn: Callable[..., Any], *inputs: Any, enabled: bool) -> Any:
    """Run `fn`; under activation checkpointing save its inputs alone and recompute it in the backward pass."""
    return checkpoint(fn, *inputs, use_reentrant=False) if enabled else fn(*inputs)


class Losses(NamedTuple):
    """ce_loss: sum of -log p(label) over the label tokens, float32. router_stats: of all routers of experts, stacked,
    (routers, E); None where no router chooses among experts."""

    ce_loss: Tensor
    router_stats: RouterStats | None


class Transformer(nn.Module):
    """The model. Base weights are on the meta device until a checkpoint is loaded; adapters are uninitialised until
    `moa.state.reset_adapters`.

    activation_checkpointing: what the backward pass recomputes: nothing ("none"), the second half of each block
    ("selective"), or whole blocks ("full").
    """

    def __init__(self, args: ModelArgs, config: AdapterConfig | None = None):
        super().__init__()
        assert args.vocab_size > 0, "vocab_size must be known here"
        assert config is None or config.n_layers == args.n_layers
        self.args, self.config = args, config
        self.activation_checkpointing = "none"
        for name, size in (("n_heads", args.n_heads), ("the feed-forward width", args.ffn_dim)):
            divide(size, name)
        self.tok_embeddings = VocabParallelEmbedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(i, args, config) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps, config)
        self.output = ColumnParallelLinear(args.dim, args.vocab_size, gather_output=True)
        self.rope_freqs = rope_frequencies(args)
        self.freqs_cis = self.rope_freqs.new_empty(0, args.head_dim // 2, dtype=torch.complex64)

    def assign_base(self, weights: Mapping[str, Tensor]) -> None:
        """Take this rank's base weights, by their keys. Tied embeddings, which are sharded alike, become one tensor."""
        self.load_state_dict(weights, strict=False, assign=True)
        if self.args.tied_embeddings:
            self.output.weight = self.tok_embeddings.weight

    def forward(
        self,
        tokens: Tensor,
        prompt_lens: list[int] | None = None,
        *,
        labels: Tensor | None = None,
        batch: PackedBatch | None = None,
    ) -> Tensor | Losses:
        """tokens (B, T) int64, or packed (N,) with their `batch` -> float32 logits (B, T, V) or (N, V).

        With labels, shaped as tokens and aligned with them (the shift by one happens here; IGNORE_INDEX where nothing
        is learned): the losses, for which logits are computed only where a label is predicted. Labels on the CPU save a
        wait for the GPU. prompt_lens: prompt tokens of each sequence (default: all), for per-sequence routers.
        """
        if batch is None:
            batch = PackedBatch([tokens.shape[1]] * len(tokens), tokens.device, prompt_lens)
        hidden, stats = self.forward_hidden(tokens.flatten(), batch)
        if labels is None:
            return self.output(copy_to_model_parallel_region(hidden)).float().unflatten(0, tokens.shape)
        labels = labels.flatten().cpu()
        is_label = labels != IGNORE_INDEX
        is_label[[begin for begin, _ in batch.spans]] = False  # no token precedes a sequence's first
        positions = is_label.nonzero().squeeze(1)
        predicting, labels = (async_to_device(t, hidden.device) for t in (positions - 1, labels[positions]))
        ce_loss = self.cross_entropy(hidden[predicting], labels)
        return Losses(ce_loss, stack_stats(stats) if stats else None)

    def cross_entropy(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Sum of -log p(label), float32. hidden (M, D): at the positions that predict labels (M,)."""
        logits = self.output(copy_to_model_parallel_region(hidden))
        at_least_float32 = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.to(at_least_float32), labels, reduction="sum")

    def loss(self, tokens: Tensor, labels: Tensor, prompt_lens: list[int] | None = None) -> Tensor:
        """Mean cross-entropy over the label tokens plus the method's auxiliary loss, a float32 scalar.

        tokens, labels (B, T). ValueError where no label is left or one is no token.
        """
        if tokens.shape != labels.shape:
            raise ValueError(f"labels {tuple(labels.shape)} must have the shape of tokens {tuple(tokens.shape)}")
        used = labels[:, 1:][labels[:, 1:] != IGNORE_INDEX]
        if not len(used):
            raise ValueError("no label token: nothing to learn from")
        if used.min() < 0 or used.max() >= self.args.vocab_size:
            raise ValueError(f"a label is neither {IGNORE_INDEX} nor one of the {self.args.vocab_size} tokens")
        losses = self(tokens, prompt_lens, labels=labels)
        loss, stats = losses.ce_loss / len(used), losses.router_stats
        if stats is None:
            return loss
        return loss + self.load_balancing_loss(stats, stats.tokens_per_expert / tokens.numel()) / tokens.numel()

    def load_balancing_loss(self, stats: RouterStats, fraction: Tensor) -> Tensor:
        """The methods' auxiliary loss times its coefficient, summed over the tokens of `stats`.

        fraction (routers, E): of tokens that chose each expert.
        """
        return self.config.lb_loss_coeff * stats.load_balancing_loss(fraction)

    def forward_hidden(
        self, tokens: Tensor, batch: PackedBatch, cache: KVCache | None = None, cache_rows: list[int] | None = None
    ) -> tuple[Tensor, list[RouterStats]]:
        """tokens (N,), packed -> normed final hidden states (N, D). cache: a prefill of the sequences at cache_rows."""
        self.extend_rope_cache(batch.max_seqlen, tokens.device)
        recompute = self.activation_checkpointing if torch.is_grad_enabled() else "none"
        freqs_cis = self.freqs_cis[batch.positions]
        return self.run_blocks(tokens, ForwardContext(batch, freqs_cis, cache, cache_rows, recompute))

    def decode(self, tokens: Tensor, cache: KVCache, seq_lens: Tensor, max_seqlen: int, equal_lengths: bool) -> Tensor:
        """One decode step: the newest token of every cached sequence, (R,) -> logits (R, V) of the next.

        seq_lens (R,): their lengths, these tokens included (`KVCache.begin_step`).
        """
        self.extend_rope_cache(max_seqlen, tokens.device)
        cache.begin_step(seq_lens, max_seqlen, equal_lengths)
        context = ForwardContext(None, self.freqs_cis[seq_lens - 1], cache)
        return self.output(self.run_blocks(tokens, context)[0])

    def run_blocks(self, tokens: Tensor, context: ForwardContext) -> tuple[Tensor, list[RouterStats]]:
        x, stats = self.tok_embeddings(tokens), []
        full = context.activation_checkpointing == "full"
        for block in self.layers:
            x, block_stats = maybe_checkpoint(block, x, context, enabled=full)
            stats += block_stats
        return self.norm(x), stats

    def extend_rope_cache(self, n: int, device: torch.device) -> None:
        """Make the table of rotations reach position n - 1; it may move in memory."""
        if len(self.freqs_cis) < n or self.freqs_cis.device != device:
            with torch.inference_mode(False):
                positions = torch.arange(2 * n, device=device)
                self.freqs_cis = precompute_freqs_cis(self.rope_freqs.to(device), positions)

    def new_cache(self, max_rows: int, max_len: int) -> KVCache:
        """An empty KV cache in the type of the base, on its device, for this rank's heads."""
        weight, args = self.output.weight, self.args
        kv_heads = args.n_kv_heads // num_kv_shards(args.n_kv_heads)
        return KVCache(args.n_layers, max_rows, max_len, kv_heads, args.head_dim, weight.dtype, weight.device)
