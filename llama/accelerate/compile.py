"""Decode steps of one sequence on a CPU by `torch.compile`: it makes C++ loops of a block's step, a few for all of it.

Blocks that are alike share their loops, whose inputs are their weights; the loops are kept on disk between runs.
Numbers are float32; a weight is read as bf16 where that loses nothing, as of a base that was published in bf16.
"""

import mmap
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llama.accelerate.forwards import down_weights
from llama.accelerate.fused_decode import FusedBlock, FusedDecode, JointLinear
from llama.accelerate.prepack import WeightCache
from llama.kv_cache import KVCache
from llama.model import RMSNorm, Transformer, TransformerBlock
from moa.routers import Gates

STREAMS = 4  # rows of a large matrix that are read at the same time: a CPU waits less for memory
LARGE = 2**17  # numbers
ALIGNMENT = 64  # bytes
OPTIONS = {
    "cpp.enable_floating_point_contract_flag": "fast",  # a product and a sum are one instruction
    "realize_acc_reads_threshold": 2,  # a norm's result is computed once, not for each row of the matrix
}


class CompiledDecode(FusedDecode):
    """Steps of one sequence are compiled; those of several are `FusedDecode`'s."""

    def __init__(self, model: Transformer, cache: WeightCache):
        super().__init__(model, cache)
        frozen = [p for p in model.parameters() if not p.requires_grad]
        pages = HugePages(sum(p.nbytes + ALIGNMENT for p in frozen))
        self._compiled_blocks = [CompiledBlock(block, cache, pages) for block in model.layers]
        self._head = Head(Norm(model.norm), pages.stack([model.output.weight]))

    def __call__(
        self, tokens: Tensor, kv_cache: KVCache, seq_lens: Tensor, max_seqlen: int, equal_lengths: bool
    ) -> Tensor:
        if len(tokens) > 1:
            return super().__call__(tokens, kv_cache, seq_lens, max_seqlen, equal_lengths)
        model = self._model
        model.extend_rope_cache(max_seqlen, tokens.device)
        kv_cache.begin_step(seq_lens, max_seqlen, equal_lengths)
        position = seq_lens - 1
        rotation, x = real_rotation(model.freqs_cis[position]), model.tok_embeddings(tokens).float()
        for block in self._compiled_blocks:
            kv = kv_cache.kv[block.layer][0, :max_seqlen]
            torch._dynamo.mark_dynamic(kv, 0)  # one compilation for all lengths
            x = run_block(block, x, OneRow(kv, position, kv_cache.load_gates(block.layer)), rotation)
        return run_head(self._head, x)


class OneRow(NamedTuple):
    """A layer's cache of one sequence: kv (T, 2 K, h) with room for the new token at position (1,), gates (1, 1)."""

    kv: Tensor
    position: Tensor
    gates: Gates


class HugePages:
    """Memory in pages of 2 MB, where the system has them: reading all weights takes a fifth less time."""

    def __init__(self, size: int):
        if hasattr(mmap, "MADV_HUGEPAGE"):
            buffer = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            buffer.madvise(mmap.MADV_HUGEPAGE)
            self._free = torch.frombuffer(buffer, dtype=torch.uint8)
        else:
            self._free = torch.empty(size, dtype=torch.uint8)

    def stack(self, weights: Sequence[Tensor]) -> Tensor:
        """Copy matrices (k, in), one above the other, in bf16 where that loses nothing, else in float32."""
        dtype = torch.bfloat16 if all(torch.equal(w, w.bfloat16()) for w in weights) else torch.float32
        rows, width = sum(map(len, weights)), weights[0].shape[1]
        size = rows * width * dtype.itemsize
        taken, self._free = self._free[:size], self._free[-(-size // ALIGNMENT) * ALIGNMENT :]
        copy = taken.view(dtype).view(rows, width)
        for part, weight in zip(copy.split([len(w) for w in weights]), weights, strict=True):
            part.copy_(weight)
        return copy


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (1, in), weight (out, in) -> (1, out): sums that compile to one loop over several rows of the matrix."""
    streams = STREAMS if weight.numel() >= LARGE and len(weight) % STREAMS == 0 else 1
    out = torch.cat([(part.float() * x).sum(1) for part in weight.chunk(streams)])[None]
    return out if bias is None else out + bias


def attention(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """query (K, H/K, h) of one token, keys and values (K, T, h) -> (1, H, h)."""
    scores = scale * (query[:, :, None] * keys[:, None]).sum(-1)  # (K, H/K, T)
    return (scores.softmax(-1)[..., None] * values[:, None]).sum(2).flatten(0, 1)[None]


class Norm:
    """`RMSNorm` in float32."""

    def __init__(self, norm: RMSNorm):
        self.weight, self.eps = norm.current_weight(torch.float32).float(), norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class CompiledLinear(JointLinear):
    def prepare(self, cache: WeightCache, like: Tensor) -> None:
        self.down = torch.cat(down_weights(self.readers)) if self.readers else None

    def product(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out = product(x, self.weight)
        return out if residual is None else out + residual, None if self.down is None else product(x, self.down)

    def add_up(self, out: Tensor, columns: Tensor) -> Tensor:
        return out + product(columns, self.up)


class CompiledBlock(FusedBlock):
    linear = staticmethod(product)

    def __init__(self, block: TransformerBlock, cache: WeightCache, pages: HugePages):
        super().__init__(block, CompiledLinear, cache)
        for part in self.parts:
            part.weight = pages.stack([layer.weight for layer in part.layers])
        self.attention_norm, self.ffn_norm = Norm(self.attention_norm), Norm(self.ffn_norm)
        if self.q_norm is not None:
            self.q_norm, self.k_norm = Norm(self.q_norm), Norm(self.k_norm)
        if self.prompt is not None:
            self.prompt = tuple(t.float() for t in self.prompt)

    def stored_gates(self, cache: OneRow) -> Gates:
        return cache.gates

    def attend(self, qkv: Tensor, cache: OneRow, rotation: Tensor, prompt_gate: Tensor | None) -> Tensor:
        """As `FusedBlock.attend`, of one row. rotation (2, h): cosines, and sines with a sign (`real_rotation`)."""
        query, key, value = qkv[0].split([self.heads, self.kv_heads, self.kv_heads])
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = (x * rotation[0] + other_of_pair(x) * rotation[1] for x in (query, key))
        cache.kv.index_copy_(0, cache.position, torch.cat([key, value])[None].to(cache.kv.dtype))
        keys, values = cache.kv.float().transpose(0, 1).chunk(2)
        query = query.unflatten(0, (self.kv_heads, -1))
        heads = attention(query, keys, values, self.head_dim**-0.5)
        if self.prompt is None:
            return heads
        keys, values, gate = self.prompt
        return heads + attention(query, keys, values, 1.0) * (gate if prompt_gate is None else prompt_gate)[..., None]


def other_of_pair(x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, 2)).flip(-1).flatten(1)


def real_rotation(freqs_cis: Tensor) -> Tensor:
    """freqs_cis (1, h/2) -> (2, h): what a component and its pair's other one are multiplied by, in real numbers."""
    pairs = torch.stack([freqs_cis.real, freqs_cis.real, -freqs_cis.imag, freqs_cis.imag], -1)  # (1, h/2, 4)
    return pairs.unflatten(-1, (2, 2)).transpose(1, 2).flatten(2)[0]


class Head(NamedTuple):
    norm: Norm
    weight: Tensor


@torch.compile(options=OPTIONS)
def run_block(block: CompiledBlock, x: Tensor, cache: OneRow, rotation: Tensor) -> Tensor:
    return block(x, cache, rotation)


@torch.compile(options=OPTIONS)
def run_head(head: Head, x: Tensor) -> Tensor:
    """x (1, D) -> logits (1, V)."""
    return product(head.norm(x), head.weight)
