"""Decode steps in few operations, each of which costs more to start than to compute for a few tokens.

Layers that share an input are one product, their adapters' down-projections another, and the up-projections a third.
One product spreads the gates of a block over the columns of its adapters. Known are bases of plain matrices with LoRAs,
prompts and parallel adapters of one expert, under any router of blocks; other models decode as they did.

Shapes: R sequences, D model width, H query heads, K key/value heads, h head width, k columns of down-projections.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama.accelerate.attention import decode_attention
from llama.accelerate.forwards import joint_product, plain, prompt_keys
from llama.accelerate.prepack import WeightCache
from llama.kv_cache import KVCache
from llama.model import Transformer, TransformerBlock
from moa.adapter import AdapterModule
from moa.block import AdapterDict
from moa.lora import LoRA
from moa.parallel import mp_size
from moa.parallel_adapter import ParallelAdapter
from moa.prompt import Prompt
from moa.routers import Gates, InstanceRouter, SoftRouter, SparseRouter, UniPELTRouter

KNOWN_ROUTERS = (type(None), SoftRouter, SparseRouter, InstanceRouter, UniPELTRouter)


def is_known(model: Transformer) -> bool:
    """Whether `FusedDecode` knows all parts of this model."""
    return mp_size() == 1 and all(map(_is_known_block, model.layers))


def _is_known_block(block: TransformerBlock) -> bool:
    attention, ffn = block.attention, block.feed_forward
    layers = (attention.wq, attention.wk, attention.wv, attention.wo, ffn.w1, ffn.w2, ffn.w3)
    adapters = _slots(block)
    known = all(type(a) in (LoRA, Prompt, ParallelAdapter) and a.expert_router is None for a in adapters)
    return known and type(block.router) in KNOWN_ROUTERS and all(map(plain, layers))


def _slots(block: TransformerBlock) -> dict[AdapterModule, str]:
    parts = (block.attention, block.feed_forward, block)
    return {adapter: slot for part in parts for slot, adapter in part.adapters.items()}


class FusedDecode:
    """`Transformer.decode` of a model whose weights are frozen in `cache`."""

    def __init__(self, model: Transformer, cache: WeightCache):
        self._model, self._cache = model, cache

    @cached_property
    def _blocks(self) -> list["FusedBlock"]:
        return [FusedBlock(block, JointLinear, self._cache) for block in self._model.layers]

    def __call__(
        self, tokens: Tensor, kv_cache: KVCache, seq_lens: Tensor, max_seqlen: int, equal_lengths: bool
    ) -> Tensor:
        model = self._model
        model.extend_rope_cache(max_seqlen, tokens.device)
        kv_cache.begin_step(seq_lens, max_seqlen, equal_lengths)
        freqs_cis, x = model.freqs_cis[seq_lens - 1][:, None], model.tok_embeddings(tokens)
        for block in self._blocks:
            x = block(x, kv_cache, freqs_cis)
        return model.output(model.norm(x))


class FusedBlock:
    """A block's decode step. narrow: the type of what adapters compute (`WeightCache.narrow_dtype`)."""

    linear = staticmethod(F.linear)

    def __init__(self, block: TransformerBlock, linear_type: type["JointLinear"], cache: WeightCache):
        attention, ffn = block.attention, block.feed_forward
        like = attention.wq.weight[:1]
        self.layer, self.head_dim, self.narrow = block.layer, attention.head_dim, cache.narrow_dtype(like)
        self.attention_norm, self.ffn_norm = block.attention_norm, block.ffn_norm
        self.q_norm, self.k_norm = (
            None if isinstance(norm, nn.Identity) else norm for norm in (attention.q_norm, attention.k_norm)
        )
        self.heads, self.kv_heads = (len(layer.weight) // self.head_dim for layer in (attention.wq, attention.wk))
        prompts, parallel = attention.adapters.at("attention"), block.adapters.at("block")
        make = (cache, like, self.narrow)
        self.qkv = linear_type(*make, attention.adapters, ["wq", "wk", "wv"])
        self.wo = linear_type(*make, attention.adapters, ["wo"])
        self.up_gate = linear_type(*make, ffn.adapters, ["w3", "w1"], beside=parallel)
        # The parallel adapter's up-projection and bias go with the LoRA's of w2
        added = [columns for adapter in parallel for columns in (adapter.up_proj, adapter.up_proj_bias.T)]
        self.w2 = linear_type(*make, ffn.adapters, ["w2"], added=added)
        self.activation = parallel[0].activation if parallel else None
        self.down_bias = parallel[0].down_proj_bias.to(self.narrow) if parallel else None
        self.one = torch.ones(1, 1, dtype=self.narrow, device=like.device)
        self.prompt = None
        if prompts:
            keys, values = prompt_keys(cache, prompts[0], self.head_dim, like.dtype)
            self.prompt = keys, values, prompts[0].gate.to(like.dtype)
        self.parts = [self.qkv, self.wo, self.up_gate, self.w2]
        # What a slot's gate multiplies: a prompt's heads, and the columns of each part
        columns = [(p, p.gate.to(self.narrow)) for p in prompts]
        columns += [(lora, self.one[0].expand(len(lora.lora_A))) for part in self.parts for lora in part.loras]
        columns += [(p, self.one[0].expand(p.size + 1)) for p in parallel]
        self.widths = [*(len(p.gate) for p in prompts), *(part.rank for part in self.parts)]
        self.spread = self.router = None
        if block.router is not None:
            slots = _slots(block)
            self.slots = getattr(block.router, "slots", list(slots.values()))
            self.spread = torch.zeros(sum(self.widths), len(self.slots), dtype=self.narrow, device=like.device)
            ends = 0
            for adapter, values in columns:
                self.spread[ends : ends + len(values), self.slots.index(slots[adapter])] = values
                ends += len(values)
            self.per_sequence = block.router.per_sequence
            if not self.per_sequence:
                self.router = RouterWeights(block.router, self.narrow, self.linear)

    def __call__(self, x: Tensor, kv_cache: KVCache, freqs_cis: Tensor) -> Tensor:
        """x (R, D) -> (R, D). freqs_cis (R, 1, h/2)."""
        rows = len(x)
        prompt_gate, *gates = self.spread_gates(x, kv_cache)
        out, _ = self.qkv(self.attention_norm(x), gates[0])
        heads = self.attend(out.view(rows, -1, self.head_dim), kv_cache, freqs_cis, prompt_gate)
        y, _ = self.wo(heads.flatten(1), gates[1], residual=x)
        out, downs = self.up_gate(self.ffn_norm(y), gates[2])
        up, gate = out.chunk(2, 1)
        added = []
        if self.activation is not None:
            added = [self.activation(downs + self.down_bias), self.one.expand(rows, 1)]
        return self.w2(F.silu(gate).mul_(up), gates[3], added, residual=y)[0]

    def attend(self, qkv: Tensor, kv_cache: KVCache, freqs_cis: Tensor, prompt_gate: Tensor | None) -> Tensor:
        """qkv (R, H + 2 K, h), not yet rotated -> (R, H, h), with the prompt's part. prompt_gate (R, H)."""
        self.rotate(qkv[:, : self.heads + self.kv_heads], freqs_cis)
        query = qkv[:, : self.heads]
        keys, values = kv_cache.append_joint(self.layer, qkv[:, self.heads :])
        heads = decode_attention(query, keys, values, kv_cache.mask)
        if self.prompt is None:
            return heads
        keys, values, gate = self.prompt
        part = F.scaled_dot_product_attention(
            query.unflatten(1, (self.kv_heads, -1)),
            *(t.expand(len(qkv), -1, -1, -1) for t in (keys, values)),
            scale=1.0,
        )
        gate = gate if prompt_gate is None else prompt_gate.to(qkv.dtype)
        return torch.addcmul(heads, part.flatten(1, 2), gate[..., None])

    def rotate(self, qk: Tensor, freqs_cis: Tensor) -> None:
        """Norm queries and keys (R, H + K, h), where the model does, and rotate them, in place."""
        if self.q_norm is not None:
            qk[:, : self.heads] = self.q_norm(qk[:, : self.heads])
            qk[:, self.heads :] = self.k_norm(qk[:, self.heads :])
        wide = qk if qk.dtype.itemsize >= 4 else qk.float()
        torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(freqs_cis)
        if wide is not qk:
            qk.copy_(wide)

    def spread_gates(self, x: Tensor, kv_cache: KVCache) -> Sequence[Tensor | None]:
        """The gates of the prompt's heads (R, H), and of the columns of each part (R, k); None: not gated."""
        if self.spread is None:
            return [None] * 5
        if self.router is None:
            by_slot = self.stored_gates(kv_cache)
            gates = torch.cat([by_slot[slot] for slot in self.slots], 1).to(self.narrow)
        else:
            gates = self.router(x.to(self.narrow))
        spread = self.linear(gates, self.spread).split(self.widths, 1)
        return spread if self.prompt is not None else [None, *spread]

    def stored_gates(self, kv_cache: KVCache) -> Gates:
        """Those of a per-sequence router."""
        return kv_cache.load_gates(self.layer)


class RouterWeights:
    """A router of blocks per token, x (R, D) -> gates (R, slots): products whose biases are added in them."""

    def __init__(self, router: SoftRouter, dtype: torch.dtype, linear: Callable[..., Tensor]):
        proj, threshold = router.proj, getattr(router, "threshold", None)
        self.router, self.linear, self.has_threshold = router, linear, threshold is not None
        self.is_swiglu = not hasattr(proj, "weight")
        linears = [*([proj.w1, proj.w3] if self.is_swiglu else [proj]), *([threshold] if self.has_threshold else [])]
        self.widths = [len(linear.bias) for linear in linears]
        self.first = [torch.cat([getattr(m, name) for m in linears]).to(dtype) for name in ("weight", "bias")]
        self.second = [proj.w2.weight.to(dtype), proj.w2.bias.to(dtype)] if self.is_swiglu else []

    def __call__(self, x: Tensor) -> Tensor:
        logits, *rest = self.linear(x, *self.first).split(self.widths, 1)
        if self.is_swiglu:
            logits = self.linear(F.silu(logits) * rest[0], *self.second)
        if isinstance(self.router, SparseRouter):
            return self.router.sparse_gates(logits, rest[-1] if self.has_threshold else None)
        return self.router.activate(logits)


class JointLinear:
    """Frozen layers that share an input, with their LoRAs.

    beside: adapters whose down-projections read the input too. added (out, k) each: further up-projections.
    """

    def __init__(
        self,
        cache: WeightCache,
        like: Tensor,
        narrow: torch.dtype,
        adapters: AdapterDict,
        names: list[str],
        beside: Sequence[AdapterModule] = (),
        added: Sequence[Tensor] = (),
    ):
        self.layers = [adapters.targets[name].layers[0] for name in names]
        self.narrow, self.loras = narrow, adapters.at(*names)
        self.readers = [*self.loras, *beside]
        self.down_rank = sum(len(lora.lora_A) for lora in self.loras)
        self.rank = self.down_rank + sum(up.shape[1] for up in added)
        ups, begin = [], 0
        width = sum(len(layer.weight) for layer in self.layers)
        for name, layer in zip(names, self.layers, strict=True):
            end = begin + len(layer.weight)
            for lora in adapters.at(name):  # zeros beside the outputs of the other layers
                ups.append(F.pad(lora.scale * lora.lora_B, (0, 0, begin, width - end)))
            begin = end
        self.up = torch.cat([*ups, *added], 1).to(narrow) if self.rank else None  # (out, k)
        self.prepare(cache, like)

    def prepare(self, cache: WeightCache, like: Tensor) -> None:
        self.product = joint_product(cache, self.layers, self.readers, like)

    def __call__(
        self, x: Tensor, gates: Tensor | None, added: Sequence[Tensor] = (), residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x (R, in) -> outputs (R, out) side by side, with what the LoRAs and `added` (R, k) contribute and `residual`,
        and the products with the down-projections beside."""
        out, downs = self.product(x, residual)
        if self.rank:
            beside = None if downs is None else downs[:, self.down_rank :]
            columns = [*([downs[:, : self.down_rank]] if self.down_rank else []), *added]
            columns = torch.cat(columns, 1) if len(columns) > 1 else columns[0]
            return self.add_up(out, columns.to(self.narrow) if gates is None else columns * gates), beside
        return out, downs

    def add_up(self, out: Tensor, columns: Tensor) -> Tensor:
        """out (R, out) plus the up-projections of columns (R, k)."""
        up = self.up.T
        return out.addmm_(columns, up) if out.dtype == self.narrow else out.add_(columns @ up)
