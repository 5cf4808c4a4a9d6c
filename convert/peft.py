"""LoRA, DoRA, IA3 and VeRA to and from PEFT's folders: adapter_config.json and adapter_model.safetensors.

Module names are those of transformers' LlamaForCausalLM and Qwen3ForCausalLM. Their rotary embedding pairs the halves
of a head and Meta's pairs neighbours, so that what runs along the outputs of Q and K has another order.

IA3 at FFN_UP is PEFT's at the input of down_proj. VeRA becomes the LoRA that it is, of the same rank, both ways: PEFT's
own cuts the matrices of every layer from one pair, which leaves none in the order of Q and K beside those of other
layers, and no seed gives PEFT's.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from convert.adapters import ADAPTER_FILES, adapter_keys, check_alone, kind_of, recorded_shape
from convert.hf import open_safetensors
from convert.meta_format import HF, LAYER_NAMES, bare_model, check_output, new_folder, permute_rope, unpermute_rope
from llama.args import ModelArgs
from llama.checkpoint import load_params_and_tokenizer
from moa.adapter_file import adapter_params, load_adapter, save_adapter
from moa.config import AdapterConfig
from moa.files import read_json
from moa.methods import META_NAMES
from moa.state import load_adapter_state_dict

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PEFT_FILES = (CONFIG, TENSORS, "README.md")
PREFIX = "base_model.model.model.layers."
VERA_A, VERA_B = "base_model.vera_A", "base_model.vera_B"  # of all layers
# Our tensors' names -> PEFT's
NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector", "factor": "ia3_l"}
OUR_NAMES = {theirs: ours for ours, theirs in NAMES.items()}
NAME = re.compile(rf"{re.escape(PREFIX)}(0|[1-9][0-9]*)\.(\w+\.\w+)\.({'|'.join(map(re.escape, OUR_NAMES))})")
ALONG_OUTPUTS = ("lora_B", "magnitude", "factor")
# An adapter's target -> transformers' module there: Q -> self_attn.q_proj.
MODULES = {target: row[HF] for target, name in META_NAMES.items() for row in LAYER_NAMES if row[0] == name}
TARGETS = {module: target for target, module in MODULES.items()}
TARGET_AT = {name: target for target, name in META_NAMES.items()}
PERMUTED = ("Q", "K")

# Settings of PEFT's LoRA, IA3 and VeRA that change nothing in what a trained adapter computes. Any other must be off.
HARMLESS = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("use_rslora", "auto_mapping", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    *("use_dora", "init_lora_weights", "feedforward_modules", "init_ia3_weights"),
    *("projection_prng_key", "save_projection", "vera_dropout", "d_initial", "init_weights"),
}
# Some ways to initialise (PiSSA, OLoRA, ...) take something out of the base's weights as well; these do not.
HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal")


def to_peft(
    adapter_path: str | Path,
    output_dir: str | Path,
    base_model: str | None = None,
    ckpt_dir: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a PEFT folder of an adapter of LoRAs, DoRAs, IA3 or VeRA; tensors are float32.

    base_model: name or path of the Hugging Face model that PEFT is to put it on. ckpt_dir: the base, needed for its
    shape where the adapter's settings do not tell it (the authors' do not). Raises ValueError or OSError naming the
    file and what is wrong or cannot be expressed; then nothing was written.
    """
    output_dir = check_output(output_dir, overwrite, PEFT_FILES)
    args = recorded_shape(Path(adapter_path)) if ckpt_dir is None else load_params_and_tokenizer(ckpt_dir)[0]
    config, state = load_adapter(adapter_path, args)
    kind = kind_of(config)
    check_alone(config, state, args, str(adapter_path), kind)
    options = config.adapters[kind]
    scales_up = kind == "ia3" and "FFN_DOWN" not in options.targets.split(",")  # FFN_UP at the input of down_proj
    tensors, modules, feedforward = {}, set(), set()
    parts = _vera_as_lora(config, state, args) if kind == "vera" else state
    for key, adapter in adapter_keys(config).items():
        _, layer, name = key.removesuffix(".weight").split(".", 2)
        target = TARGET_AT[name]
        at_input = scales_up and target == "FFN_UP"
        module = MODULES["FFN_DOWN" if at_input else target]
        modules.add(f"layers.{layer}.{module}")
        feedforward |= {f"layers.{layer}.{module}"} if at_input else set()
        for ours, theirs in NAMES.items():
            if (tensor := parts.get(f"{adapter}.{ours}")) is not None:
                if target in PERMUTED and ours in ALONG_OUTPUTS:
                    tensor = unpermute_rope(tensor, args.head_dim)
                if ours == "factor":
                    tensor = tensor[None] if at_input else tensor[:, None]
                tensors[f"{PREFIX}{layer}.{module}.{theirs}"] = tensor.float().contiguous()
    layers = sorted({int(module.split(".")[1]) for module in modules})
    in_all = len(layers) == args.n_layers
    if in_all or kind != "ia3":  # their names alone will do
        modules, feedforward = ({module.split(".")[-1] for module in names} for names in (modules, feedforward))
    peft_config = {  # PEFT's own defaults for the rest change nothing
        "peft_type": "IA3" if kind == "ia3" else "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "target_modules": sorted(modules),
    }
    if kind == "ia3":
        peft_config |= {"feedforward_modules": sorted(feedforward)}
    else:
        alpha = float(options.rank) if kind == "vera" else options.alpha
        peft_config |= {
            "r": options.rank,
            "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
            "use_rslora": kind == "lora" and options.rslora,
            "use_dora": kind == "dora",
            "layers_to_transform": None if in_all else layers,
        }
    with new_folder(output_dir, overwrite, PEFT_FILES) as new:
        (new / CONFIG).write_text(json.dumps(peft_config, indent=2) + "\n", encoding="utf-8")
        (new / TENSORS).write_bytes(save(tensors, metadata={"format": "pt"}))
    return output_dir


def _vera_as_lora(config: AdapterConfig, state: dict[str, Tensor], args: ModelArgs) -> dict[str, Tensor]:
    """The LoRAs, B A = (l_b * B) (l_d * A), of a VeRA adapter."""
    model, loras = bare_model(args, config), {}
    load_adapter_state_dict(model, state, "")
    for key in adapter_keys(config).values():
        vera = model.get_submodule(key)
        loras[f"{key}.lora_A"] = (vera.lambda_d * vera.matrix_a).T.detach()
        loras[f"{key}.lora_B"] = (vera.lambda_b[:, None] * vera.matrix_b).detach()
    return loras


def from_peft(input: str | Path, ckpt_dir: str | Path, output_dir: str | Path, overwrite: bool = False) -> Path:
    """Write a PEFT folder's LoRAs, DoRAs, IA3 or VeRA (as LoRAs) as an adapter of ours, for the base of `ckpt_dir`.

    Raises ValueError or OSError naming the file and the setting or tensor that has no counterpart; then nothing was
    written.
    """
    config_file, tensor_file = Path(input) / CONFIG, Path(input) / TENSORS
    output_dir = check_output(output_dir, overwrite, ADAPTER_FILES)
    args, _ = load_params_and_tokenizer(ckpt_dir)
    peft_type, settings = _read_config(config_file)
    kind = settings["method"]
    if not tensor_file.is_file():
        raise ValueError(f"{tensor_file}: no such file (pickled adapters are not read, save them as safetensors)")
    with open_safetensors(tensor_file) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if peft_type == "VERA":
        tensors = _peft_vera_as_lora(tensors, args, tensor_file)
    state, targets, layers = {}, set(), set()
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if not match or match[2] not in TARGETS:
            raise ValueError(f"{tensor_file}: tensor {name} is no LoRA, DoRA or IA3 at a linear layer of a block")
        layer, target, ours = match[1], TARGETS[match[2]], OUR_NAMES[match[3]]
        if target in PERMUTED and ours in ALONG_OUTPUTS and tensor.dim() and len(tensor) % args.head_dim == 0:
            tensor = permute_rope(tensor, args.head_dim)
        if ours == "factor":
            if tensor.dim() == 2 and len(tensor) == 1:  # of a module of feedforward_modules
                if target != "FFN_DOWN":
                    raise ValueError(f"{tensor_file}: {name} scales an input, which only down_proj's has here")
                target = "FFN_UP"
            tensor = tensor.flatten()
        key = f"layers.{layer}.{META_NAMES[target].partition('.')[0]}.adapters.{kind}_{target}.{ours}"
        if key in state:
            problem = "up_proj's outputs and down_proj's inputs are both scaled, only one can be converted"
            raise ValueError(f"{tensor_file}: layer {layer}: {problem}")
        state[key] = tensor
        targets.add(target)
        layers.add(int(layer))
    settings |= {
        f"{kind}_targets": ",".join(target for target in META_NAMES if target in targets),
        f"{kind}_layers": ",".join(f"{i}-{i + 1}" for i in layers),
    }
    try:
        config = AdapterConfig.from_dict(settings, args.n_layers)
    except ValueError as error:
        raise ValueError(f"{input}: {error}") from None
    check_alone(config, state, args, str(tensor_file), kind)
    state = {key: tensor.float() for key, tensor in state.items()}
    with new_folder(output_dir, overwrite, ADAPTER_FILES) as new:
        save_adapter(new, state, adapter_params(config, asdict(args)))
    return output_dir


def _peft_vera_as_lora(tensors: dict[str, Tensor], args: ModelArgs, file: Path) -> dict[str, Tensor]:
    """PEFT's LoRA tensors for its VeRA: of each layer (l_b * the first rows of B) (l_d * the first columns of A)."""
    a, b = tensors.pop(VERA_A, None), tensors.pop(VERA_B, None)
    widths, loras = {"FFN_DOWN": args.ffn_dim, "O": args.n_heads * args.head_dim}, {}
    for name in [name for name in tensors if name.endswith(".vera_lambda_d")]:
        stem = name.removesuffix("vera_lambda_d")
        n_in = widths.get(TARGETS.get(".".join(stem.split(".")[-3:-1])), args.dim)
        lambda_d, lambda_b = tensors.pop(name), tensors.pop(f"{stem}vera_lambda_b", None)
        given = [a, b, lambda_d, lambda_b]
        fits = all(isinstance(t, Tensor) for t in given) and [t.dim() for t in given] == [2, 2, 1, 1]
        if not (fits and a.shape[1] >= n_in and len(b) >= len(lambda_b) and len(a) == b.shape[1] == len(lambda_d)):
            raise ValueError(f"{file}: {stem}vera_lambda_d and vera_lambda_b, vera_A and vera_B do not fit each other")
        loras[f"{stem}lora_A.weight"] = lambda_d[:, None] * a[:, :n_in]
        loras[f"{stem}lora_B.weight"] = lambda_b[:, None] * b[: len(lambda_b)]
    for name in tensors:
        raise ValueError(f"{file}: tensor {name} is no part of VeRA")
    return loras


def _read_config(path: Path) -> tuple[str, dict[str, Any]]:
    """`peft_type` of an adapter_config.json, and our method, rank and alpha. ValueError for what has no counterpart."""
    config = read_json(path)
    peft_type, rank, alpha, rslora = (config.get(key) for key in ("peft_type", "r", "lora_alpha", "use_rslora"))
    if peft_type not in ("LORA", "IA3", "VERA"):
        raise ValueError(f"{path}: peft_type is {peft_type!r}, only 'LORA', 'IA3' and 'VERA' can be converted")
    if config.get("init_lora_weights") not in HARMLESS_INITS:
        raise ValueError(f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base's weights too")
    if not config.get("save_projection", True):
        raise ValueError(f"{path}: save_projection is false: the folder lacks vera_A and vera_B")
    for name, value in config.items():
        if value and name not in HARMLESS and (name, value) != ("bias", "none"):
            raise ValueError(f"{path}: {name} is {value!r}, which has no counterpart here and cannot be converted")
    if peft_type == "IA3":
        return peft_type, {"method": "ia3"}
    if peft_type == "VERA":
        return peft_type, {"method": "lora", "lora_rank": rank, "lora_alpha": rank}
    if not config.get("use_dora"):
        return peft_type, {"method": "lora", "lora_rank": rank, "lora_alpha": alpha, "lora_rslora": bool(rslora)}
    if rslora:
        raise ValueError(f"{path}: use_rslora with use_dora has no counterpart here")
    return peft_type, {"method": "dora", "dora_rank": rank, "dora_alpha": alpha}
