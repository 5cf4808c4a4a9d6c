"""What a user would install instead: transformers' LLaMA with PEFT's LoRA, on the same weights."""

import tempfile
from pathlib import Path

import torch
from torch import nn

from convert.hf import BLOCK, WHOLE, split_halves
from convert.peft import to_peft
from llama.args import ModelArgs
from llama.checkpoint import open_shard, read_base, shard_files

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]  # as Q, K, V, O, FFN_DOWN


def transformers_model(ckpt_dir: str | Path, dtype: torch.dtype) -> nn.Module:
    """The base of a checkpoint of one shard as transformers' `LlamaForCausalLM`. ValueError without transformers."""
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise ValueError("transformers is not installed (pip install -r requirements-dev.txt)") from None
    args, _ = read_base(ckpt_dir)
    shards = [open_shard(file) for file in shard_files(Path(ckpt_dir))]
    if len(shards) != 1:
        raise ValueError(f"{ckpt_dir}: {len(shards)} shards; python -m convert reshard makes one of them")
    config = LlamaConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        intermediate_size=args.ffn_dim,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        rope_parameters=_rope(args),
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {WHOLE[key]: _weight(key, tensor, args).to(dtype) for key, tensor in shards[0].items() if key in WHOLE}
    for layer in range(args.n_layers):
        for key, name in BLOCK.items():
            weight = _weight(key, shards[0][f"layers.{layer}.{key}"], args)
            state[f"model.layers.{layer}.{name}"] = weight.to(dtype)
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its angles, which are no weights
    return model


def peft_lora(
    ckpt_dir: str | Path, dtype: torch.dtype, rank: int = 16, adapter_path: str | Path | None = None
) -> nn.Module:
    """The same with a LoRA of this rank beside the published targets, ready to train; adapters in float32.

    adapter_path: a trained adapter of ours in its place, which must be plain LoRA.
    """
    try:
        from peft import LoraConfig, PeftModel, get_peft_model
    except ImportError:
        raise ValueError("peft is not installed (pip install -r requirements-dev.txt)") from None
    if adapter_path is not None:
        with tempfile.TemporaryDirectory() as folder:
            converted = to_peft(adapter_path, Path(folder, "peft"), ckpt_dir=ckpt_dir)
            return PeftModel.from_pretrained(transformers_model(ckpt_dir, dtype), converted)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, lora_dropout=0.0, bias="none")
    return get_peft_model(transformers_model(ckpt_dir, dtype), config)


def _weight(key: str, tensor: torch.Tensor, args: ModelArgs) -> torch.Tensor:
    return split_halves(tensor, args.head_dim) if key.endswith(("wq.weight", "wk.weight")) else tensor


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
