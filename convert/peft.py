"""LoRA, DoRA and IA3 to and from PEFT's folders, adapter_config.json and adapter_model.safetensors; VeRA to them.

Module names are those of transformers' LlamaForCausalLM and Qwen3ForCausalLM. Their rotary embedding pairs the halves
of a head and Meta's pairs neighbours, so that what runs along the outputs of Q and K has another order.

IA3 at FFN_UP is PEFT's at the input of down_proj. VeRA is written as the LoRA that it is, of the same rank: PEFT's own
cuts the matrix of every layer from one, which leaves none in the order of Q and K beside those of other layers.
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
from convert.meta_format import (
    HF,
    LAYER_NAMES,
    bare_model,
    check_output,
    new_folder,
    permute_rope,
    unpermute_rope,
)
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
# Our tensors' names -> PEFT's
NAMES = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector", "factor": "ia3_l"}
OUR_NAMES = {theirs: ours for ours, theirs in NAMES.items()}
NAME = re.compile(rf"{re.escape(PREFIX)}(0|[1-9][0-9]*)\.(\w+\.\w+)\.({'|'.join(map(re.escape, OUR_NAMES))})")
ALONG_OUTPUTS = ("lora_B", "magnitude", "factor")
# An adapter's target -> transformers' module there: Q -> self_attn.q_proj.
MODULES = {target: row[HF] for target, name in META_NAMES.items() for row in LAYER_NAMES if row[0] == name}
TARGETS = {module: target for target, module in MODULES.items()}
PERMUTED = ("Q", "K")

# Settings of PEFT's LoRA and IA3 that change nothing in what a trained adapter computes. Any other must be off.
HARMLESS = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("use_rslora", "auto_mapping", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    *("use_dora", "feedforward_modules", "init_ia3_weights"),
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
    targets = {name: target for target, name in META_NAMES.items()}
    tensors, modules, feedforward = {}, set(), set()
    parts = _vera_as_lora(config, state, args) if kind == "vera" else state
    for key, adapter in adapter_keys(config).items():
        _, layer, name = key.removesuffix(".weight").split(".", 2)
        at_input = scales_up and targets[name] == "FFN_UP"
        module = MODULES["FFN_DOWN" if at_input else targets[name]]
        modules.add(f"layers.{layer}.{module}")
        if at_input:
            feedforward.add(f"layers.{layer}.{module}")
        for ours, theirs in NAMES.items():
            if (tensor := parts.get(f"{adapter}.{ours}")) is not None:
                if targets[name] in PERMUTED and ours in ALONG_OUTPUTS:
                    tensor = unpermute_rope(tensor, args.head_dim)
                if ours == "factor":
                    tensor = tensor[None] if at_input else tensor[:, None]
                tensors[f"{PREFIX}{layer}.{module}.{theirs}"] = tensor.float().contiguous()
    layers = sorted({int(module.split(".")[1]) for module in modules})
    if len(layers) == args.n_layers or kind != "ia3":  # their names alone will do
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
            "layers_to_transform": None if len(layers) == args.n_layers else layers,
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
    """Write a PEFT folder's LoRAs, DoRAs or IA3 as an adapter of ours, for the base of `ckpt_dir`.

    Raises ValueError or OSError naming the file and the setting or tensor that has no counterpart; then nothing was
    written.
    """
    config_file, tensor_file = Path(input) / CONFIG, Path(input) / TENSORS
    output_dir = check_output(output_dir, overwrite, ADAPTER_FILES)
    args, _ = load_params_and_tokenizer(ckpt_dir)
    settings = _read_config(config_file)
    kind = settings["method"]
    if not tensor_file.is_file():
        raise ValueError(f"{tensor_file}: no such file (pickled adapters are not read, save them as safetensors)")
    state, targets, layers = {}, set(), set()
    with open_safetensors(tensor_file) as file:
        for name in file.keys():
            match = NAME.fullmatch(name)
            if not match or match[2] not in TARGETS:
                raise ValueError(f"{tensor_file}: tensor {name} is no LoRA, DoRA or IA3 at a linear layer of a block")
            layer, target, ours, tensor = match[1], TARGETS[match[2]], OUR_NAMES[match[3]], file.get_tensor(name)
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


def _read_config(path: Path) -> dict[str, Any]:
    """Method, rank and alpha of an adapter_config.json. ValueError for what is not LoRA, DoRA or IA3."""
    config = read_json(path)
    if config.get("peft_type") not in ("LORA", "IA3"):
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}, only 'LORA' and 'IA3' can be converted")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias is {config['bias']!r}, only 'none' can be converted")
    if config.get("init_lora_weights") not in HARMLESS_INITS:
        raise ValueError(f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base's weights too")
    for name, value in config.items():
        if value and name not in HARMLESS | {"bias", "init_lora_weights"}:
            raise ValueError(f"{path}: {name} is {value!r}, which has no counterpart here and cannot be converted")
    if config["peft_type"] == "IA3":
        return {"method": "ia3"}
    numbers = {"rank": config.get("r"), "alpha": config.get("lora_alpha")}
    if not config.get("use_dora"):
        return {"method": "lora", "lora_rslora": config.get("use_rslora", False)} | {
            f"lora_{name}": value for name, value in numbers.items()
        }
    if config.get("use_rslora"):
        raise ValueError(f"{path}: use_rslora with use_dora has no counterpart here")
    return {"method": "dora"} | {f"dora_{name}": value for name, value in numbers.items()}
