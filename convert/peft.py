"""Plain LoRA to and from PEFT's folders: adapter_config.json and adapter_model.safetensors.

Module names are those of transformers' LlamaForCausalLM. Its rotary embedding pairs the halves of a head and Meta's
pairs neighbours, so that B of Q and K has its rows in another order.
"""

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from convert import hf, layout, plain_lora
from llama.args import ModelArgs
from llama.checkpoint import read_base
from llama.distributed import init_distributed
from llama.model import Transformer
from moa.adapter_file import PARAMS, adapter_params, save_adapter
from moa.config import AdapterConfig
from moa.files import read_json
from moa.state import adapter_state_dict, load_adapter_state_dict

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
FILES, OUR_FILES = (CONFIG, TENSORS, "README.md"), ("adapter.pth", PARAMS)
NAME = re.compile(r"base_model\.model\.model\.layers\.(0|[1-9][0-9]*)\.(\w+\.\w+)\.lora_([AB])\.weight")
# Meta's linear layer within a block -> transformers' module there: attention.wq -> self_attn.q_proj.
MODULES = {
    key.removesuffix(".weight"): module.removesuffix(".weight")
    for key, module in hf.BLOCK.items()
    if not key.endswith("norm.weight")
}
LINEARS = {module: linear for linear, module in MODULES.items()}
PERMUTED = ("attention.wq", "attention.wk")

# RunConfig of PEFT's LoRA that change nothing in what a trained adapter computes. Any other must be off.
HARMLESS = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("peft_type", "task_type", "base_model_name_or_path", "revision", "inference_mode", "peft_version"),
    *("auto_mapping", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
}
# Some ways to initialise (PiSSA, OLoRA, ...) take something out of the base's weights as well; these do not.
INITIALISED = (True, False, None, "gaussian", "orthogonal")


def to_peft(
    adapter_path: str | Path,
    output: str | Path,
    base_model: str | None = None,
    ckpt_dir: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a PEFT folder of an adapter of plain LoRAs; tensors are float32.

    base_model: name or path of the Hugging Face model that PEFT is to put it on. ckpt_dir: the base, needed for its
    shape where the adapter's settings do not tell it (the authors' do not). Raises ValueError or OSError naming the
    file and what is wrong or cannot be expressed; then nothing was written.
    """
    output = layout.check_output(output, overwrite, FILES)
    args = recorded_shape(Path(adapter_path)) if ckpt_dir is None else read_base(ckpt_dir)[0]
    model = plain_lora.load(adapter_path, args)
    tensors, modules, layers = {}, set(), set()
    for key, lora in plain_lora.loras(model):
        _, number, linear = key.removesuffix(".weight").split(".", 2)
        b = hf.split_halves(lora.B, args.head_dim) if linear in PERMUTED else lora.B
        for name, tensor in (("A", lora.A), ("B", b)):
            tensors[f"base_model.model.model.layers.{number}.{MODULES[linear]}.lora_{name}.weight"] = tensor.detach()
        modules.add(MODULES[linear].partition(".")[2])
        layers.add(int(number))
    knobs = model.config.adapters["lora"]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": knobs.rank,
        "lora_alpha": int(knobs.alpha) if knobs.alpha == int(knobs.alpha) else knobs.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(modules),
        "layers_to_transform": None if len(layers) == args.n_layers else sorted(layers),
    }
    with layout.new_folder(output, overwrite, FILES) as new:
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (new / TENSORS).write_bytes(_safetensors(tensors, output / TENSORS))
    return output


def from_peft(input: str | Path, ckpt_dir: str | Path, output: str | Path, overwrite: bool = False) -> Path:
    """Write a PEFT folder's LoRAs as an adapter of ours, for the base of `ckpt_dir`.

    Raises ValueError or OSError naming the file and the setting or tensor that has no counterpart; then nothing was
    written.
    """
    config_file, tensor_file = Path(input) / CONFIG, Path(input) / TENSORS
    output = layout.check_output(output, overwrite, OUR_FILES)
    args, _ = read_base(ckpt_dir)
    settings = _read_settings(config_file)
    if not tensor_file.is_file():
        raise ValueError(f"{tensor_file}: no such file (pickled adapters are not read, save them as safetensors)")
    state, sites, layers = {}, set(), set()
    with hf.open_safetensors(tensor_file) as opened:
        for name in opened.keys():
            match = NAME.fullmatch(name)
            if not match or match[2] not in LINEARS:
                raise ValueError(f"{tensor_file}: tensor {name} is no LoRA at a linear layer of a LLaMA block")
            part, _, linear = LINEARS[match[2]].partition(".")
            site = plain_lora.TARGETS[linear]
            state[f"layers.{match[1]}.{part}.adapters.lora_{site}.{match[3]}"] = opened.get_tensor(name)
            sites.add(site)
            layers.add(int(match[1]))
    settings |= {"lora_targets": ",".join(sorted(sites)), "lora_layers": ",".join(f"{i}-{i + 1}" for i in layers)}
    try:
        config = AdapterConfig.from_dict(settings, args.n_layers)
    except ValueError as error:
        raise ValueError(f"{input}: {error}") from None
    init_distributed(torch.device("cpu"))
    model = Transformer(args, config).requires_grad_(False)
    load_adapter_state_dict(model, state, str(tensor_file))
    for key, lora in plain_lora.loras(model):
        if key.endswith(("wq.weight", "wk.weight")):
            lora.B.copy_(hf.interleave(lora.B, args.head_dim))
    with layout.new_folder(output, overwrite, OUR_FILES) as new:
        save_adapter(new, adapter_state_dict(model), adapter_params(config, asdict(args)))
    return output


def recorded_shape(adapter_path: Path) -> ModelArgs:
    """The shape of the base that an adapter of ours was trained on."""
    path = adapter_path / PARAMS if adapter_path.is_dir() else adapter_path.with_name(PARAMS)
    base = read_json(path).get("base")
    if base is None:
        raise ValueError(f"{path}: does not tell the shape of the adapter's base; give the base as --ckpt_dir")
    try:
        args = ModelArgs(**base)
        if args.vocab_size == -1:
            raise ValueError("vocab_size is open")
        return args
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: base is no model's shape ({error})") from None


def _read_settings(path: Path) -> dict[str, Any]:
    """Method, rank and alpha of an adapter_config.json. ValueError for what is not plain LoRA."""
    config = read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}, only 'LORA' can be converted")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias is {config['bias']!r}, only 'none' can be converted")
    if config.get("init_lora_weights") not in INITIALISED:
        raise ValueError(f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base's weights too")
    for key, value in config.items():
        if value and key not in HARMLESS | {"bias", "init_lora_weights"}:
            raise ValueError(f"{path}: {key} is {value!r}, which is more than plain LoRA and cannot be converted")
    return {"method": "lora", "lora_rank": config.get("r"), "lora_alpha": config.get("lora_alpha")}


def _safetensors(tensors: dict[str, torch.Tensor], path: Path) -> bytes:
    """The content of a safetensors file."""
    try:
        from safetensors.torch import save
    except ImportError:
        raise ValueError(f"{path}: to write it, the package safetensors is needed (pip install safetensors)") from None
    return save(tensors, metadata={"format": "pt"})
