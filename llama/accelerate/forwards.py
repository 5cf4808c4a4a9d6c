"""Faster forwards for the parts of a block, put in place of the plain ones.

Layers that share an input are multiplied together with the down-projections of their adapters ("downs"). An adapter or
router that is not known here, or has a forward hook, runs its own plain forward.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llama.accelerate.attention import causal_attention, decode_attention
from llama.accelerate.kernels import (
    FusedLinearFunction,
    FusedSwiGLULinearFunction,
    PromptAttentionFunction,
    RMSNormFunction,
    RotaryFunction,
    SwiGLUFunction,
    normalize,
)
from llama.accelerate.loss import chunked_cross_entropy
from llama.accelerate.prepack import WeightCache, linear, prepacked_linear, uses_onednn
from llama.model import Attention, ForwardContext, RMSNorm, Transformer, TransformerBlock, apply_rotary_emb
from llama.parallel_layers import ColumnParallelLinear, RowParallelLinear
from moa.adapter import AdapterModule, Target, apply_gates
from moa.block import AdapterDict, Routing
from moa.expert_routers import AdaMoLERouter, ExpertRouter, RouterStats, SoftmaxRouter, TopKRouter
from moa.lora import LoRA
from moa.parallel import copy_to_model_parallel_region, mp_size, reduce_from_model_parallel_region
from moa.parallel_adapter import ParallelAdapter
from moa.prompt import Prompt
from moa.routers import Gates, InstanceRouter, SoftRouter, SparseRouter

Downs = dict[AdapterModule, tuple[Tensor, ...]]  # products (N, k) of the shared input with a module's down-projections


def install(model: Transformer, cache: WeightCache, flash: bool = False) -> None:
    """Put the faster forwards in place of the plain ones of `model`. flash: attention by flash-attn 2."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.forward = partial(rms_norm, module)
        elif isinstance(module, Attention):
            module.forward = partial(attention, cache, module)
            module.causal_attention = partial(causal_attention, flash=flash)
            module.decode_attention = decode_attention
        elif isinstance(module, TransformerBlock):
            module.ffn_half = partial(ffn_half, cache, module)
        elif type(module) in (SoftRouter, InstanceRouter, SparseRouter):
            module.forward = partial(block_router, cache, module)
    model.output.forward = partial(output, cache, model.output)
    model.cross_entropy = partial(cross_entropy, model)
    model.run_blocks = partial(run_blocks, cache, model)


def uninstall(model: Transformer) -> None:
    """Bring the plain forwards back."""
    for module in model.modules():
        for name in ("forward", "causal_attention", "decode_attention", "ffn_half", "cross_entropy", "run_blocks"):
            module.__dict__.pop(name, None)


def rms_norm(self: RMSNorm, x: Tensor) -> Tensor:
    weight = self.current_weight(x.dtype)
    if x.device.type == "cuda":  # which has a kernel for it
        return F.rms_norm(x, weight.shape, weight, self.eps)
    return RMSNormFunction.apply(x, weight, self.eps) if torch.is_grad_enabled() else normalize(x, weight, self.eps)[0]


def cross_entropy(self: Transformer, hidden: Tensor, labels: Tensor) -> Tensor:
    return chunked_cross_entropy(hidden, self.output.weight, labels)


def run_blocks(
    cache: WeightCache, self: Transformer, tokens: Tensor, context: ForwardContext
) -> tuple[Tensor, list[RouterStats]]:
    cache.copies.refresh()
    return Transformer.run_blocks(self, tokens, context)


def output(cache: WeightCache, self: ColumnParallelLinear, x: Tensor) -> Tensor:
    if not (cache.frozen and cache.prepack):
        return ColumnParallelLinear.forward(self, x)
    return cache.get(self, x.dtype, lambda: prepacked_linear([self.weight], x.dtype))(x)


def attention(cache: WeightCache, self: Attention, x: Tensor, routing: Routing, context: ForwardContext) -> Tensor:
    adapters = self.adapters
    readers = fusable(adapters.at("wq", "wk", "wv", "attention"))
    (q, k, v), downs = fused_linear(cache, x, [self.wq, self.wk, self.wv], readers)
    q = apply(cache, adapters, "wq", q, x, downs, routing)
    k = apply(cache, adapters, "wk", k, x, downs, routing)
    v = apply(cache, adapters, "wv", v, x, downs, routing)
    q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))
    rotate = RotaryFunction.apply if torch.is_grad_enabled() else apply_rotary_emb
    both = torch.cat([self.q_norm(q), self.k_norm(k)], 1)  # fewer launches
    q, k = rotate(both, context.freqs_cis).split([q.shape[1], k.shape[1]], 1)
    heads = self.attend(q, k, v, context)
    heads = apply(cache, adapters, "attention", heads, x, downs, routing, q).flatten(1)
    (out,), downs = fused_linear(cache, heads, [self.wo], fusable(adapters.at("wo")))
    return apply(cache, adapters, "wo", out, heads, downs, routing)


def ffn_half(cache: WeightCache, self: TransformerBlock, y: Tensor, gates: Gates) -> tuple[Tensor, list[RouterStats]]:
    routing, x, ffn = Routing(gates), self.ffn_norm(y), self.feed_forward
    beside = fusable(self.adapters.at("block"))
    readers = [*fusable(ffn.adapters.at("w3", "w1")), *beside]
    (up, gate), downs = fused_linear(cache, x, [ffn.w3, ffn.w1], readers)
    up = apply(cache, ffn.adapters, "w3", up, x, downs, routing)
    gate = apply(cache, ffn.adapters, "w1", gate, x, downs, routing)
    standing, readers = with_routers(ffn.adapters.at("w2")), fusable(ffn.adapters.at("w2"))
    hidden = None
    if torch.is_grad_enabled() and gate.requires_grad and readers and set(standing) <= set(readers) and plain(ffn.w2):
        trained = cache.copies.stacked(down_weights(readers), gate.dtype)
        products = FusedSwiGLULinearFunction.apply(gate, up, trained, ffn.w2.weight)
        out, product = map(reduce_from_model_parallel_region, products)
        down = split(product, readers)
    else:
        hidden = SwiGLUFunction.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate).mul_(up)
        (out,), down = fused_linear(cache, hidden, [ffn.w2], readers)
    out = apply(cache, ffn.adapters, "w2", out, hidden, down, routing)
    out = apply(cache, ffn.adapters, "FFN", out, x, downs, routing, gate, up)
    return apply(cache, self.adapters, "block", y + out, x, downs, routing), routing.stats


def block_router(cache: WeightCache, self: SoftRouter, x: Tensor) -> Gates:
    """One product for all matrices that read x."""
    proj, threshold = self.proj, getattr(self, "threshold", None)
    first = [proj] if hasattr(proj, "weight") else [proj.w1, proj.w3]
    linears = first + ([threshold] if threshold is not None else [])
    dtype = cache.narrow_dtype(x)
    weights = cache.get(self, dtype, lambda: cache.copies.stacked([linear.weight for linear in linears], dtype))
    biases = [linear.bias for linear in linears]
    bias = cache.get(self, "bias", lambda: cache.copies.stacked(biases, biases[0].dtype))
    values = (F.linear(x.to(dtype), weights) + bias).split([len(linear.weight) for linear in linears], -1)
    logits = values[0] if len(first) == 1 else proj.w2(F.silu(values[0]) * values[1])
    if isinstance(self, SparseRouter):
        gates = self.sparse_gates(logits, values[-1] if threshold is not None else None)
    else:
        gates = self.activate(logits)
    return self.by_slot(gates, dtype)


def plain(layer: nn.Module) -> bool:
    """Whether a frozen layer is a plain matrix: not quantised, not wrapped."""
    return type(layer) in (ColumnParallelLinear, RowParallelLinear) and type(layer.weight) is nn.Parameter


def with_routers(adapters: Sequence[AdapterModule]) -> list[AdapterModule]:
    return [m for adapter in adapters for m in (adapter, adapter.expert_router) if m is not None]


def fusable(adapters: Sequence[AdapterModule]) -> list[AdapterModule]:
    """These adapters and their routers of experts, as far as their down-projections are known here."""
    return [
        m
        for m in with_routers(adapters)
        if type(m) in DOWN_WEIGHTS and not m._forward_hooks and not m._forward_pre_hooks
    ]


DOWN_WEIGHTS: dict[type, Callable[[Any], list[Tensor]]] = {
    LoRA: lambda m: [m.lora_A],
    ParallelAdapter: lambda m: [m.down_proj],
    **dict.fromkeys((SoftmaxRouter, TopKRouter, AdaMoLERouter), lambda m: [linear.weight for linear in m.children()]),
}


def down_weights(modules: Sequence[AdapterModule]) -> list[Tensor]:
    """(k, in) each."""
    return [weight for module in modules for weight in DOWN_WEIGHTS[type(module)](module)]


def stacked_down_weights(
    cache: WeightCache, layers: list[nn.Module], readers: Sequence[AdapterModule], dtype: torch.dtype
) -> Tensor:
    """The down-projections (sum of k, in) of adapters that read what `layers` read."""
    key = ("downs", dtype, *readers)
    return cache.get(layers[0], key, lambda: cache.copies.stacked(down_weights(readers), dtype))


def split(product: Tensor, modules: Sequence[AdapterModule]) -> Downs:
    """A product (N, sum of k) with the down-projections of all modules -> the products of each."""
    widths = [[len(weight) for weight in DOWN_WEIGHTS[type(module)](module)] for module in modules]
    flat = [k for ks in widths for k in ks]
    pieces = iter(product.split(flat, -1) if len(flat) > 1 else [product])  # the gradient of one piece would be a copy
    return {module: tuple(next(pieces) for _ in ks) for module, ks in zip(modules, widths, strict=True)}


def fused_linear(
    cache: WeightCache, x: Tensor, layers: list[nn.Module], readers: list[AdapterModule]
) -> tuple[Sequence[Tensor], Downs]:
    """Apply frozen layers and the down-projections of their adapters to a shared input x (N, in).

    Returns the layers' outputs and the adapters' products. In training the gradient of x is accumulated once for all.
    With `prepack` it is one product with a prepacked copy of all weights.
    """
    column = isinstance(layers[0], ColumnParallelLinear)
    if not all(map(plain, layers)):
        shared = copy_to_model_parallel_region(x) if column else x
        return [layer(shared) for layer in layers], project_down(cache, x, layers, readers)
    weights = [layer.weight for layer in layers]
    widths = [len(weight) for weight in weights]
    if cache.frozen and cache.prepack:
        outputs, down = joint_product(cache, layers, readers, x)(x)
        return outputs.split(widths, -1), split(down, readers) if readers else {}
    if torch.is_grad_enabled() and x.requires_grad and readers:
        trained = cache.copies.stacked(down_weights(readers), x.dtype)
        *outputs, down = FusedLinearFunction.apply(x, trained, column and mp_size() > 1, *weights)
        if not column:
            outputs, down = (
                [reduce_from_model_parallel_region(t) for t in outputs],
                reduce_from_model_parallel_region(down),
            )
        return outputs, split(down, readers)
    shared = copy_to_model_parallel_region(x) if column else x
    if torch.is_grad_enabled():
        outputs = [layer(shared) for layer in layers]
    else:
        outputs = [linear(shared, weight) for weight in weights]
        outputs = outputs if column else [reduce_from_model_parallel_region(t) for t in outputs]
    return outputs, project_down(cache, x, layers, readers)


def joint_product(
    cache: WeightCache, layers: list[nn.Module], readers: list[AdapterModule], like: Tensor
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """x (N, in) -> the outputs of plain layers side by side, and the products with the readers' down-projections.

    The callable takes a residual (N, out) too, to be added to the outputs. like (N, in): of the type of its inputs.
    """
    weights, dtype, narrow = [layer.weight for layer in layers], like.dtype, cache.narrow_dtype(like)
    width = sum(map(len, weights))
    joined = cache.prepack and uses_onednn(weights[0])  # else trained weights stay as they are: fp16 has too few digits
    if cache.prepack:
        copied = [*weights, *down_weights(readers)] if joined else weights
        product = cache.get(layers[0], (dtype, *readers), lambda: prepacked_linear(copied, dtype))
    else:
        joint = joint_weight(layers)
        product = partial(F.linear, weight=joint)
    if readers and not joined:
        down = stacked_down_weights(cache, layers, readers, narrow)

    def run(x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if residual is not None and not cache.prepack:
            outputs = torch.addmm(residual, x, joint.T)
        else:
            outputs = product(x)
            beside = outputs[:, width:] if joined else None
            outputs = outputs[:, :width]
            outputs = outputs if residual is None else outputs + residual
        if not readers:
            return outputs, None
        return outputs, beside if joined else F.linear(x.to(narrow), down)

    return run


def joint_weight(layers: list[nn.Module]) -> Tensor:
    """The weights of layers one above the other, (sum of k, in), of which they become views: no memory is spent."""
    if len(layers) == 1:
        return layers[0].weight
    joint = getattr(layers[0], "joint", None)
    if joint is None or any(
        layer.weight.untyped_storage()._cdata != joint.untyped_storage()._cdata for layer in layers
    ):
        with torch.inference_mode(False), torch.no_grad():
            joint = layers[0].joint = torch.cat([layer.weight for layer in layers])
            for layer, part in zip(layers, joint.split([len(layer.weight) for layer in layers]), strict=True):
                layer.weight = nn.Parameter(part, requires_grad=False)
    return joint


def project_down(cache: WeightCache, x: Tensor, layers: list[nn.Module], readers: list[AdapterModule]) -> Downs:
    """The products of x (N, in) with the down-projections of `readers`, as one."""
    if not readers:
        return {}
    dtype = cache.narrow_dtype(x)
    product = F.linear(x.to(dtype), stacked_down_weights(cache, layers, readers, dtype))
    row = isinstance(layers[0], RowParallelLinear)
    return split(reduce_from_model_parallel_region(product) if row else product, readers)


def apply(
    cache: WeightCache,
    adapters: AdapterDict,
    name: str,
    output: Tensor,
    x: Tensor | None,
    downs: Downs,
    routing: Routing,
    *inputs: Tensor,
) -> Tensor:
    """As `AdapterDict.apply`, from the products in `downs` where they are there. `output` may change in place."""
    for slot in adapters.slots_at[name]:
        adapter, gate = adapters[slot], routing.gates.get(slot)
        router = adapter.expert_router
        if router is not None:
            weights, stats = route_experts(router, downs[router], output.dtype) if router in downs else router(x)
            gate = weights if gate is None else gate * weights
            if stats is not None:
                routing.stats.append(stats)
        if adapter in downs:
            output = UP[type(adapter)](cache, adapter, output, *downs[adapter], gate)
        elif type(adapter) is Prompt:
            output = prompt(cache, adapter, output, gate, *inputs)
        else:
            gate = gate if gate is None else gate.to(output.dtype)  # `narrow_dtype` may be wider
            output = adapter(x, output, gate, *inputs)
    return output


def route_experts(
    router: ExpertRouter, products: tuple[Tensor, ...], dtype: torch.dtype
) -> tuple[Tensor, RouterStats | None]:
    """A router of experts from W x of each of its matrices."""
    return router.route(dtype, *(linear.add_bias(y) for linear, y in zip(router.children(), products, strict=True)))


def lora(cache: WeightCache, self: LoRA, output: Tensor, a: Tensor, gate: Tensor | None) -> Tensor:
    """a = A x, (N, E r) or (N, r)."""
    dtype = cache.narrow_dtype(a)
    if gate is not None:
        a = gated(a, gate, self.rank)
    up = cache.get(self, dtype, lambda: transposed(cache, self.lora_B, dtype))
    return add_product(output, self.target, a, up, self.scale)


def parallel_adapter(
    cache: WeightCache, self: ParallelAdapter, output: Tensor, down: Tensor, gate: Tensor | None
) -> Tensor:
    """down = V x, (N, E size) or (N, size)."""
    bias = cache.get(self, ("bias", down.dtype), lambda: cache.copies.stacked([self.down_proj_bias], down.dtype))
    hidden = self.activation(down + bias)
    if gate is None:
        gate = down.new_ones(1, 1).expand(len(down), -1)
    else:
        hidden = gated(hidden, gate, self.size)
    dtype = cache.narrow_dtype(down)
    up = cache.get(self, dtype, lambda: contiguous(torch.cat([self.up_proj.T, self.up_proj_bias]), dtype))
    return add_product(output, self.target, torch.cat([hidden, gate], 1), up)


UP: dict[type, Callable[..., Tensor]] = {LoRA: lora, ParallelAdapter: parallel_adapter}


def prompt(cache: WeightCache, self: Prompt, output: Tensor, gate: Tensor | None, query: Tensor) -> Tensor:
    keys, values = prompt_keys(cache, self, query.shape[-1], query.dtype)
    if self.num_experts == 1 and cache.is_decode(query):  # one kernel
        weight = cache.get(self, ("gate", query.dtype), lambda: self.gate.to(query.dtype))[:, None]  # (H, 1)
        if gate is not None:
            weight = (weight * gate[:, :, None]).to(query.dtype)  # (N, H, 1)
        one_batch = (query.transpose(0, 1)[None], keys[None], values[None])
        heads = F.scaled_dot_product_attention(*one_batch, scale=1.0, enable_gqa=True)[0]
        return torch.addcmul(output, heads.transpose(0, 1), weight)
    weight = cache.copies.stacked([self.gate], query.dtype)[:, None, None]
    if gate is not None:
        weight = weight * copy_to_model_parallel_region(gate.to(query.dtype)).T  # (H, E, N)
    else:
        weight = weight.expand(-1, self.num_experts, len(query))
    return PromptAttentionFunction.apply(output, query, keys, values, weight)


def prompt_keys(cache: WeightCache, self: Prompt, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys, divided by sqrt(h), and values (K, E L, h)."""

    def keys_and_values() -> tuple[Tensor, Tensor]:
        keys, values = self.keys_and_values(cache.copies.stacked([self.prompt], dtype), head_dim)
        return keys.transpose(0, 1) / head_dim**0.5, values.transpose(0, 1)

    return cache.get(self, dtype, keys_and_values)


def gated(a: Tensor, gate: Tensor, width: int) -> Tensor:
    return a * gate if gate.shape[1] == 1 else apply_gates(a, gate, width)


def contiguous(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype, memory_format=torch.contiguous_format, copy=True)


def transposed(cache: WeightCache, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """weight (out, k) -> (k, out); on a CPU contiguous, whose gradient is the faster product."""
    return cache.copies.stacked([weight], dtype).T if weight.is_cuda else contiguous(weight.T, dtype)


def add_product(output: Tensor, target: Target, a: Tensor, weight: Tensor, scale: float = 1.0) -> Tensor:
    """output (N, out) += scale * a W, in place; a (N, k), W (k, out)."""
    if target.parallel == "column":
        a = copy_to_model_parallel_region(a)
    a = a.to(weight.dtype)
    if weight.dtype != output.dtype:
        return output.add_(a @ weight, alpha=scale)
    return output.addmm_(a, weight, alpha=scale)
