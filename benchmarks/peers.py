"""What a user would install instead: transformers' LLaMA with PEFT's LoRA, on the same weights, rows and prompts."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.common import CPU
from convert.hf import GLOBAL_KEYS, LAYER_KEYS, unpermute_rope
from convert.meta_format import source_names
from convert.peft import to_peft
from llama.args import ModelArgs
from llama.checkpoint import load_params_and_tokenizer, open_shard, shard_files
from llama.data import IGNORE_INDEX, Example

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]  # as Q, K, V, O, FFN_DOWN
PERMUTED = ("wq.weight", "wk.weight")  # their rows stand in another order


def require_package(name: str) -> None:
    """Raise ValueError where the package is not installed."""
    try:
        import_module(name)
    except ImportError:
        raise ValueError(f"{name} is not installed (pip install -r requirements-dev.txt)") from None


def transformers_on(args: ModelArgs, base: Mapping[str, Tensor]) -> nn.Module:
    """Build transformers' `LlamaForCausalLM` on a base in Meta's names, whose tensors it shares; wq and wk are copies.

    ValueError without transformers.
    """
    require_package("transformers")
    from transformers import LlamaConfig, LlamaForCausalLM

    rope: dict[str, object] = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.use_scaled_rope:
        rope |= {"rope_type": "llama3", "factor": args.rope_scaling_factor}
        rope |= {"low_freq_factor": args.rope_low_freq_factor, "high_freq_factor": args.rope_high_freq_factor}
        rope |= {"original_max_position_embeddings": args.rope_original_max_seq_len}
    config = LlamaConfig(
        hidden_size=args.dim,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        intermediate_size=args.ffn_dim,
        vocab_size=args.vocab_size,
        rms_norm_eps=args.norm_eps,
        rope_parameters=rope,
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
    """Return what `transformers_on` takes beside the base."""
    return sum(tensor.nbytes for key, tensor in base.items() if key.endswith(PERMUTED))


def lora_on(model: nn.Module, rank: int = 16, checkpointing: bool = False) -> nn.Module:
    """Put PEFT's LoRA of this rank at the published targets of a model of transformers; adapters are float32.

    checkpointing: the backward pass recomputes every block. ValueError without peft.
    """
    require_package("peft")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, lora_dropout=0.0, bias="none")
    model = get_peft_model(model, config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def transformers_model(ckpt_dir: str | Path, bf16: bool) -> nn.Module:
    """Load the base of a checkpoint of one shard as transformers' model. ValueError without transformers."""
    args, _ = load_params_and_tokenizer(ckpt_dir)
    shards = [open_shard(file) for file in shard_files(Path(ckpt_dir))]
    if len(shards) != 1:
        raise ValueError(f"{ckpt_dir}: {len(shards)} shards; python -m convert reshard makes one of them")
    dtype = torch.bfloat16 if bf16 else torch.float32
    return transformers_on(args, {key: tensor.to(dtype) for key, tensor in shards[0].items()})


def peft_lora(ckpt_dir: str | Path, bf16: bool, adapter_path: str | Path | None = None) -> nn.Module:
    """Load the same with a new LoRA of rank 16, or with a trained adapter of ours, which must be plain LoRA."""
    if adapter_path is None:
        return lora_on(transformers_model(ckpt_dir, bf16))
    require_package("peft")
    from peft import PeftModel

    with tempfile.TemporaryDirectory() as folder:
        converted = to_peft(adapter_path, Path(folder, "peft"), ckpt_dir=ckpt_dir)
        return PeftModel.from_pretrained(transformers_model(ckpt_dir, bf16), converted)


def padded_step(model: nn.Module, device: torch.device = CPU) -> Callable[[list[Example]], float]:
    """Return a training step as transformers' Trainer does it -> its loss: rows padded to the longest, fused AdamW."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.95), fused=True)

    def step(examples: list[Example]) -> float:
        longest = max(len(e.tokens) for e in examples)

        def padded(rows: list[list[int]], fill: int) -> Tensor:
            return torch.tensor([row + [fill] * (longest - len(row)) for row in rows], device=device)

        tokens = padded([e.tokens for e in examples], 0)
        labels = padded([e.labels for e in examples], IGNORE_INDEX)
        mask = padded([[1] * len(e.tokens) for e in examples], 0)
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


@torch.inference_mode()
def padded_answers(
    model: nn.Module,
    stop_ids: Sequence[int],
    prompts: list[list[int]],
    max_gen_len: int,
    min_new_tokens: int,
    batch_size: int,
    device: torch.device = CPU,
) -> list[list[int]]:
    """Answer prompts by transformers' `generate`, greedily, in their order, each answer without its end token.

    Batches are of prompts of like length, the longest first, padded on the left; each ends with its longest answer.
    """
    model.eval()
    stop_ids, answers = list(stop_ids), {}
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        longest = max(len(prompts[i]) for i in chosen)
        rows = [[stop_ids[0]] * (longest - len(prompts[i])) + prompts[i] for i in chosen]
        mask = [[0] * (longest - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen]
        output = model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max_gen_len,
            min_new_tokens=min_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
        )
        for i, row in zip(chosen, output[:, longest:].tolist(), strict=True):
            stops = [position for position, token in enumerate(row) if token in stop_ids]
            answers[i] = row[: stops[0]] if stops else row
    return [answers[i] for i in range(len(prompts))]
