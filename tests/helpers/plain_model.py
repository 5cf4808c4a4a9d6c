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


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


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
    """args: the keys of params.json; flat: all settings of the method; w: all tensors by key, float64."""

    def __init__(self, args: dict, flat: dict, w: dict[str, Tensor]):
        self.args, self.flat, self.w = args, flat, w
        self.h = args.get("head_dim") or args["dim"] // args["n_heads"]
        # Mixture of experts -> of each token that it has seen, which experts were chosen, and with what weight
        self.routed: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def logits(self, row: list[int], prompt_len: int | None = None) -> Tensor:
        """Tokens of one row -> (T, V)."""
        xs = [self.w["tok_embeddings.weight"][token] for token in row]
        for layer in range(self.args["n_layers"]):
            xs = Block(self, layer).outputs(xs, len(row) if prompt_len is None else prompt_len)
        output = self.w["tok_embeddings.weight" if self.args.get("tied_embeddings") else "output.weight"]
        return torch.stack([output @ self.norm("norm", x) for x in xs])

    def auxiliary(self) -> Tensor:
        """The load-balancing loss over all tokens seen so far."""
        total = torch.zeros((), dtype=torch.float64)
        for tokens in self.routed.values():
            f = sum(chosen for chosen, _ in tokens) / len(tokens)
            p = sum(p for _, p in tokens) / len(tokens)
            total = total + len(f) * f @ p
        return self.flat["lb_loss_coeff"] * total

    def norm(self, key: str, x: Tensor) -> Tensor:
        weight = self.w.get(f"{key}.adapters.norm.weight", self.w[f"{key}.weight"])
        return rms_norm(x, weight, self.args["norm_eps"])


class Block:
    def __init__(self, model: PlainModel, layer: int):
        self.model, self.h, self.flat = model, model.h, model.flat
        self.path = f"layers.{layer}."
        self.here = {k[len(self.path) :]: t for k, t in model.w.items() if k.startswith(self.path)}
        self.slots = [slot for slot in SLOTS if any(f"adapters.{slot}." in key for key in self.here)]

    def outputs(self, xs: list[Tensor], prompt_len: int) -> list[Tensor]:
        if self.flat["block_router"] in ("instance", "unipelt"):  # one answer for the whole row
            gates = [self.gates(sum(xs[:prompt_len]) / prompt_len)] * len(xs)
        else:
            gates = [self.gates(x) for x in xs]
        normed = [self.model.norm(self.path + "attention_norm", x) for x in xs]
        q = [self.normed_heads("Q", "q", u, g) for u, g in zip(normed, gates, strict=True)]
        k = [self.normed_heads("K", "k", u, g) for u, g in zip(normed, gates, strict=True)]
        v = [self.heads("V", "wv", u, g) for u, g in zip(normed, gates, strict=True)]
        theta = self.model.args["rope_theta"]
        q = [[rotate(head, t, theta) for head in heads] for t, heads in enumerate(q)]
        k = [[rotate(head, t, theta) for head in heads] for t, heads in enumerate(k)]
        return [self.output(t, x, normed[t], gates[t], q[t], k, v) for t, x in enumerate(xs)]

    def output(self, t: int, x: Tensor, u: Tensor, gates: dict, q: list, k: list, v: list) -> Tensor:
        heads = []
        weights = gates["prompt"] * self.experts("prompt", u) if "prompt" in self.slots else None
        for i, query in enumerate(q):
            j = i // (len(q) // len(k[0]))  # query heads that share a key head lie side by side
            heads.append(self.attend(query, [k[u][j] for u in range(t + 1)], [v[u][j] for u in range(t + 1)]))
            if "prompt" in self.slots:
                heads[i] = heads[i] + self.prompt(i, j, query, weights)
        heads = torch.cat(heads)
        y = x + self.linear("O", "attention.wo", heads, gates)
        z = self.model.norm(self.path + "ffn_norm", y)
        up = self.linear("FFN_UP", "feed_forward.w3", z, gates)
        gate = self.linear("FFN_GATE", "feed_forward.w1", z, gates)
        out = y + self.linear("FFN_DOWN", "feed_forward.w2", silu(gate) * up, gates)
        if "p_adapter" in self.slots:
            p = {
                name: self.here[f"adapters.p_adapter.{name}"]
                for name in ("down_proj", "down_proj_bias", "up_proj", "up_proj_bias")
            }
            f = {"silu": silu, "gelu": gelu}[self.flat["p_adapter_activation"]]
            size, shared = self.flat["p_adapter_size"], self.flat["p_adapter_hydra"]
            for e, weight in enumerate(gates["p_adapter"] * self.experts("p_adapter", z)):
                mine = slice(e * size, (e + 1) * size)
                down = slice(0, size) if shared else mine
                hidden = f(p["down_proj"][down] @ z + p["down_proj_bias"][down])
                out = out + weight * (p["up_proj"][:, mine] @ hidden + p["up_proj_bias"][e])
        return out

    def attend(self, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        weights = torch.stack([query @ key / math.sqrt(self.h) for key in keys]).exp()
        weights = weights / weights.sum()
        return sum(weight * value for weight, value in zip(weights, values, strict=True))

    def prompt(self, head: int, kv_head: int, query: Tensor, experts: Tensor) -> Tensor:
        """One softmax over the vectors of all experts; then the part of each counts with its weight."""
        part = slice(kv_head * self.h, (kv_head + 1) * self.h)
        vectors = self.here["attention.adapters.prompt.prompt"]
        keys = [self.norm_of_heads("k", (self.here["attention.wk.weight"] @ p)[part]) for p in vectors]
        values = [(self.here["attention.wv.weight"] @ p)[part] for p in vectors]
        weights = torch.stack([query @ key / math.sqrt(self.h) for key in keys]).exp()
        weights = weights / weights.sum()
        length = self.flat["prompt_len"]
        attended = sum(experts[i // length] * weights[i] * value for i, value in enumerate(values))
        return self.here["attention.adapters.prompt.gate"][head] * attended

    def linear(self, target: str, base: str, u: Tensor, gates: dict) -> Tensor:
        y = self.here[f"{base}.weight"] @ u
        part, slot, rank = base.split(".")[0], f"lora_{target}", self.flat["lora_rank"]
        if f"{part}.adapters.bias_{target}.bias" in self.here:
            y = y + self.here[f"{part}.adapters.bias_{target}.bias"]
        if slot not in self.slots:
            return y
        a, b = (self.here[f"{part}.adapters.{slot}.{name}"] for name in ("lora_A", "lora_B"))
        for e, weight in enumerate(gates[slot] * self.experts(slot, u)):
            mine = slice(e * rank, (e + 1) * rank)
            shared = slice(0, rank) if self.flat["lora_hydra"] else mine
            y = y + weight * (self.flat["lora_alpha"] / rank) * (b[:, mine] @ (a[shared] @ u))
        return y

    def experts(self, slot: str, u: Tensor) -> Tensor:
        """Weights of an adapter's experts for one token, (E,)."""
        n, kind = self.flat["expert_num"], self.flat["expert_router"]
        if n == 1:
            return torch.ones(1, dtype=torch.float64)
        path = f"{PLACES[slot]}adapters.{slot}.expert_router."
        r = {k.removeprefix(path): t for k, t in self.here.items() if k.startswith(path)}
        p = r["proj.weight"] @ u + r.get("proj.bias", 0)
        p = p.exp() / p.exp().sum()
        if kind == "soft":
            return p
        if kind == "topk":
            best = sorted(range(n), key=lambda e: -p[e].item())[: self.flat["top_k"]]
            chosen = torch.tensor([float(e in best) for e in range(n)], dtype=torch.float64)
        else:
            limit = s(r["threshold.weight"][0] @ u + r["threshold.bias"][0]) / n
            p = p - limit
            chosen = (p >= 0).double()
        self.model.routed.setdefault(self.path + slot, []).append((chosen, p))
        return p * chosen / (p * chosen).sum()

    def heads(self, target: str, base: str, u: Tensor, gates: dict) -> list[Tensor]:
        return list(self.linear(target, f"attention.{base}", u, gates).split(self.h))

    def normed_heads(self, target: str, name: str, u: Tensor, gates: dict) -> list[Tensor]:
        return [self.norm_of_heads(name, head) for head in self.heads(target, f"w{name}", u, gates)]

    def norm_of_heads(self, name: str, head: Tensor) -> Tensor:
        """A query's or a key's own norm, which Qwen3 has."""
        return self.model.norm(f"{self.path}attention.{name}_norm", head) if self.model.args.get("qk_norm") else head

    def gates(self, x: Tensor) -> dict:
        if not self.slots:
            return {}
        kind = self.flat["block_router"]
        if kind == "none":
            return dict.fromkeys(self.slots, 1.0)
        if kind == "unipelt":
            w = {slot: f"router.{'lora' if slot.startswith('lora') else slot}" for slot in self.slots}
            return {slot: s(self.here[f"{k}.weight"][0] @ x + self.here[f"{k}.bias"][0]) for slot, k in w.items()}
        g = self.router(x)
        g = s(g) if self.flat["gate_activation"] == "sigmoid" else g.exp() / g.exp().sum()
        if kind == "sparse":
            limit, learned = self.flat["max_threshold"], not self.flat["const_threshold"]
            if learned:
                w, b = self.here["router.threshold.weight"], self.here["router.threshold.bias"]
                limit = limit * s(w[0] @ x + b[0])
            kept = torch.where(g >= limit, g, 0)
            # [g >= G] has the derivative of -G where the threshold is learned, else none
            g = kept - g.detach() * (limit - limit.detach()) if learned else kept
        return dict(zip(self.slots, g, strict=True))

    def router(self, x: Tensor) -> Tensor:
        r = {k.removeprefix("router.proj."): t for k, t in self.here.items() if k.startswith("router.proj.")}
        if self.flat["swi_x"] == 0:
            return r["weight"] @ x + r["bias"]
        hidden = silu(r["w1.weight"] @ x + r["w1.bias"]) * (r["w3.weight"] @ x + r["w3.bias"])
        assert len(hidden) == self.flat["swi_x"] * len(self.slots)
        return r["w2.weight"] @ hidden + r["w2.bias"]
