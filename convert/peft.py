"""Plain LoRA to and from PEFT's folders: adapter_config.json and adapter_model.safetensors.

Module names are those of transformers' LlamaForCausalLM. Its rotary embedding pairs the halves of a head and Meta's
pairs neighbours, so that B of Q and K has its rows in another order.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save

from convert.adapters import ADAPTER_FILES, check_plain_lora, load_plain_lora, recorded_shape
from convert.hf import open_safetensors
from convert.meta_format import HF, LAYER_NAMES, check_output, new_folder, permute_rope, unpermute_rope
from llama.checkpoint import load_params_and_tokenizer
from moa.adapter_file import adapter_params, save_adapter
from moa.config import AdapterConfig
from moa.files import read_json
from moa.methods import META_NAMES

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PEFT_FILES = (CONFIG, TENSORS, "README.md")
PREFIX = "base_model.model.model.layers."
NAME = re.compile(re.escape(PREFIX) + r"(0|[1-9][0-9]*)\.(\w+\.\w+)\.lora_([AB])\.weight")
# LoRA's target -> transformers' module there: Q -> self_attn.q_proj.
MODULES = {target: row[HF] for target, name in META_NAMES.items() for row in LAYER_NAMES if row[0] == name}
TARGETS = {module: target for target, module in MODULES.items()}
PERMUTED = ("Q", "K")

# Settings of PEFT's LoRA that change nothing in what a trained adapter computes. Any other must be off.
HARMLESS = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("use_rslora", "auto_mapping", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
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
    """Write a PEFT folder of an adapter of plain LoRAs; tensors are float32.

    base_model: name or path of the Hugging Face model that PEFT is to put it on. ckpt_dir: the base, needed for its
    shape where the adapter's settings do not tell it (the authors' do not). Raises ValueError or OSError naming the
    file and what is wrong or cannot be expressed; then nothing was written.
    """
    output_dir = check_output(output_dir, overwrite, PEFT_FILES)
    args = recorded_shape(Path(adapter_path)) if ckpt_dir is None else load_params_and_tokenizer(ckpt_dir)[0]
    config, updates = load_plain_lora(adapter_path, args)
    targets = {name: target for target, name in META_NAMES.items()}
    tensors, modules, layers = {}, set(), set()
    for key, update in updates.items():
        _, layer, name = key.removesuffix(".weight").split(".", 2)
        module, b = MODULES[targets[name]], update.lora_B
        if targets[name] in PERMUTED:
            b = unpermute_rope(b, args.head_dim)
        tensors[f"{PREFIX}{layer}.{module}.lora_A.weight"] = update.lora_A.contiguous()
        tensors[f"{PREFIX}{layer}.{module}.lora_B.weight"] = b.contiguous()
        modules.add(module.partition(".")[2])
        layers.add(int(layer))
    lora = config.adapters["lora"]
    peft_config = {  # PEFT's own defaults for the rest are plain LoRA
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,
        "use_rslora": lora.rslora,
        "target_modules": sorted(modules),
        "layers_to_transform": None if len(layers) == args.n_layers else sorted(layers),
    }
    with new_folder(output_dir, overwrite, PEFT_FILES) as new:
        (new / CONFIG).write_text(json.dumps(peft_config, indent=2) + "\n", encoding="utf-8")
        (new / TENSORS).write_bytes(save(tensors, metadata={"format": "pt"}))
    return output_dir


def from_peft(input: str | Path, ckpt_dir: str | Path, output_dir: str | Path, overwrite: bool = False) -> Path:
    """Write a PEFT folder's LoRAs as an adapter of ours, for the base of `ckpt_dir`.

    Raises ValueError or OSError naming the file and the setting or tensor that has no counterpart; then nothing was
    written.
    """
    config_file, tensor_file = Path(input) / CONFIG, Path(input) / TENSORS
    output_dir = check_output(output_dir, overwrite, ADAPTER_FILES)
    args, _ = load_params_and_tokenizer(ckpt_dir)
    settings = _read_config(config_file)
    if not tensor_file.is_file():
        raise ValueError(f"{tensor_file}: no such file (pickled adapters are not read, save them as safetensors)")
    state, targets, layers = {}, set(), set()
    with open_safetensors(tensor_file) as file:
        for name in file.keys():
            match = NAME.fullmatch(name)
            if not match or match[2] not in TARGETS:
                raise ValueError(f"{tensor_file}: tensor {name} is no LoRA at a linear layer of a LLaMA block")
            layer, target, tensor = match[1], TARGETS[match[2]], file.get_tensor(name)
            if target in PERMUTED and match[3] == "B" and tensor.dim() == 2 and len(tensor) % args.head_dim == 0:
                tensor = permute_rope(tensor, args.head_dim)
            part = META_NAMES[target].partition(".")[0]
            state[f"layers.{layer}.{part}.adapters.lora_{target}.lora_{match[3]}"] = tensor
            targets.add(target)
            layers.add(int(layer))
    settings |= {
        "lora_targets": ",".join(target for target in META_NAMES if target in targets),
        "lora_layers": ",".join(f"{i}-{i + 1}" for i in layers),
    }
    try:
        config = AdapterConfig.from_dict(settings, args.n_layers)
    except ValueError as error:
        raise ValueError(f"{input}: {error}") from None
    check_plain_lora(config, state, args, str(tensor_file))
    state = {key: tensor.float() for key, tensor in state.items()}
    with new_folder(output_dir, overwrite, ADAPTER_FILES) as new:
        save_adapter(new, state, adapter_params(config, asdict(args)))
    return output_dir


def _read_config(path: Path) -> dict[str, Any]:
    """Method, rank and alpha of an adapter_config.json. ValueError for what is not plain LoRA."""
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}, only 'LORA' can be converted")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias is {config['bias']!r}, only 'none' can be converted")
    if config.get("init_lora_weights") not in HARMLESS_INITS:
        raise ValueError(f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base's weights too")
    for name, value in config.items():
        if value and name not in HARMLESS | {"bias", "init_lora_weights"}:
            raise ValueError(f"{path}: {name} is {value!r}, which is more than plain LoRA and cannot be converted")
    rslora = config.get("use_rslora", False)
    return {
        "method": "lora",
        "lora_rank": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "lora_rslora": rslora,
    }
