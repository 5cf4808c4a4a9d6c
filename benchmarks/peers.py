"""What a user would install instead: transformers' LLaMA with PEFT's LoRA, and llama.cpp, on the same weights, rows and
prompts."""

import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.common import CPU, timed
from benchmarks.models import Trainer, schedule_of
from convert.meta_format import GGUF, HF, source_names, unpermute_rope
from llama.args import ModelArgs
from llama.checkpoint import load_params_and_tokenizer, open_shard, shard_files
from llama.data import IGNORE_INDEX, Example
from training.data import label_count

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]  # as Q, K, V, O, FFN_DOWN
PERMUTED = ("wq.weight", "wk.weight")  # their rows stand in another order


def require_installed(name: str) -> None:
    """ValueError unless a package is there. It is not loaded: that takes time and memory, which are measured."""
    if find_spec(name) is None:
        raise ValueError(f"{name} is not installed (pip install {name})")


def require_package(name: str) -> ModuleType:
    """Return a package. ValueError where it is not installed."""
    require_installed(name)
    return import_module(name)


def transformers_on(args: ModelArgs, base: Mapping[str, Tensor]) -> nn.Module:
    """Build transformers' `LlamaForCausalLM` on a base in Meta's names, whose tensors it shares; wq and wk are copies.

    ValueError without transformers.
    """
    transformers = require_package("transformers")
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": args.rope_theta}
    if args.use_scaled_rope:
        rope |= {"rope_type": "llama3", "factor": args.rope_scaling_factor}
        rope |= {"low_freq_factor": args.rope_low_freq_factor, "high_freq_factor": args.rope_high_freq_factor}
        rope |= {"original_max_position_embeddings": args.rope_original_max_seq_len}
    config = transformers.LlamaConfig(
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
        model = transformers.LlamaForCausalLM(config)
    names = source_names(args.n_layers, HF)
    state = {
        name: unpermute_rope(base[key], args.head_dim) if key.endswith(PERMUTED) else base[key]
        for key, name in names.items()
        if key in base
    }
    model.load_state_dict(state, assign=True)
    angles = type(model.model.rotary_emb)(config)  # no weights, so not in the state
    model.model.rotary_emb = angles.to(base["output.weight"].device)
    return model


def copied_bytes(base: Mapping[str, Tensor]) -> int:
    """Return what `transformers_on` takes beside the base."""
    return sum(tensor.nbytes for key, tensor in base.items() if key.endswith(PERMUTED))


def base_of(ckpt_dir: str, bf16: bool) -> tuple[ModelArgs, dict[str, Tensor]]:
    """Load the weights of a checkpoint of one shard, in Meta's names."""
    args, _ = load_params_and_tokenizer(ckpt_dir)
    shards = [open_shard(file) for file in shard_files(Path(ckpt_dir))]
    if len(shards) != 1:
        raise ValueError(f"{ckpt_dir}: {len(shards)} shards; python -m convert reshard makes one of them")
    dtype = torch.bfloat16 if bf16 else torch.float32
    return args, {key: tensor.to(dtype) for key, tensor in shards[0].items()}


def transformers_model(ckpt_dir: str, bf16: bool) -> nn.Module:
    """Load the base of a checkpoint of one shard as transformers' model. ValueError without transformers."""
    return transformers_on(*base_of(ckpt_dir, bf16))


def new_lora(model: nn.Module, rank: int = 16) -> nn.Module:
    """Put PEFT's LoRA of this rank at the published targets of a model of transformers; adapters are float32.

    ValueError without peft.
    """
    peft = require_package("peft")
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS, lora_dropout=0.0, bias="none")
    return peft.get_peft_model(model, config)


def padded(rows: Sequence[Sequence[int]], fill: int, device: torch.device, side: str = "right") -> Tensor:
    """Return rows as a matrix (rows, longest), filled up on one side."""
    tensors = [torch.tensor(row) for row in rows]
    return pad_sequence(tensors, batch_first=True, padding_value=fill, padding_side=side).to(device)


def trainer(model: nn.Module, examples: list[Example], rows: int, device: torch.device = CPU) -> Trainer:
    """Return what trains a model as transformers' Trainer does, rows padded to the longest, fused AdamW.

    The rows are those of `benchmarks.models.trainer`, in the same order.
    """
    model.train()
    trained, done = [p for p in model.parameters() if p.requires_grad], 0
    optimizer = torch.optim.AdamW(trained, lr=0.0, betas=(0.9, 0.95), fused=True)

    def step(batch: list[Example]) -> float:
        tokens = padded([row.tokens for row in batch], 0, device)
        labels = padded([row.labels for row in batch], IGNORE_INDEX, device)
        mask = padded([[1] * len(row.tokens) for row in batch], 0, device)
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    def train(steps: int) -> list[dict[str, Any]]:
        nonlocal done
        entries, schedule = [], schedule_of(examples, rows, done + steps)
        for i in range(done, done + steps):
            batch = [examples[row] for row in schedule.rows(i, seed=0)]
            seconds, loss = timed(lambda batch=batch: step(batch), device)
            tokens, label_tokens = sum(len(row.tokens) for row in batch), sum(map(label_count, batch))
            entries.append({"seconds": seconds, "loss": loss, "tokens": tokens, "label_tokens": label_tokens})
        done += steps
        return entries

    return train


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
        batch = [prompts[i] for i in order[begin : begin + batch_size]]
        output = model.generate(
            input_ids=padded(batch, stop_ids[0], device, "left"),
            attention_mask=padded([[1] * len(row) for row in batch], 0, device, "left"),
            max_new_tokens=max_gen_len,
            min_new_tokens=min_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
        )
        for i, row in zip(order[begin:], output[:, len(batch[0]) :].tolist(), strict=False):
            end = next((position for position, token in enumerate(row) if token in stop_ids), None)
            answers[i] = row[:end]
    return [answers[i] for i in range(len(prompts))]


def write_gguf(file: Path, args: ModelArgs, base: Mapping[str, Tensor]) -> None:
    """Write a LLaMA as GGUF, in the type of its weights. A token's text is its number and a comma, for all tokens."""
    gguf = require_package("gguf")
    writer, head_dim = gguf.GGUFWriter(file, "llama"), args.head_dim
    writer.add_context_length(16 * args.rope_original_max_seq_len)
    writer.add_embedding_length(args.dim)
    writer.add_block_count(args.n_layers)
    writer.add_feed_forward_length(args.ffn_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_vocab_size(args.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"{i}," for i in range(args.vocab_size)])
    writer.add_token_types([gguf.TokenType.NORMAL] * args.vocab_size)
    writer.add_token_merges(["0 ,"])
    for key, name in source_names(args.n_layers, GGUF).items():
        if key in base:
            as_bf16 = base[key].dtype == torch.bfloat16 and base[key].dim() > 1
            data = base[key].view(torch.uint8) if as_bf16 else base[key].float()
            writer.add_tensor(name, data.numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16 if as_bf16 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_server(ckpt_dir: str, bf16: bool, longest: int, threads: int) -> Any:
    """Load the base of a checkpoint of one shard in llama.cpp. ValueError without xllamacpp or gguf."""
    xllamacpp = require_package("xllamacpp")
    args, base = base_of(ckpt_dir, bf16)
    if args.qk_norm or args.use_scaled_rope:
        raise ValueError(f"{ckpt_dir}: --llama_cpp writes plain LLaMAs, without scaled angles or norms of queries")
    params = xllamacpp.CommonParams()
    params.n_ctx, params.n_parallel, params.verbosity = longest + 1, 1, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    with tempfile.TemporaryDirectory() as folder:
        write_gguf(file := Path(folder, "base.gguf"), args, base)
        params.model.path = str(file)
        return xllamacpp.Server(params)  # which keeps the file open


def llama_cpp_answers(
    server: Any, stop_ids: Sequence[int], prompts: list[list[int]], new_tokens: int
) -> list[list[int]]:
    """Answer prompts one by one by so many tokens, greedily."""
    answers, never = [], [[token, False] for token in stop_ids]
    for prompt in prompts:
        request = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "cache_prompt": False}
        text = server.handle_completions(request | {"logit_bias": never})["choices"][0]["text"]
        answers.append([int(number) for number in text.split(",")[:-1]])
    return answers
