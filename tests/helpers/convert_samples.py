"""Tiny source models for the tests of convert/ and demo/: Hugging Face folders and GGUF files with random weights."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import quantize
from transformers import LlamaConfig, LlamaForCausalLM

from llama.tokenizer import special_tokens

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
# GPT-2 spells the bytes that have no printable character as U+0100, U+0101, ... in byte order.
SPELLING = {b: chr(b) for b in PRINTABLE} | {b: chr(0x100 + i) for i, b in enumerate(OTHERS)}

MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n")]
SMOL_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
SMOL_LACKS = (0xC0, 0xF5, 0xFF)


def llama3_vocabulary() -> tuple[list[str], list[int]]:
    """Tokens in id order and which are special: 256 bytes, 4 merges, Meta's 256 special tokens."""
    tokens = [SPELLING[b] for b in PRINTABLE + OTHERS] + ["".join(m) for m in MERGES]
    return tokens + special_tokens(), list(range(len(tokens), len(tokens) + 256))


def smol_vocabulary() -> tuple[list[str], list[int]]:
    """Special tokens first, then the bytes but for a few, then 4 merges: SmolLM2's order."""
    tokens = [SPELLING[b] for b in PRINTABLE + OTHERS if b not in SMOL_LACKS] + ["".join(m) for m in MERGES]
    return SMOL_SPECIAL + tokens, list(range(len(SMOL_SPECIAL)))


def write_tokenizer_json(folder: Path, tokens: list[str], special: list[int]) -> None:
    added = [{"id": i, "content": tokens[i], "special": True} for i in special]
    # LLaMA-3 keeps its special tokens out of the model's vocabulary, SmolLM2 has them in both places.
    vocab = {token: i for i, token in enumerate(tokens) if i not in special or special[0] == 0}
    model = {"type": "BPE", "vocab": vocab, "merges": [list(m) for m in MERGES]}
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": added, "model": model}), encoding="utf-8")


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough that a wrong row order shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.2 * noise)


def write_hf(folder: Path, style: str, max_shard_size: str = "1GB") -> LlamaForCausalLM:
    """A folder as Hugging Face has it, `style` llama3 (scaled rope, untied) or smol (tied); returns its model."""
    tokens, special = llama3_vocabulary() if style == "llama3" else smol_vocabulary()
    sizes = {
        "vocab_size": len(tokens),
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
    }
    if style == "llama3":
        scaling = {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
        config = LlamaConfig(
            **sizes,
            intermediate_size=160,
            rope_parameters={"rope_theta": 5000.0, **scaling},
            max_position_embeddings=256,
            tie_word_embeddings=False,
        )
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        config = LlamaConfig(**sizes, intermediate_size=128, rope_parameters=rope, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).eval()
    randomise(model)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer_json(folder, tokens, special)
    return model


def gguf_tensors(
    dim: int = 64, layers: int = 2, kv_dim: int = 32, ffn: int = 96, rows: int = 0
) -> dict[str, np.ndarray]:
    """Random float32 tensors of a tied model, by GGUF's names; `rows` 0: as many as the smol vocabulary has."""
    random = np.random.default_rng(0)
    rows = rows or len(smol_vocabulary()[0])
    shapes = {"token_embd.weight": (rows, dim), "output_norm.weight": (dim,)}
    for i in range(layers):
        shapes |= {
            f"blk.{i}.attn_norm.weight": (dim,),
            f"blk.{i}.ffn_norm.weight": (dim,),
            f"blk.{i}.attn_q.weight": (dim, dim),
            f"blk.{i}.attn_k.weight": (kv_dim, dim),
            f"blk.{i}.attn_v.weight": (kv_dim, dim),
            f"blk.{i}.attn_output.weight": (dim, dim),
            f"blk.{i}.ffn_gate.weight": (ffn, dim),
            f"blk.{i}.ffn_up.weight": (ffn, dim),
            f"blk.{i}.ffn_down.weight": (dim, ffn),
        }
    return {name: random.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    quantised: dict[str, gguf.GGMLQuantizationType] | None = None,
    architecture: str = "llama",
    vocabulary: tuple[list[str], list[int]] | None = None,
    theta: float = 10000.0,
    heads: int = 4,
    ffn: int = 96,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    **metadata: int | str,
) -> None:
    """A llama GGUF (2 key/value heads) with these tensors; `metadata` adds uint32 or string keys."""
    tokens, special = vocabulary or smol_vocabulary()
    writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
    writer.add_block_count(sum(name.endswith("attn_norm.weight") for name in tensors))
    writer.add_embedding_length(tensors["token_embd.weight"].shape[1])
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(tokens))]
    )
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        add(key.replace("__", "."), value)
    for name, tensor in tensors.items():
        kind = (quantised or {}).get(name)
        writer.add_tensor(name, tensor if kind is None else quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
