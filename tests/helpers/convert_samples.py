"""Tiny source models for the tests of convert/ and demo/ (Hugging Face folders and GGUF files with random weights), and
what those tests do with shards and with the command line."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from gguf.quants import quantize
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from convert.__main__ import main
from convert.meta_format import Written
from convert.vocabulary import QWEN2_SPLIT
from llama import Llama
from llama.tokenizer import LLAMA3_SPLIT, special_tokens

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
OTHERS = [b for b in range(256) if b not in PRINTABLE]
# GPT-2 spells the bytes that have no printable character as U+0100, U+0101, ... in byte order.
SPELLING = {b: chr(b) for b in PRINTABLE} | {b: chr(0x100 + i) for i, b in enumerate(OTHERS)}

TEXTS = ("in the thin hat", "the\n\n  tin's 12345!", "na\u00efve \u20ac \U0001f600 hein\t")
MERGES = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("1", "2")]
HF_TO_GGUF = {
    **{"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm", "model.layers": "blk"},
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
    **{"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def by_regex(pattern: str) -> list[dict[str, Any]]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [split, BYTE_LEVEL | {"use_regex": False}]


@dataclass(frozen=True)
class Style:
    """A family of tokenizers: special tokens, before or behind the bytes and merges, and rules. end: the token that
    config.json declares, by its place among the special ones. pre: GGUF's name of the splitting rule."""

    special: list[str]
    end: int
    pre: str
    split: list[dict[str, Any]]
    special_first: bool = False
    lacks: tuple[int, ...] = ()  # bytes without a token
    normalizer: str | None = None
    ignore_merges: bool = False

    def vocabulary(self) -> tuple[list[str], list[int]]:
        """Tokens in id order, and the ids of the special ones."""
        tokens = [SPELLING[b] for b in PRINTABLE + OTHERS if b not in self.lacks] + ["".join(m) for m in MERGES]
        if self.special_first:
            return self.special + tokens, list(range(len(self.special)))
        return tokens + self.special, list(range(len(tokens), len(tokens) + len(self.special)))


DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", *special_tokens()[4:]]
SMOL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>"]
STYLES = {
    "llama3": Style(special_tokens(), 1, "llama-bpe", by_regex(LLAMA3_SPLIT), ignore_merges=True),
    "deepseek": Style(DEEPSEEK, 1, "llama-bpe", by_regex(LLAMA3_SPLIT), ignore_merges=True),
    "smol": Style(
        *(SMOL, 2, "smollm", [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL | {"use_regex": True}]),
        **{"special_first": True, "lacks": (0xC0, 0xF5, 0xFF)},
    ),
    "qwen": Style(SMOL[:3], 2, "qwen2", by_regex(QWEN2_SPLIT), normalizer="NFC"),
}


def write_tokenizer_json(folder: Path, style: Style) -> None:
    tokens, special = style.vocabulary()
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    # LLaMA-3 keeps its special tokens out of the model's vocabulary, SmolLM2 has them in both places.
    vocab = {token: i for i, token in enumerate(tokens) if i not in special or style.special_first}
    merges = [list(merge) for merge in MERGES]
    content = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in special],
        "normalizer": style.normalizer and {"type": style.normalizer},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": style.split},
        "decoder": BYTE_LEVEL | {"use_regex": True},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": style.ignore_merges},
    }
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights large enough that a wrong row order shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.2 * noise)


def write_hf(
    folder: Path,
    style: str,
    max_shard_size: str = "1GB",
    dtype: torch.dtype = torch.float32,
    qwen3: bool = False,
    **config: Any,
) -> LlamaForCausalLM | Qwen3ForCausalLM:
    """A folder as Hugging Face has it, with a style's tokenizer; returns its model. That of llama3 has a scaled rotary
    embedding and is untied, the others are neither."""
    tokens, special = STYLES[style].vocabulary()
    sizes = {"vocab_size": len(tokens), "eos_token_id": special[STYLES[style].end], "rms_norm_eps": 1e-5}
    sizes |= {"hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 256}
    sizes |= {"num_attention_heads": 6, "num_key_value_heads": 2}
    if style == "llama3":
        rope = {"rope_type": "llama3", "rope_theta": 5000.0, "original_max_position_embeddings": 64}
        rope |= {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        sizes |= {"intermediate_size": 160, "rope_parameters": rope, "tie_word_embeddings": False}
    else:
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        sizes |= {"intermediate_size": 128, "rope_parameters": rope, "tie_word_embeddings": True}
    config_type, model_type = (Qwen3Config, Qwen3ForCausalLM) if qwen3 else (LlamaConfig, LlamaForCausalLM)
    model = model_type(config_type(**sizes | config)).eval()
    randomise(model)
    model.tie_weights()
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    write_tokenizer_json(folder, STYLES[style])
    return model


def as_gguf(model: LlamaForCausalLM | Qwen3ForCausalLM) -> dict[str, np.ndarray]:
    """The weights of a model by GGUF's names, those of a LLaMA permuted as llama.cpp's converter does."""
    tensors, half = {}, model.config.head_dim // 2
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")) and model.config.model_type == "llama":
            weight = weight.view(-1, 2, half, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        for theirs, gguf_name in HF_TO_GGUF.items():
            name = name.replace(theirs, gguf_name)
        tensors[name] = weight.float().numpy()
    return tensors


def gguf_tensors(
    dim: int = 64, layers: int = 2, kv_dim: int = 32, ffn: int = 96, rows: int = 0
) -> dict[str, np.ndarray]:
    """Random float32 tensors of a tied model, by GGUF's names; `rows` 0: as many as the smol vocabulary has."""
    random = np.random.default_rng(0)
    rows = rows or len(STYLES["smol"].vocabulary()[0])
    shapes = {"token_embd.weight": (rows, dim), "output_norm.weight": (dim,)}
    for i in range(layers):
        block = {"attn_norm": (dim,), "ffn_norm": (dim,), "attn_q": (dim, dim), "attn_output": (dim, dim)}
        block |= {"attn_k": (kv_dim, dim), "attn_v": (kv_dim, dim)}
        block |= {"ffn_gate": (ffn, dim), "ffn_up": (ffn, dim), "ffn_down": (dim, ffn)}
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
    return {name: random.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    quantised: dict[str, gguf.GGMLQuantizationType] | None = None,
    architecture: str = "llama",
    style: str = "smol",
    theta: float = 10000.0,
    heads: int = 6,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    metadata: dict[str, int | float | str] | None = None,
    add_tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
) -> None:
    """A GGUF (2 key/value heads) with these tensors; `metadata` adds keys. add_tokenizer: another than a style's."""
    writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
    writer.add_block_count(sum(name.endswith("attn_norm.weight") for name in tensors))
    writer.add_embedding_length(tensors["token_embd.weight"].shape[1])
    writer.add_feed_forward_length(len(tensors["blk.0.ffn_up.weight"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(theta)
    if add_tokenizer is None:
        add_style(writer, STYLES[style])
    else:
        add_tokenizer(writer)
    for key, value in (metadata or {}).items():
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    for name, tensor in tensors.items():
        kind = (quantised or {}).get(name)
        writer.add_tensor(name, tensor if kind is None else quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_style(writer: gguf.GGUFWriter, style: Style) -> None:
    tokens, special = style.vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(style.pre)
    writer.add_eos_token_id(special[style.end])
    writer.add_token_list(tokens)
    kinds = (gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(tokens)))
    writer.add_token_types(list(kinds))
    writer.add_token_merges([" ".join(merge) for merge in MERGES])


def close(actual: Tensor, expected: Tensor, other: Tensor, least: float = 0.1) -> None:
    """Equal to float32's rounding, which is no accident: `other`, without the adapter, is far away."""
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4)
    assert (expected - other).abs().max() > least


@torch.no_grad()
def same_logits(result: Written, reference: Any) -> None:
    """The same logits from the converted checkpoint, at more positions than scaled rotary embeddings are made for."""
    tokens = torch.randint(result.args.vocab_size, (2, 90), generator=torch.Generator().manual_seed(1))
    ours = Llama.build(result.folder, device="cpu").model(tokens)
    torch.testing.assert_close(ours, reference(tokens).logits, atol=1e-4, rtol=1e-4)


def same_ids(result: Written, tokenizer_json: Path) -> None:
    """The same ids for a text as by the source's own tokenizer."""
    theirs = tokenizers.Tokenizer.from_file(str(tokenizer_json))
    ours = Llama.build(result.folder, device="cpu").tokenizer
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == text


def load_shards(folder: Path) -> list[dict[str, Tensor]]:
    """The tensors of every shard of a checkpoint in Meta's layout."""
    return [torch.load(file, weights_only=True) for file in sorted(folder.glob("consolidated.*.pth"))]


def edit_shard(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Write a shard again with what `change` makes of its tensors."""
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, file)


def flip_bit(file: Path, key: str) -> None:
    """One bit of a tensor's numbers, where they lie in the shard."""
    content = bytearray(file.read_bytes())
    content[content.index(torch.load(file, weights_only=True)[key].numpy().tobytes()) + 4 * 7 + 1] ^= 16
    file.write_bytes(content)


def refused_by_command(words: list[str], capsys: pytest.CaptureFixture[str], *messages: str, status: int = 1) -> None:
    """Check that `python -m convert` ends with this exit status and one error that holds the messages."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    error = capsys.readouterr().err
    assert caught.value.code == status and error.startswith("error: "), error
    assert all(message in error for message in messages), error
