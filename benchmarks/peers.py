"""What a user would install instead: transformers' LLaMA with PEFT's LoRA, on the same weights."""

import tempfile
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from convert.hf import GLOBAL_KEYS, LAYER_KEYS, unpermute_rope
from convert.meta_format import source_names
from convert.peft import to_peft
from llama.args import ModelArgs
from llama.checkpoint import load_params_and_tokenizer, open_shard, shard_files

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]  # as Q, K, V, O, FFN_DOWN
PERMUTED = ("wq.weight", "wk.weight")  # their rows stand in another order


def version_of(package: str) -> str:
    """ValueError where the package is not installed."""
    try:
        return import_module(package).__version__
    except ImportError:
        raise ValueError(f"{package} is not installed (pip install -r requirements-dev.txt)") from None


def transformers_on(args: ModelArgs, base: Mapping[str, Tensor]) -> nn.Module:
    """A whole base in Meta's names as transformers' `LlamaForCausalLM`, which shares its tensors, on their device; wq
    and wk alone are copies (`copied_bytes`). ValueError without transformers."""
    version_of("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        intermediate_size=args.ffn_dim,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        rope_parameters=_rope(args),
        max_position_embeddings=16 * args.rope_original_max_seq_len,  # as LLaMA-3.1's: more than the original
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    names = source_names(args.n_layers, GLOBAL_KEYS, LAYER_KEYS, "model.layers.")
    state = {
        name: unpermute_rope(base[key], args.head_dim) if key.endswith(PERMUTED) else base[key]
        for key, name in names.items()
    }
    model.load_state_dict(state, assign=True)
    angles = type(model.model.rotary_emb)(config)  # no weights, so not in the state
    model.model.rotary_emb = angles.to(base["output.weight"].device)
    return model


def copied_bytes(base: Mapping[str, Tensor]) -> int:
    """What `transformers_on` takes beside the base."""
    return sum(tensor.nbytes for key, tensor in base.items() if key.endswith(PERMUTED))


def lora_on(model: nn.Module, rank: int = 16, recompute: bool = False) -> nn.Module:
    """A model of transformers with PEFT's LoRA of this rank beside the published targets, ready to train; adapters in
    float32. recompute: the backward pass works out every block again. ValueError without peft."""
    version_of("peft")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, lora_dropout=0.0, bias="none")
    model = get_peft_model(model, config)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def transformers_model(ckpt_dir: str | Path, dtype: torch.dtype) -> nn.Module:
    """The base of a checkpoint of one shard as transformers' model. ValueError without transformers."""
    args, _ = load_params_and_tokenizer(ckpt_dir)
    shards = [open_shard(file) for file in shard_files(Path(ckpt_dir))]
    if len(shards) != 1:
        raise ValueError(f"{ckpt_dir}: {len(shards)} shards; python -m convert reshard makes one of them")
    return transformers_on(args, {key: tensor.to(dtype) for key, tensor in shards[0].items()})


def peft_lora(
    ckpt_dir: str | Path, dtype: torch.dtype, rank: int = 16, adapter_path: str | Path | None = None
) -> nn.Module:
    """The same with a LoRA (`lora_on`).

    adapter_path: a trained adapter of ours in its place, which must be plain LoRA.
    """
    version_of("peft")
    from peft import PeftModel

    if adapter_path is None:
        return lora_on(transformers_model(ckpt_dir, dtype), rank)
    with tempfile.TemporaryDirectory() as folder:
        converted = to_peft(adapter_path, Path(folder, "peft"), ckpt_dir=ckpt_dir)
        return PeftModel.from_pretrained(transformers_model(ckpt_dir, dtype), converted)


def _rope(args: ModelArgs) -> dict[str, object]:
    if not args.use_scaled_rope:
        return {"rope_type": "default", "rope_theta": args.rope_theta}
    return {
        "rope_type": "llama3",
        "rope_theta": args.rope_theta,
        "factor": args.rope_scaling_factor,
        "low_freq_factor": args.rope_low_freq_factor,
        "high_freq_factor": args.rope_high_freq_factor,
        "original_max_position_embeddings": args.rope_original_max_seq_len,
    }
