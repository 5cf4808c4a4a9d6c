"""LLaMA-3 with adapters beside its layers, after the paper's figure:

    g   = gates of the block's adapters, from its router
    y   = x + Attention(norm(x); g)
    out = y + FeedForward(norm(y); g) + g_parallel * ParallelAdapter(norm(y))

Layer names are Meta's. Inside, a batch is packed (`llama.packing`): N tokens of all rows, laid end to end without padding.
Shapes: B rows of T tokens at the interface, N tokens inside, D model width, H query heads, K key/value heads, h head
width, F hidden width of the feed-forward block, V vocabulary. Under model parallelism H, K, F and V are cut; with more
ranks than key/value heads K is 1, and neighbouring ranks hold the same one.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llama.args import ModelArgs
from llama.attention import cached_attention, causal_attention
from llama.data import IGNORE_INDEX
from llama.kv_cache import KVCache
from llama.loss import chunked_cross_entropy
from llama.packing import PackedBatch, async_to_device
from llama.parallel_layers import ColumnParallel, RowParallel, VocabParallel, gated_side_by_side, side_by_side, unfilled
from llama.pointwise import rms_norm
from llama.rope import Rope, frequencies, rotations
from moa.adapter import AdapterModule, Target
from moa.bias_norm import TrainableNormWeight
from moa.block import AdapterDict, Mixing, Read, build_router
from moa.config import AdapterConfig, Slot
from moa.expert_routers import RouterStats
from moa.parallel import copy_to_model_parallel_region, num_kv_shards, share
from moa.routers import Gates

Outputs = tuple[Tensor, list[RouterStats]]  # hidden states (N, D), and of the load-balancing losses


class RMSNorm(nn.Module):
    """trained: its weight trains (`train_bias_norm`), in float32, beside the base's."""

    def __init__(self, dim: int, eps: float, trained: bool = False):
        super().__init__()
        self.eps = eps
        self.weight = unfilled(dim)
        self.adapters = nn.ModuleDict({"norm": TrainableNormWeight(dim, lambda: self.weight)} if trained else {})

    def forward(self, x: Tensor) -> Tensor:
        weight = self.adapters["norm"].weight.to(x.dtype) if self.adapters else self.weight
        return rms_norm(x, weight, self.eps)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, config: AdapterConfig | None, slots: list[Slot]):
        super().__init__()
        heads, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        parts = num_kv_shards(args.n_kv_heads)
        self.head_dim = args.head_dim
        self.wq = ColumnParallel(args.dim, heads)
        self.wk = ColumnParallel(args.dim, kv, args.n_kv_heads)
        self.wv = ColumnParallel(args.dim, kv, args.n_kv_heads)
        self.wo = RowParallel(heads, args.dim)
        self.adapters = AdapterDict(
            config,
            slots,
            {
                "Q": Target(args.dim, heads, "out", args.n_heads),
                "K": Target(args.dim, kv, "out", args.n_heads, parts),
                "V": Target(args.dim, kv, "out", args.n_heads, parts),
                "attention": Target(args.dim, heads, "out", args.n_heads),
                "O": Target(heads, args.dim, "in", args.n_heads),
            },
        )

    def forward(self, x: Tensor, mixing: Mixing, step: "Step", layer: int) -> Tensor:
        """x (N, D), normed -> (N, D)."""
        (q, k, v), read = side_by_side(x, [self.wq, self.wk, self.wv], self.adapters, "Q", "K", "V", "attention")
        q = self.adapters.add("Q", q, mixing, read)
        k = self.adapters.add("K", k, mixing, read)
        v = self.adapters.add("V", v, mixing, read)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))  # (N, H or K, h)
        q, k = step.rope(q), step.rope(k)
        heads = step.attend(q, k, v, layer)
        heads = self.adapters.add("attention", heads, mixing, read, q, self.wk, self.wv)
        (out,), read = side_by_side(heads.flatten(1), [self.wo], self.adapters, "O")
        return self.adapters.add("O", out, mixing, read)


class FeedForward(nn.Module):
    def __init__(self, args: ModelArgs, config: AdapterConfig | None, slots: list[Slot]):
        super().__init__()
        dim, hidden = args.dim, args.ffn_dim
        self.w1 = ColumnParallel(dim, hidden)
        self.w2 = RowParallel(hidden, dim)
        self.w3 = ColumnParallel(dim, hidden)
        self.adapters = AdapterDict(
            config,
            slots,
            {
                "FFN_UP": Target(dim, hidden, "out", args.n_heads),
                "FFN_GATE": Target(dim, hidden, "out", args.n_heads),
                "FFN_DOWN": Target(hidden, dim, "in", args.n_heads),
            },
        )

    def forward(self, x: Tensor, mixing: Mixing, beside: list[AdapterModule]) -> tuple[Tensor, Read]:
        """x (N, D), normed -> (N, D), and what those `beside` the whole block read of x."""
        (up, gate), first = side_by_side(x, [self.w3, self.w1], self.adapters, "FFN_UP", "FFN_GATE", others=beside)
        up = self.adapters.add("FFN_UP", up, mixing, first)
        gate = self.adapters.add("FFN_GATE", gate, mixing, first)
        out, read = gated_side_by_side(gate, up, self.w2, self.adapters, "FFN_DOWN")
        return self.adapters.add("FFN_DOWN", out, mixing, read), first


class TransformerBlock(nn.Module):
    def __init__(self, layer: int, args: ModelArgs, config: AdapterConfig | None):
        super().__init__()
        slots = config.slots(layer) if config else []
        self.layer = layer
        self.attention_norm = _norm(args, config)
        self.attention = Attention(args, config, slots)
        self.ffn_norm = _norm(args, config)
        self.feed_forward = FeedForward(args, config, slots)
        self.adapters = AdapterDict(config, slots, {"block": Target(args.dim, args.dim, None, args.n_heads)})
        self.router = build_router(config, slots, args.dim)

    def forward(self, x: Tensor, step: "Step") -> Outputs:
        """x (N, D) -> (N, D), and what the load-balancing losses of the block's routers of experts are made of."""
        mixing = Mixing(step.route(self.router, x, self.layer) if self.router is not None else {})
        y = x + self.attention(self.attention_norm(x), mixing, step, self.layer)
        out, balance = _run_again_later(self._second_half, y, mixing.gates, when=step.recompute == "ffn")
        return out, mixing.balance + balance

    def _second_half(self, y: Tensor, gates: Gates) -> Outputs:
        """From what the attention makes, (N, D), on."""
        mixing, z = Mixing(gates), self.ffn_norm(y)
        out, read = self.feed_forward(z, mixing, self.adapters.at("block"))
        return self.adapters.add("block", y + out, mixing, read), mixing.balance


def _run_again_later(part: Callable[..., Outputs], *inputs: Any, when: bool) -> Outputs:
    """What `part` makes of its inputs. when: they alone are kept, and the backward pass runs it once more."""
    return checkpoint(part, *inputs, use_reentrant=False) if when else part(*inputs)


def _require_divisible(args: ModelArgs) -> None:
    """ValueError with the numbers, unless the model-parallel ranks can share a model of this shape."""
    share(args.n_heads, "n_heads")
    num_kv_shards(args.n_kv_heads)
    share(args.ffn_dim, "the feed-forward width")
    share(args.vocab_size, "vocab_size")


def _norm(args: ModelArgs, config: AdapterConfig | None) -> RMSNorm:
    return RMSNorm(args.dim, args.norm_eps, config is not None and config.base.train_bias_norm)


class Step:
    """What all blocks of one forward pass share: the rows, the rotary angles, the cache if there is one, and what the
    backward pass is to work out again (`Transformer.activation_checkpointing`)."""

    def __init__(
        self,
        rows: PackedBatch,
        rope: Rope,
        flash: bool,
        cache: KVCache | None,
        places: list[int] | None,
        recompute: str,
    ):
        self.rows, self.rope, self.flash, self.cache, self.places = rows, rope, flash, cache, places
        self.recompute = recompute

    def route(self, router: AdapterModule, x: Tensor, layer: int) -> Gates:
        """A block's gates (N, 1) by slot. A router of whole rows is asked when a row begins; then the cache knows."""
        if not router.per_row:
            return router(x)
        if self.cache is not None and self.places is None:
            return self.cache.kept_gates(layer)
        gates = router(self.rows.prompt_means(x))
        if self.cache is not None:
            self.cache.keep_gates(layer, self.places, {slot: gate.to(x.dtype) for slot, gate in gates.items()})
        return {slot: self.rows.per_token(gate).to(x.dtype) for slot, gate in gates.items()}

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """q (N, H, h), k and v (N, K, h) -> (N, H, h). With a cache: a prefill of the rows at `places`, or (None) one
        more token of every cached row."""
        if self.cache is not None and self.places is None:
            self.cache.append(layer, k, v)
            return cached_attention(q, self.cache, layer)
        if self.cache is not None:
            self.cache.fill(layer, self.places, self.rows.spans, k, v)
        return causal_attention(q, k, v, self.rows, self.flash)


class Losses(NamedTuple):
    """Of a packed batch, float32 scalars. labels: the sum of -log p(label) over the label tokens. auxiliary: the
    method's load-balancing loss over the batch's tokens, times its coefficient; 0 where it has none. balance: what that
    is made of, of all routers, (routers, E)."""

    labels: Tensor
    auxiliary: Tensor
    balance: RouterStats | None = None


class Transformer(nn.Module):
    """The model. Base weights are unfilled until a checkpoint is loaded, adapters until `moa.state.reset_adapters`.

    activation_checkpointing: what is not kept for the backward pass but worked out again there: nothing ("off"), the
    second half of each block, from the feed-forward part's norm on ("ffn"), or whole blocks ("all").
    """

    def __init__(self, args: ModelArgs, config: AdapterConfig | None = None, flash_attention2: bool = False):
        super().__init__()
        assert args.vocab_size > 0, "vocab_size must be known here"
        assert config is None or config.n_layers == args.n_layers
        self.args, self.config, self.flash = args, config, flash_attention2
        self.activation_checkpointing = "off"
        _require_divisible(args)
        self.tok_embeddings = VocabParallel(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(TransformerBlock(i, args, config) for i in range(args.n_layers))
        self.norm = _norm(args, config)
        self.output = ColumnParallel(args.dim, args.vocab_size, gather=True)
        self.freqs = frequencies(args)
        self.turns = self.freqs.new_empty(0, args.head_dim // 2, dtype=torch.complex64)

    def forward(self, tokens: Tensor, prompt_lens: list[int] | None = None) -> Tensor:
        """tokens (B, T) int64 -> logits (B, T, V) float32; the whole sequence, causal, differentiable.

        prompt_lens: prompt tokens of each row (default: the whole row), for methods that look at the prompt alone.
        """
        rows = PackedBatch([tokens.shape[1]] * len(tokens), tokens.device, prompt_lens)
        return (
            self.output(copy_to_model_parallel_region(self.hidden(tokens.flatten(), rows)))
            .float()
            .unflatten(0, tokens.shape)
        )

    def loss(self, tokens: Tensor, labels: Tensor, prompt_lens: list[int] | None = None) -> Tensor:
        """Mean cross-entropy over the label tokens plus the method's auxiliary loss, a float32 scalar.

        tokens, labels (B, T) int64, labels aligned with tokens (the shift by one happens here), IGNORE_INDEX where nothing is
        learned. ValueError where no label is left or one is no token.
        """
        if tokens.shape != labels.shape:
            raise ValueError(f"labels {tuple(labels.shape)} must have the shape of tokens {tuple(tokens.shape)}")
        rows = PackedBatch([tokens.shape[1]] * len(tokens), tokens.device, prompt_lens)
        wanted = labels[:, 1:][labels[:, 1:] != IGNORE_INDEX]
        n_labels = len(wanted)
        if not n_labels:
            raise ValueError("no label token: nothing to learn from")
        if wanted.min() < 0 or wanted.max() >= self.args.vocab_size:
            raise ValueError(f"a label is neither {IGNORE_INDEX} nor one of the {self.args.vocab_size} tokens")
        losses = self.losses(tokens.flatten(), labels.flatten(), rows)
        return losses.labels / n_labels + losses.auxiliary

    def losses(self, tokens: Tensor, labels: Tensor, rows: PackedBatch) -> Losses:
        """The losses of a packed batch: tokens, labels (N,). The final layer's logits are worked out at positions that
        predict a label and nowhere else. With labels that lie on the CPU nothing here waits for a GPU."""
        labels = labels.cpu()
        wanted = labels != IGNORE_INDEX
        wanted[[begin for begin, _ in rows.spans]] = False  # nothing before a row's first token predicts it
        positions = wanted.nonzero().squeeze(1)
        hidden, balance = self._run(tokens, rows)
        before, labels = (async_to_device(t, hidden.device) for t in (positions - 1, labels[positions]))
        summed = chunked_cross_entropy(hidden[before], self.output.weight, labels)
        if not balance:
            return Losses(summed, torch.zeros((), device=summed.device))
        stacked = RouterStats(*map(torch.stack, zip(*balance, strict=True)))
        return Losses(summed, self.auxiliary(stacked), stacked)

    def auxiliary(self, balance: RouterStats) -> Tensor:
        """The load-balancing loss of all routers, times its coefficient: a float32 scalar."""
        return self.config.experts.lb_loss_coeff * balance.loss()

    def hidden(
        self, tokens: Tensor, rows: PackedBatch, cache: KVCache | None = None, places: list[int] | None = None
    ) -> Tensor:
        """tokens (N,), packed -> (N, D) final hidden states, normed.

        cache with places: the rows are new and go there; cache alone: one more token of every cached row.
        """
        return self._run(tokens, rows, cache, places)[0]

    def _run(
        self, tokens: Tensor, rows: PackedBatch, cache: KVCache | None = None, places: list[int] | None = None
    ) -> Outputs:
        """Final hidden states, and what the load-balancing losses of all blocks are made of."""
        step, x, balances = self.step(rows, cache, places), self.tok_embeddings(tokens), []
        for block in self.layers:
            x, balance = _run_again_later(block, x, step, when=step.recompute == "all")
            balances += balance
        return self.norm(x), balances

    def step(self, rows: PackedBatch, cache: KVCache | None = None, places: list[int] | None = None) -> Step:
        """What a pass of these rows hands to every block."""
        recompute = self.activation_checkpointing if torch.is_grad_enabled() else "off"
        return Step(rows, self._rope(rows), self.flash, cache, places, recompute)

    def _rope(self, rows: PackedBatch) -> Rope:
        """From a table of the rotations of all positions."""
        self.reach(max(start + length for start, length in zip(rows.starts, rows.lengths, strict=True)), rows.device)
        return Rope(self.turns[rows.positions])

    def reach(self, n: int, device: torch.device) -> None:
        """See to it that the table goes as far as rows of `n` tokens; it may move."""
        if len(self.turns) < n or self.turns.device != device:
            with torch.inference_mode(False):
                self.turns = rotations(self.freqs.to(device), torch.arange(2 * n, device=device))

    def new_cache(self, max_rows: int, max_len: int) -> KVCache:
        """An empty KV cache in the base's dtype, on its device, for this rank's heads."""
        weight, args = self.output.weight, self.args
        kv_heads = args.n_kv_heads // num_kv_shards(args.n_kv_heads)
        return KVCache(args.n_layers, max_rows, max_len, kv_heads, args.head_dim, weight.dtype, weight.device)
