"""Answering prompts greedily: with our methods, our bare base, and with transformers and PEFT, as their users do it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import nn

from benchmarks.measure import CPU, apart
from benchmarks.models import config_of
from benchmarks.peers import peft_lora, transformers_model
from benchmarks.steps import BASE, PEFT, TRANSFORMERS
from convert.adapters import require_plain_lora
from llama import Llama
from llama.checkpoint import load_params_and_tokenizer
from moa.adapter_file import load_adapter
from moa.config import AdapterConfig

PEERS = (TRANSFORMERS, PEFT)


@dataclass(frozen=True)
class Task:
    """prompts: token ids. min_new_tokens: the end is not chosen before so many. batch_size: rows at once."""

    prompts: list[list[int]]
    max_gen_len: int
    min_new_tokens: int
    batch_size: int

    def shorter(self, new_tokens: int) -> "Task":
        """The same prompts, each answered by so many tokens."""
        return replace(self, max_gen_len=new_tokens, min_new_tokens=new_tokens)

    def first_batch(self) -> "Task":
        """The longest prompts alone, as many as run at once."""
        return replace(self, prompts=sorted(self.prompts, key=len)[-self.batch_size :])


Generate = Callable[[Task], list[list[int]]]  # answers without their end token


@dataclass(frozen=True)
class Kind:
    """What is measured. config: of the adapter beside the base, or None. adapter_path: a trained one's file, else it is
    as it starts."""

    name: str
    config: AdapterConfig | None = None
    adapter_path: str | None = None


def kinds_of(ckpt_dir: str, methods: list[str], adapter_paths: list[str], peft: bool) -> list[Kind]:
    """The base, fresh adapters of these methods, trained ones, transformers, and PEFT: with the first of the trained
    ones that is plain LoRA where there is one, so that both give the same answers. ValueError naming the file for an
    adapter that does not fit, or one of a method that is there already."""
    args, _ = load_params_and_tokenizer(ckpt_dir)
    kinds = [Kind(BASE), *(Kind(method, config_of(method, args.n_layers)) for method in methods)]
    for path in adapter_paths:
        config, _ = load_adapter(path, asdict(args))
        name = f"{config.method}, trained"
        if name in [kind.name for kind in kinds]:
            raise ValueError(f"--adapter_path: {path} is a second adapter of method {config.method}")
        kinds.append(Kind(name, config, path))
    kinds.append(Kind(TRANSFORMERS))
    if peft:
        plain = [kind for kind in kinds if kind.adapter_path and _is_plain(kind.config)]
        same = plain[0] if plain else Kind("", config_of("lora", args.n_layers))
        kinds.append(Kind(PEFT, same.config, same.adapter_path))
    return kinds


def _is_plain(config: AdapterConfig) -> bool:
    try:
        require_plain_lora(config, "")
    except ValueError:
        return False
    return True


@contextmanager
def made(kinds: Sequence[Kind], ckpt_dir: str, bf16: bool, task: Task) -> Iterator[dict[str, Generate]]:
    """Generators for tasks with at most this one's prompts and lengths, by kind; transformers' and PEFT's in processes
    of their own."""
    with ExitStack() as processes:
        generators = {}
        for kind in kinds:
            maker = maker_of(kind, ckpt_dir, bf16, task)
            other = kind.name in PEERS
            generators[kind.name] = processes.enter_context(apart(maker, torch.get_num_threads())) if other else maker()
        yield generators


def maker_of(kind: Kind, ckpt_dir: str, bf16: bool, task: Task) -> Callable[[], Generate]:
    """What makes a generator of one kind, in this process or another."""
    if kind.name in PEERS:
        dtype = torch.bfloat16 if bf16 else torch.float32
        return partial(_theirs_of, kind, ckpt_dir, dtype, load_params_and_tokenizer(ckpt_dir)[1].stop_ids)
    return partial(_ours_of, kind, ckpt_dir, bf16, task)


def _theirs_of(kind: Kind, ckpt_dir: str, dtype: torch.dtype, stop_ids: Sequence[int]) -> Generate:
    if kind.name == TRANSFORMERS:
        return theirs(transformers_model(ckpt_dir, dtype), stop_ids)
    return theirs(peft_lora(ckpt_dir, dtype, adapter_path=kind.adapter_path), stop_ids)


def _ours_of(kind: Kind, ckpt_dir: str, bf16: bool, task: Task) -> Generate:
    llm = ours(kind, ckpt_dir, bf16, task)
    return lambda task: llm.generate(task.prompts, task.max_gen_len, task.min_new_tokens)


def ours(kind: Kind, ckpt_dir: str, bf16: bool, task: Task) -> Llama:
    """Our model of a kind, with room for the task."""
    return Llama.build(
        ckpt_dir,
        kind.adapter_path,
        config=None if kind.adapter_path else kind.config,
        max_seq_len=max(map(len, task.prompts)) + task.max_gen_len,
        max_batch_size=task.batch_size,
        bf16=bf16,
    )


def theirs(model: nn.Module, stop_ids: Sequence[int], device: torch.device = CPU) -> Generate:
    """`generate` of transformers: consecutive batches of prompts of like length, longest first, padded on the left;
    each batch ends with its longest answer, an answer with any of `stop_ids`."""
    stop_ids = list(stop_ids)
    model.eval()

    def batch(prompts: list[list[int]], task: Task) -> list[list[int]]:
        longest = max(map(len, prompts))
        rows = [[stop_ids[0]] * (longest - len(prompt)) + prompt for prompt in prompts]
        marks = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        found = model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(marks, device=device),
            max_new_tokens=task.max_gen_len,
            min_new_tokens=task.min_new_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=stop_ids,
            pad_token_id=stop_ids[0],
        )
        return [_to_stop(row, stop_ids) for row in found[:, longest:].tolist()]

    @torch.inference_mode()
    def generate(task: Task) -> list[list[int]]:
        order = sorted(range(len(task.prompts)), key=lambda i: -len(task.prompts[i]))
        answers: dict[int, list[int]] = {}
        for begin in range(0, len(order), task.batch_size):
            places = order[begin : begin + task.batch_size]
            answers |= zip(places, batch([task.prompts[i] for i in places], task), strict=True)
        return [answers[i] for i in range(len(order))]

    return generate


def _to_stop(tokens: list[int], stop_ids: list[int]) -> list[int]:
    stops = [i for i, token in enumerate(tokens) if token in stop_ids]
    return tokens[: stops[0]] if stops else tokens


def agreement(answers: list[list[int]], others: list[list[int]]) -> dict[str, float]:
    """How far answers are the others': shares of rows with the same first token, and of the same tokens at the same
    places. Rounding parts them, the sooner in bf16, and a row that has parted stays so."""
    pairs = list(zip(answers, others, strict=True))
    same = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
    places = sum(max(len(a), len(b)) for a, b in pairs)
    return {"first": sum(a[:1] == b[:1] for a, b in pairs) / len(pairs), "all": same / places if places else 1.0}
