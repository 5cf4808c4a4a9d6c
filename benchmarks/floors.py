"""The least that a step or an answer can take: its matrix products and its bytes, by what the machine can do.

Counted: the products with the base's matrices, forward and back to their inputs, where something that trains lies
before them; the adapters' products, with their weights' gradients; attention over each row's own earlier tokens;
logits at the positions that need them; the weights, read once per pass; the keys and values that a new token reads.

Left out, so that the floor is one: norms, activations, softmaxes, rotary angles, gates, AdamW's arithmetic, reading
and writing activations, and whatever is not spent on tokens (padding, upper triangles of attention, recomputation).
All products count as done at the rate of the machine's fastest type.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.machine import Machine
from llama.model import Transformer
from moa.state import adapter_parameters

MIDDLES = ("B", "up", "up_bias", "w2.weight")  # matrices behind another of the same adapter or router


@dataclass
class Work:
    """forward, backward: FLOPs by what they are spent on. bytes: read and written at least."""

    forward: dict[str, int] = field(default_factory=dict)
    backward: dict[str, int] = field(default_factory=dict)
    bytes: int = 0

    @property
    def flops(self) -> int:
        return sum(self.forward.values()) + sum(self.backward.values())

    def seconds(self, machine: Machine) -> float:
        """The floor: products and bytes may go on at the same time."""
        return max(self.flops / max(machine.flops.values()), self.bytes / machine.bandwidth)

    def add(self, name: str, product: int, to_input: bool = False, to_weight: bool = False) -> None:
        """A product of so many FLOPs; a gradient takes as many again."""
        self.forward[name] = self.forward.get(name, 0) + product
        self.backward[name] = self.backward.get(name, 0) + product * (to_input + to_weight)


class _Matrix(NamedTuple):
    """A trained matrix of a layer. middle: what it is multiplied with comes from another trained one."""

    name: str
    shape: tuple[int, ...]
    middle: bool


def pairs(lengths: Sequence[int]) -> int:
    """(query, key) pairs of causal attention over rows of these lengths."""
    return sum(n * (n + 1) // 2 for n in lengths)


def pass_work(
    model: Transformer, lengths: Sequence[int], n_logits: int, training: bool = False, decoding: bool = False
) -> Work:
    """The model's products over packed rows, with logits at so many positions; those of the backward pass too where
    `training`: of the bare model, back to the embeddings' output. decoding: what depends on a row's prompt alone, or on
    weights alone, is there already."""
    args, work, n, trained = model.args, Work(), sum(lengths), _trained(model)
    heads, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    product = 2 * n * args.dim  # times another width
    grad = training and model.config is None
    for layer in range(args.n_layers):
        matrices = trained.get(f"{layer}", {})
        sites = {slot.site: slot.name for slot in (model.config.slots(layer) if model.config else [])}
        biases = training and model.config is not None and model.config.base.train_bias_norm
        into = grad or biases  # whether a gradient is wanted at what the block's first norm gives

        def at(site: str, grad: bool, n_read: int = n, matrices=matrices, sites=sites) -> bool:
            """Count what stands at a site; grad: whether its input's gradient is wanted. Whether its output's is."""
            for matrix in matrices.get(sites.get(site, ""), []):
                size = 2 * n_read * math.prod(matrix.shape)
                work.add(sites[site], size, training and (grad or matrix.middle), training)
            return grad or (training and site in sites)

        if "router" in matrices and not (decoding and _per_row(model, layer)):
            sites["router"] = "router"
            at("router", grad, len(lengths) if _per_row(model, layer) else n)
        grad = into
        for name, width in (("wq", heads), ("wk", kv), ("wv", kv)):
            work.add(name, product * width, into)
        query, *others = [at(site, into) for site in "QKV"]
        grad = query or any(others)
        wide = pairs(lengths) * heads  # as wide as all heads, a token of a row with each of its earlier ones
        work.add("attention", 4 * wide, grad, grad)
        if "attention" in sites:
            grad = at("attention", into) or grad
            vectors = len(model.get_parameter(f"layers.{layer}.attention.adapters.{sites['attention']}.P"))
            keys_and_values = 0 if decoding else 4 * vectors * args.dim * kv
            work.add(sites["attention"], keys_and_values, training)
            work.add(sites["attention"], 2 * n * vectors * heads, query, training)
            work.add(sites["attention"], 2 * n * vectors * heads, training, training)
        work.add("wo", product * heads, grad)
        behind = at("O", grad) or biases
        for name in ("w1", "w3"):
            work.add(name, product * args.ffn_dim, behind)
        hidden = any([at(site, behind) for site in ("FFN_GATE", "FFN_UP")])
        work.add("w2", product * args.ffn_dim, hidden)
        grad = any([at("FFN_DOWN", hidden), at("block", behind)])
    work.add("logits", 2 * n_logits * args.dim * args.vocab_size, grad)
    work.bytes = _weight_bytes(model) * (2 if training else 1)
    return work


def step_work(model: Transformer, lengths: Sequence[int], n_labels: int) -> Work:
    """A training step over packed rows: forward, backward and AdamW; of the bare model, back to the embeddings."""
    work = pass_work(model, lengths, n_labels, training=True)
    trained = sum(math.prod(entry.declared.shape) for entry in adapter_parameters(model).values())
    work.bytes += 4 * trained * (1 + 1 + 7)  # gradients written, weights read, and all that AdamW reads and writes
    return work


def generation_work(
    model: Transformer, prompts: Sequence[int], answers: Sequence[int], max_rows: int
) -> tuple[Work, Work]:
    """Prefill and decode of rows with these numbers of prompt tokens and of tokens chosen, `max_rows` at once."""
    prefill = pass_work(model, prompts, len(prompts))
    fed = [max(0, n - 1) for n in answers]  # the first token comes from the prefill
    decode = pass_work(model, [1], 1, decoding=True)
    for name in decode.forward:
        decode.forward[name] *= sum(fed)
    read = sum(n * p + n * (n + 1) // 2 for p, n in zip(prompts, fed, strict=True))  # tokens' keys and values
    args, width = model.args, model.output.weight.element_size()
    kv = args.n_kv_heads * args.head_dim
    decode.forward["attention"] = 4 * read * args.n_heads * args.head_dim * args.n_layers
    steps = max(-(-sum(fed) // max_rows), *fed)
    decode.bytes = steps * decode.bytes + read * 2 * kv * width * args.n_layers
    return prefill, decode


def _trained(model: Transformer) -> dict[str, dict[str, list[_Matrix]]]:
    """Trained matrices by layer and slot; a prompt's vectors are counted apart."""
    config = model.config
    gated = config is not None and (config.router.block_router != "none" or config.experts.expert_num > 1)
    found: dict[str, dict[str, list[_Matrix]]] = {}
    for key, (_, declared, slot) in adapter_parameters(model).items():
        name = key.rpartition(f"{slot}.")[2]
        if len(declared.shape) == 2 and name != "P" and (gated or name != "up_bias"):
            matrices = found.setdefault(key.split(".")[1], {}).setdefault(slot, [])
            matrices.append(_Matrix(name, declared.shape, name in MIDDLES))
    return found


def _per_row(model: Transformer, layer: int) -> bool:
    return model.layers[layer].router.per_row


def _weight_bytes(model: Transformer) -> int:
    """All matrices that a pass reads, adapters in the base's type; of the embedding it reads a few rows."""
    trained = sum(math.prod(entry.declared.shape) for entry in adapter_parameters(model).values())
    base = sum(p.numel() for name, p in model.named_parameters() if ".adapters." not in name and ".router." not in name)
    return (base - model.tok_embeddings.weight.numel() + trained) * model.output.weight.element_size()
