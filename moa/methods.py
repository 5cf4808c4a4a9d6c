"""What a mixture is made of: adapter types, routers and the options of each; the methods as presets. Needs no torch.

Every option is declared once, here, as a field of a dataclass. Its flag is `<adapter>_<field>` for an adapter's option
(`lora_rank`, `prompt_len`) and `<field>` for the rest (`swi_x`).
"""

import math
from collections.abc import Collection
from dataclasses import Field, dataclass, field, fields
from importlib import import_module
from typing import Any, NamedTuple

# Where an adapter can stand in a block, in the order of the router's outputs: beside a linear layer, at the attention
# (its heads' output before wo), at the feed-forward block or at the whole block (their outputs). The names are those of
# --lora_targets.
TARGETS = ("Q", "K", "V", "attention", "O", "FFN_UP", "FFN_GATE", "FFN_DOWN", "FFN", "block")

# Target -> the linear layer there, by its name in Meta's checkpoints.
META_NAMES = {
    **{"Q": "attention.wq", "K": "attention.wk", "V": "attention.wv", "O": "attention.wo"},
    **{"FFN_UP": "feed_forward.w3", "FFN_GATE": "feed_forward.w1", "FFN_DOWN": "feed_forward.w2"},
}
LINEAR_TARGETS = tuple(META_NAMES)


BOUNDS = {int: (1, 2**16), float: (1e-9, 1e9)}  # of an option that names none


def option(
    default: Any, help: str, choices: Collection | None = None, bounds: tuple[float, float] | None = None
) -> Any:
    """A dataclass field with what the command line shows and checks. bounds: smallest and largest value of a number."""
    return field(
        default=default, metadata={"help": help, "choices": choices, "bounds": bounds or BOUNDS.get(type(default))}
    )


def import_class(name: str) -> Any:
    """The class behind "package.module:Class". Modules are imported when a model needs them: options need no torch."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


@dataclass(frozen=True)
class AdapterOptions:
    """Options of every type of adapter. A type that can stand at several targets has `targets` as well."""

    layers: str = option("", "layers with this adapter: all, or ranges with the end excluded, as 0-8,24-32")


@dataclass(frozen=True)
class LinearAdapterOptions(AdapterOptions):
    targets: str = option("Q,K,V,O,FFN_DOWN", f"linear layers with this adapter, of {','.join(LINEAR_TARGETS)}")


@dataclass(frozen=True)
class LoRAConfig(LinearAdapterOptions):
    """Low-rank updates beside linear layers."""

    rank: int = option(8, "rank of each LoRA")
    alpha: float = option(8.0, "LoRA's scale is alpha / rank")
    hydra: bool = option(False, "the LoRA experts of a layer share one A")
    rslora: bool = option(False, "LoRA's scale is alpha / sqrt(rank)")
    lr_ratio: float = option(1.0, "learning rate of B, as a multiple of A's (LoRA+)")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclass(frozen=True)
class ParallelAdapterConfig(AdapterOptions):
    """A bottleneck network beside the feed-forward block."""

    size: int = option(16, "hidden width of each parallel adapter")
    activation: str = option("silu", "activation of the parallel adapters", ("silu", "gelu", "relu"))
    hydra: bool = option(False, "the parallel adapters of a layer share one down projection")


@dataclass(frozen=True)
class PromptConfig(AdapterOptions):
    """Trained vectors that each layer's queries attend to."""

    len: int = option(10, "prompt vectors per layer (of each expert)")


@dataclass(frozen=True)
class LowRankConfig(LinearAdapterOptions):
    """Low-rank updates beside linear layers, of the kinds that have no experts in their place (DoRA, PiSSA)."""

    rank: int = option(16, "rank of each")
    alpha: float = option(16.0, "its scale is alpha / rank")


@dataclass(frozen=True)
class CoMoLConfig(LowRankConfig):
    """Low-rank updates whose core, a small matrix, is mixed from experts."""

    cores: int = option(8, "experts of each CoMoL")


@dataclass(frozen=True)
class FlyLoRAConfig(LowRankConfig):
    """Low-rank updates with a frozen A, of which each token uses some ranks."""

    rank: int = option(32, "rank of each")
    alpha: float = option(64.0, "its scale is alpha / rank")
    top_k: int = option(8, "ranks that a token uses")


@dataclass(frozen=True)
class VeRAConfig(LinearAdapterOptions):
    """Two trained vectors per layer around random matrices that all layers share."""

    rank: int = option(256, "rank of the shared matrices")
    seed: int = option(0, "seed of the shared matrices", bounds=(0, 2**31))


@dataclass(frozen=True)
class IA3Config(LinearAdapterOptions):
    """A trained factor for each output of a linear layer."""

    targets: str = option("K,V,FFN_UP", "linear layers with IA3, as for --lora_targets (FFN_UP: the paper's FFN_DOWN)")


@dataclass(frozen=True)
class MixLoRAConfig(AdapterOptions):
    """Experts of the feed-forward block, each with low-rank updates of all its layers."""

    rank: int = option(8, "rank of each update of a MixLoRA expert")
    alpha: float = option(16.0, "MixLoRA's scale is alpha / rank")
    experts: int = option(8, "experts of each feed-forward block")
    top_k: int = option(2, "experts that a token goes to")


class AdapterType(NamedTuple):
    """A type of adapter: `module` ("package.module:Class") is built at each chosen target of each chosen layer.

    options: a frozen dataclass, from `AdapterOptions`; its fields become the flags `<name>_<field>`. uses: the settings
    that it reads beside them.
    """

    options: type
    module: str
    targets: tuple[str, ...]
    uses: tuple[str, ...] = ()


# At one target they apply in this order: DoRA's norm is that of the frozen layer, IA3 scales what stands there.
ADAPTERS: dict[str, AdapterType] = {
    "dora": AdapterType(LowRankConfig, "moa.dora:DoRA", LINEAR_TARGETS),
    "lora": AdapterType(LoRAConfig, "moa.lora:LoRA", LINEAR_TARGETS),
    "pissa": AdapterType(LowRankConfig, "moa.pissa:PiSSA", LINEAR_TARGETS),
    "comol": AdapterType(CoMoLConfig, "moa.comol:CoMoL", LINEAR_TARGETS),
    "flylora": AdapterType(FlyLoRAConfig, "moa.flylora:FlyLoRA", LINEAR_TARGETS),
    "vera": AdapterType(VeRAConfig, "moa.vera:VeRA", LINEAR_TARGETS),
    "ia3": AdapterType(IA3Config, "moa.ia3:IA3", LINEAR_TARGETS),
    "prompt": AdapterType(PromptConfig, "moa.prompt:Prompt", ("attention",)),
    "mixlora": AdapterType(MixLoRAConfig, "moa.mixlora:MixLoRA", ("FFN",), uses=("lb_loss_coeff",)),
    "p_adapter": AdapterType(ParallelAdapterConfig, "moa.parallel_adapter:ParallelAdapter", ("block",)),
}


class RouterType(NamedTuple):
    """A type of router: `module` ("package.module:Class") is built where one is needed; uses: the options it reads."""

    module: str
    uses: tuple[str, ...]


# Routers that weigh the adapters of a block against each other, and those that weigh the experts of one adapter, by
# the value of --block_router and --expert_router.
BLOCK_ROUTERS: dict[str, RouterType] = {
    "none": RouterType("", ()),
    "soft": RouterType("moa.routers:SoftRouter", ("swi_x", "gate_activation")),
    "sparse": RouterType(
        "moa.routers:SparseRouter", ("swi_x", "max_threshold", "const_threshold", "threshold_gradient")
    ),
    "instance": RouterType("moa.routers:InstanceRouter", ("swi_x", "gate_activation")),
    "unipelt": RouterType("moa.routers:UniPELTRouter", ()),
}
EXPERT_ROUTERS: dict[str, RouterType] = {
    "soft": RouterType("moa.expert_routers:SoftmaxRouter", ()),
    "topk": RouterType("moa.expert_routers:TopKRouter", ("top_k", "noisy_router", "lb_loss_coeff")),
    "adamole": RouterType("moa.expert_routers:AdaMoLERouter", ("lb_loss_coeff",)),
}


@dataclass(frozen=True)
class MixtureConfig:
    """What weighs adapters and experts, and what trains of the base itself."""

    block_router: str = option(
        "none",
        "router of a block's adapters: soft and sparse per token; instance and unipelt once per row, from its prompt, "
        "with one gate per adapter or one per type of adapter",
        BLOCK_ROUTERS,
    )
    gate_activation: str = option(
        "sigmoid", "gates from the router's outputs: each by itself, or (softmax) sharing 1", ("sigmoid", "softmax")
    )
    swi_x: int = option(4, "hidden units of the SwiGLU router per adapter; 0: a linear router", bounds=(0, 2**16))
    max_threshold: float = option(0.5, "sparse router: the largest threshold, G_max", bounds=(1e-9, 1))
    const_threshold: bool = option(False, "sparse router: every threshold is G_max instead of learned")
    threshold_gradient: str = option(
        "straight_through", "sparse router: how the threshold learns (none: not at all)", ("straight_through", "none")
    )
    expert_num: int = option(1, "experts in the place of each LoRA, prompt and parallel adapter")
    layer_experts: str = option(
        "", "number of experts by depth: 2,4,6,8 for four equal groups of layers (default: expert_num in all)"
    )
    expert_router: str = option("soft", "router of the experts of each adapter", EXPERT_ROUTERS)
    top_k: int = option(2, "topk router: experts that a token goes to")
    noisy_router: bool = option(False, "topk router: learned noise on its logits while training")
    lb_loss_coeff: float = option(0.0, "topk and adamole routers: weight of the load-balancing loss", bounds=(0, 1e9))
    train_bias_norm: bool = option(False, "also train the norms' weights, and biases of wq, wo, w1, w2 and w3")


# Settings that are younger than some adapter files: where one is missing, its default is what was trained.
ADDED_LATER = {"lora_rslora", "lora_lr_ratio", "layer_experts"}


def config_fields() -> dict[str, Field]:
    """Every flag of the adapter configuration -> its dataclass field (type, default, help, choices)."""
    flags = {f"{name}_{f.name}": f for name, kind in ADAPTERS.items() for f in fields(kind.options)}
    return flags | {f.name: f for f in fields(MixtureConfig)}


# The methods: each a set of options on top of the defaults. Published sizes; "all" means every layer of the model.
_LORA = {"lora_layers": "all"}
_PROMPT = {"prompt_layers": "all"}
_P_ADAPTER = {"p_adapter_layers": "all"}
_EXPERTS = {"expert_num": 8}
METHODS: dict[str, dict[str, Any]] = {
    "soft_moa": {**_LORA, **_PROMPT, **_P_ADAPTER, "block_router": "soft"},
    "sparse_moa": {**_LORA, **_P_ADAPTER, "block_router": "sparse"},
    "soft_moa_instance": {**_LORA, **_PROMPT, **_P_ADAPTER, "block_router": "instance"},
    "unipeft": {**_LORA, **_PROMPT, **_P_ADAPTER, "block_router": "unipelt"},
    "lora": {**_LORA, "lora_rank": 16, "lora_alpha": 16.0},
    "prompt": _PROMPT,
    "parallel_adapter": _P_ADAPTER,
    "molora": {**_LORA, **_EXPERTS},
    "hydralora": {**_LORA, **_EXPERTS, "lora_hydra": True},
    "topk_moelora": {**_LORA, **_EXPERTS, "expert_router": "topk"},
    "adamole": {**_LORA, **_EXPERTS, "expert_router": "adamole"},
    "parallel_adapter_moe": {**_P_ADAPTER, **_EXPERTS, "p_adapter_hydra": True},
    "prompt_moe": {**_PROMPT, **_EXPERTS},
    "rslora": {**_LORA, "lora_rank": 16, "lora_alpha": 16.0, "lora_rslora": True},
    "lora_plus": {**_LORA, "lora_rank": 16, "lora_alpha": 16.0, "lora_lr_ratio": 16.0},
    "dora": {"dora_layers": "all"},
    "pissa": {"pissa_layers": "all"},
    "vera": {"vera_layers": "all"},
    "ia3": {"ia3_layers": "all"},
    "comol": {"comol_layers": "all"},
    "flylora": {"flylora_layers": "all"},
    "mola": {
        **_LORA,
        **{"lora_targets": ",".join(LINEAR_TARGETS), "lora_rank": 8, "lora_alpha": 16.0},
        **{"expert_num": 8, "layer_experts": "2,4,6,8", "expert_router": "topk"},
    },
    "mixlora": {**_LORA, "lora_targets": "Q,K,V,O", "lora_alpha": 16.0, "mixlora_layers": "all", "lb_loss_coeff": 0.01},
    "custom": {},  # one's own, from flags or a file
}
