"""Decode steps in few operations, each of which costs more to start than to compute for a few tokens.

Layers that share an input are one product, their adapters' down-projections another, and the up-projections a third.
One product spreads the gates of a block over the columns of its adapters. Known are bases of plain matrices with LoRAs,
prompts and parallel adapters of one expert, under any router of blocks; other models decode as they did.

Shapes: R sequences, D model width, H query heads, K key/value heads, h head width, k columns of down-projections.
"""

from collections.abc import Sequence

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
from moa.routers import SoftRouter, SparseRouter


def is_known(model: Transformer) -> bool:
    """Whether `FusedDecode` knows all parts of this model."""
    return mp_size() == 1 and all(map(_is_known_block, model.layers))


def _is_known_block(block: TransformerBlock) -> bool:
    attention, ffn = block.attention, block.feed_forward
    layers = (attention.wq, attention.wk, attention.wv, attention.wo, ffn.w1, ffn.w2, ffn.w3)
    adapters = _slots(block)
    known = all(type(a) in (LoRA, Prompt, ParallelAdapter) and a.expert_router is None for a in adapters)
    return known and all(map(plain, layers))


def _slots(block: TransformerBlock) -> dict[AdapterModule, str]:
    parts = (block.attention, block.feed_forward, block)
    return {adapter: slot for part in parts for slot, adapter in part.adapters.items()}


class FusedDecode:
    """`Transformer.decode` of a model whose weights are frozen in `cache`."""

    def __init__(self, model: Transformer, cache: WeightCache):
        self._model = model
        self._blocks = [FusedBlock(block, cache, model.output.weight.dtype) for block in model.layers]

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

    def __init__(self, block: TransformerBlock, cache: WeightCache, dtype: torch.dtype):
        attention, ffn = block.attention, block.feed_forward
        device = attention.wq.weight.device
        self.block, self.head_dim, like = block, attention.head_dim, attention.wq.weight[:1]
        self.narrow = cache.narrow_dtype(like)
        self.heads, self.kv_heads = (len(layer.weight) // self.head_dim for layer in (attention.wq, attention.wk))
        prompts, parallel = attention.adapters.at("attention"), block.adapters.at("block")
        make = (cache, like, self.narrow)
        self.qkv = JointLinear(*make, attention.adapters, ["wq", "wk", "wv"])
        self.wo = JointLinear(*make, attention.adapters, ["wo"])
        self.up_gate = JointLinear(*make, ffn.adapters, ["w3", "w1"], beside=parallel)
        # The parallel adapter's up-projection and bias go with the LoRA's of w2
        added = [rows for adapter in parallel for rows in (adapter.up_proj.T, adapter.up_proj_bias)]
        self.w2 = JointLinear(*make, ffn.adapters, ["w2"], added=added)
        self.activation = parallel[0].activation if parallel else None
        self.down_bias = parallel[0].down_proj_bias.to(self.narrow) if parallel else None
        self.one = torch.ones(1, 1, dtype=self.narrow, device=device)
        self.prompt = None
        if prompts:
            keys, values = prompt_keys(cache, prompts[0], self.head_dim, dtype)
            self.prompt = keys[None], values[None], prompts[0].gate.to(dtype)
        self.parts = [self.qkv, self.wo, self.up_gate, self.w2]
        # What a slot's gate multiplies: a prompt's heads, and the columns of each part
        columns = [(p, p.gate.to(self.narrow)) for p in prompts]
        columns += [(lora, self.one[0].expand(len(lora.lora_A))) for part in self.parts for lora in part.loras]
        columns += [(p, self.one[0].expand(p.size + 1)) for p in parallel]
        self.widths = [*(len(p.gate) for p in prompts), *(part.rank for part in self.parts)]
        self.router = block.router
        if self.router is not None:
            slots = _slots(block)
            self.slots = getattr(self.router, "slots", list(slots.values()))
            spread = torch.zeros(len(self.slots), sum(self.widths), dtype=self.narrow, device=device)
            ends = 0
            for adapter, values in columns:
                spread[self.slots.index(slots[adapter]), ends : ends + len(values)] = values
                ends += len(values)
            self.spread = spread
            if type(self.router) in (SoftRouter, SparseRouter):
                self.router_weights = RouterWeights(self.router, self.narrow)

    def __call__(self, x: Tensor, kv_cache: KVCache, freqs_cis: Tensor) -> Tensor:
        """x (R, D) -> (R, D). freqs_cis (R, 1, h/2)."""
        block, rows = self.block, len(x)
        prompt_gate, *gates = self.spread_gates(x, kv_cache)
        out, _ = self.qkv(block.attention_norm(x), gates[0])
        qkv = out.view(rows, -1, self.head_dim)
        self.rotate(qkv[:, : self.heads + self.kv_heads], freqs_cis)
        query = qkv[:, : self.heads]
        keys, values = kv_cache.append_joint(block.layer, qkv[:, self.heads :])
        heads = decode_attention(query, keys, values, kv_cache.mask)
        if self.prompt is not None:
            keys, values, gate = self.prompt
            gate = gate if prompt_gate is None else prompt_gate.to(x.dtype)
            part = F.scaled_dot_product_attention(
                query.unflatten(1, (self.kv_heads, -1)),
                *(t.expand(rows, -1, -1, -1) for t in (keys, values)),
                scale=1.0,
            )
            heads = torch.addcmul(heads, part.flatten(1, 2), gate[..., None])
        y, _ = self.wo(heads.flatten(1), gates[1], residual=x)
        out, downs = self.up_gate(block.ffn_norm(y), gates[2])
        up, gate = out.chunk(2, 1)
        added = []
        if self.activation is not None:
            added = [self.activation(downs + self.down_bias), self.one.expand(rows, 1)]
        return self.w2(F.silu(gate).mul_(up), gates[3], added, residual=y)[0]

    def rotate(self, qk: Tensor, freqs_cis: Tensor) -> None:
        """Norm queries and keys (R, H + K, h), where the model does, and rotate them, in place."""
        attention = self.block.attention
        if not isinstance(attention.q_norm, nn.Identity):
            qk[:, : self.heads] = attention.q_norm(qk[:, : self.heads])
            qk[:, self.heads :] = attention.k_norm(qk[:, self.heads :])
        wide = qk if qk.dtype.itemsize >= 4 else qk.float()
        torch.view_as_complex(wide.unflatten(-1, (-1, 2))).mul_(freqs_cis)
        if wide is not qk:
            qk.copy_(wide)

    def spread_gates(self, x: Tensor, kv_cache: KVCache) -> Sequence[Tensor | None]:
        """The gates of the prompt's heads (R, H), and of the columns of each part (R, k); None: not gated."""
        if self.router is None:
            return [None] * 5
        if self.router.per_sequence:
            by_slot = kv_cache.load_gates(self.block.layer)
            gates = torch.cat([by_slot[slot] for slot in self.slots], 1).to(self.narrow)
        else:
            gates = self.router_weights(x.to(self.narrow))
        spread = (gates @ self.spread).split(self.widths, 1)
        return spread if self.prompt is not None else [None, *spread]


class RouterWeights:
    """A router of blocks per token, x (R, D) -> gates (R, slots): products whose biases are added in them."""

    def __init__(self, router: SoftRouter, dtype: torch.dtype):
        proj, threshold = router.proj, getattr(router, "threshold", None)
        self.router, self.has_threshold = router, threshold is not None
        self.is_swiglu = not hasattr(proj, "weight")
        linears = [*([proj.w1, proj.w3] if self.is_swiglu else [proj]), *([threshold] if self.has_threshold else [])]
        self.widths = [len(linear.bias) for linear in linears]
        self.first = [torch.cat([getattr(m, name) for m in linears]).to(dtype) for name in ("weight", "bias")]
        self.second = [proj.w2.weight.to(dtype), proj.w2.bias.to(dtype)] if self.is_swiglu else []

    def __call__(self, x: Tensor) -> Tensor:
        logits, *rest = F.linear(x, *self.first).split(self.widths, 1)
        if self.is_swiglu:
            logits = F.linear(F.silu(logits) * rest[0], *self.second)
        if isinstance(self.router, SparseRouter):
            return self.router.sparse_gates(logits, rest[-1] if self.has_threshold else None)
        return self.router.activate(logits)


class JointLinear:
    """Frozen layers that share an input, with their LoRAs.

    beside: adapters whose down-projections read the input too. added (k, out) each: further up-projections.
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
        layers = [adapters.targets[name].layers[0] for name in names]
        self.narrow, self.loras = narrow, adapters.at(*names)
        self.product = joint_product(cache, layers, [*self.loras, *beside], like)
        self.down_rank = sum(len(lora.lora_A) for lora in self.loras)
        self.rank = self.down_rank + sum(map(len, added))
        ups, begin = [], 0
        width = sum(len(layer.weight) for layer in layers)
        for name, layer in zip(names, layers, strict=True):
            for lora in adapters.at(name):  # zeros beside the outputs of the other layers
                up = F.pad(lora.scale * lora.lora_B.T, (begin, width - begin - len(layer.weight)))
                ups.append(up)
            begin += len(layer.weight)
        self.up = torch.cat([*ups, *added]).to(narrow) if self.rank else None  # (k, out)

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
            columns = columns.to(self.narrow) if gates is None else columns * gates
            out = out.addmm_(columns, self.up) if out.dtype == self.narrow else out.add_(columns @ self.up)
            return out, beside
        return out, downs
