"""The model written out token by token, head by head and adapter by adapter, in float64: what the fast paths of
`llama/` and `moa/` must equal, in value and in gradient. Takes nothing from them but the tensors and their names."""

import cmath
import math

import torch
from torch import Tensor

# A router's outputs stand in this order; a block has those of its adapters.
SLOTS = ("lora_Q", "lora_K", "lora_V", "prompt", "lora_O", "lora_FFN_UP", "lora_FFN_GATE", "lora_FFN_DOWN", "p_adapter")
PLACES = {slot: "attention." for slot in SLOTS[:5]} | {slot: "feed_forward." for slot in SLOTS[5:8]} | {"p_adapter": ""}


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def s(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean() + eps).sqrt() * weight


def rotate(x: Tensor, position: int, theta: float) -> Tensor:
    """One head's vector: components 2i and 2i + 1 are a complex number, turned by position * theta^(-2i/h)."""
    turned = []
    for i in range(0, len(x), 2):
        turn = cmath.exp(1j * position * theta ** (-i / len(x)))
        turned += [x[i] * turn.real - x[i + 1] * turn.imag, x[i] * turn.imag + x[i + 1] * turn.real]
    return torch.stack(turned)


class PlainModel:
    """args: the keys of params.json; flat: the method's settings; w: all tensors by key, float64."""

    def __init__(self, args: dict, flat: dict, w: dict[str, Tensor]):
        self.args, self.flat, self.w = args, flat, w
        self.h = args["dim"] // args["n_heads"]

    def logits(self, row: list[int]) -> Tensor:
        """Tokens of one row -> (T, V)."""
        xs = [self.w["tok_embeddings.weight"][token] for token in row]
        for layer in range(self.args["n_layers"]):
            xs = Block(self, layer).outputs(xs)
        return torch.stack([self.w["output.weight"] @ self.norm("norm", x) for x in xs])

    def norm(self, key: str, x: Tensor) -> Tensor:
        return rms_norm(x, self.w[f"{key}.weight"], self.args["norm_eps"])


class Block:
    def __init__(self, model: PlainModel, layer: int):
        self.model, self.h, self.flat = model, model.h, model.flat
        self.path = f"layers.{layer}."
        self.here = {k[len(self.path) :]: t for k, t in model.w.items() if k.startswith(self.path)}
        self.slots = [slot for slot in SLOTS if any(f"adapters.{slot}." in key for key in self.here)]

    def outputs(self, xs: list[Tensor]) -> list[Tensor]:
        gates = [self.gates(x) for x in xs]
        normed = [self.model.norm(self.path + "attention_norm", x) for x in xs]
        q = [self.heads("Q", "wq", u, g) for u, g in zip(normed, gates, strict=True)]
        k = [self.heads("K", "wk", u, g) for u, g in zip(normed, gates, strict=True)]
        v = [self.heads("V", "wv", u, g) for u, g in zip(normed, gates, strict=True)]
        theta = self.model.args["rope_theta"]
        q = [[rotate(head, t, theta) for head in heads] for t, heads in enumerate(q)]
        k = [[rotate(head, t, theta) for head in heads] for t, heads in enumerate(k)]
        return [self.output(t, x, gates[t], q[t], k, v) for t, x in enumerate(xs)]

    def output(self, t: int, x: Tensor, gates: dict, q: list, k: list, v: list) -> Tensor:
        heads = []
        for i, query in enumerate(q):
            j = i // (len(q) // len(k[0]))  # query heads that share a key head lie side by side
            heads.append(self.attend(query, [k[u][j] for u in range(t + 1)], [v[u][j] for u in range(t + 1)]))
            if "prompt" in self.slots:
                heads[i] = heads[i] + gates["prompt"] * self.prompt(i, j, query)
        heads = torch.cat(heads)
        y = x + self.linear("O", "attention.wo", heads, gates)
        z = self.model.norm(self.path + "ffn_norm", y)
        up = self.linear("FFN_UP", "feed_forward.w3", z, gates)
        gate = self.linear("FFN_GATE", "feed_forward.w1", z, gates)
        out = y + self.linear("FFN_DOWN", "feed_forward.w2", silu(gate) * up, gates)
        if "p_adapter" in self.slots:
            p = {name: self.here[f"adapters.p_adapter.{name}"] for name in ("down", "down_bias", "up", "up_bias")}
            out = out + gates["p_adapter"] * (p["up"] @ silu(p["down"] @ z + p["down_bias"]) + p["up_bias"])
        return out

    def attend(self, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        weights = torch.stack([query @ key / math.sqrt(self.h) for key in keys]).exp()
        weights = weights / weights.sum()
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    def prompt(self, head: int, kv_head: int, query: Tensor) -> Tensor:
        part = slice(kv_head * self.h, (kv_head + 1) * self.h)
        vectors = self.here["attention.adapters.prompt.P"]
        keys = [(self.here["attention.wk.weight"] @ p)[part] for p in vectors]
        values = [(self.here["attention.wv.weight"] @ p)[part] for p in vectors]
        return self.here["attention.adapters.prompt.z"][head] * self.attend(query, keys, values)

    def linear(self, target: str, base: str, u: Tensor, gates: dict) -> Tensor:
        y = self.here[f"{base}.weight"] @ u
        if f"lora_{target}" not in self.slots:
            return y
        a, b = (self.here[f"{base.split('.')[0]}.adapters.lora_{target}.{name}"] for name in "AB")
        return y + gates[f"lora_{target}"] * (self.flat["lora_alpha"] / self.flat["lora_rank"]) * (b @ (a @ u))

    def heads(self, target: str, base: str, u: Tensor, gates: dict) -> list[Tensor]:
        return list(self.linear(target, f"attention.{base}", u, gates).split(self.h))

    def gates(self, x: Tensor) -> dict:
        if "swi_x" not in self.flat:
            return dict.fromkeys(self.slots, 1.0)
        g = s(self.router(x))
        if self.flat["method"] == "sparse_moa":
            limit = self.flat.get("max_threshold", 0.5)
            learned = not self.flat.get("const_threshold", False)
            if learned:
                w, b = self.here["router.threshold.weight"], self.here["router.threshold.bias"]
                limit = limit * s(w[0] @ x + b[0])
            kept = torch.where(g >= limit, g, 0)
            # [g >= G] has the derivative of -G where the threshold is learned, else none
            g = kept - g.detach() * (limit - limit.detach()) if learned else kept
        return dict(zip(self.slots, g, strict=True))

    def router(self, x: Tensor) -> Tensor:
        r = {k.removeprefix("router.router."): t for k, t in self.here.items() if k.startswith("router.router.")}
        if self.flat["swi_x"] == 0:
            return r["weight"] @ x + r["bias"]
        hidden = silu(r["w1.weight"] @ x + r["w1.bias"]) * (r["w3.weight"] @ x + r["w3.bias"])
        assert len(hidden) == self.flat["swi_x"] * len(self.slots)
        return r["w2.weight"] @ hidden + r["w2.bias"]
