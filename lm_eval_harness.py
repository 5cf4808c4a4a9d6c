"""Score a model and its adapter on tasks of lm-evaluation-harness.

    pip install lm_eval==0.4.13
    python lm_eval_harness.py --ckpt_dir DIR --adapter_path OUT/adapter.pth --tasks arc_easy,gsm8k

Prints lm_eval's own table. In Python, `register()` makes the model known to lm_eval under the name `moa`.
"""

import json
import os
import re
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from cli import cli_errors, flag, nearest, parse
from demo.model import ensure_model
from llama.data import format_prompt
from llama.machine import QUANTIZATIONS, check_machine, prepare_libraries
from llama.templates import ALPACA, CHAT_TEMPLATES, ROLES, TEMPLATES, encode_chat, require_template
from moa.methods import METHODS

MODEL, TASKS, MACHINE = "model", "tasks", "machine"


@dataclass(frozen=True)
class Flags:
    tasks: str = flag(help="names of tasks or groups, as arc_easy,gsm8k; * stands for any text", group=TASKS)
    ckpt_dir: str | None = flag(
        None, help="base model, a folder in Meta's layout; default: the demo model", group=MODEL
    )
    adapter_path: str | None = flag(
        None, help="adapter.pth, beside its adapter_params.json; default: none", group=MODEL
    )
    method: str | None = flag(
        None, help="method of an authors' adapter whose flags do not tell", choices=tuple(METHODS), group=MODEL
    )
    template: str | None = flag(
        None, help="ask as in a chat, or as adapters are trained; default: plain text", choices=TEMPLATES, group=MODEL
    )
    max_seq_len: int = flag(2048, least=1, help="longest row in tokens; longer ones lose their beginning", group=MODEL)
    num_fewshot: int | None = flag(None, least=0, help="examples before a question; default: the task's", group=TASKS)
    limit: float | None = flag(None, above=0, help="rows of each task; below 1: this share of them", group=TASKS)
    include_path: str | None = flag(None, help="folder with task files of your own", group=TASKS)
    gen_kwargs: str | None = flag(None, help="over a task's own, as do_sample=True,temperature=0.7", group=TASKS)
    seed: int = flag(0, help="seed of the draws, where a task draws", group=TASKS)
    save_path: str | None = flag(None, help="file for the results, JSON", group=TASKS)
    log_samples: bool = flag(False, help="write each row and its answer into --save_path too", group=TASKS)
    batch_size: int = flag(16, least=1, help="rows that are computed at once", group=MACHINE)
    bf16: bool | None = flag(None, help="base in bf16; default: where the hardware multiplies bf16", group=MACHINE)
    quantize: str | None = flag(
        None, help="hold the base's matrices in 4 bits (needs bitsandbytes)", choices=QUANTIZATIONS, group=MACHINE
    )
    device: str = flag("auto", help="auto, cpu, cuda or cuda:N", group=MACHINE)

    def __post_init__(self):
        check_machine(self.device, self.bf16)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("lm_eval_harness.py runs in one process, without torchrun")
        if self.method is not None and self.adapter_path is None:
            raise ValueError("--method has no effect without --adapter_path")
        if self.log_samples and self.save_path is None:
            raise ValueError("--log_samples has no effect without --save_path")
        if self.include_path is not None and not Path(self.include_path).is_dir():
            raise ValueError(f"--include_path {self.include_path}: no such folder")


MODEL_ARGS = ("ckpt_dir", "adapter_path", "method", "template", "max_seq_len", "bf16", "quantize", "seed")
GENERATION_KWARGS = ("until", "max_gen_toks", "max_new_tokens", "do_sample", "temperature", "top_p")


class GenerationOptions(NamedTuple):
    """How a task wants its answers. until: strings that end an answer and are no part of it. temperature 0: greedy."""

    until: tuple[str, ...]
    max_gen_toks: int
    temperature: float
    top_p: float


def read_options(task: str, kwargs: dict[str, Any]) -> GenerationOptions:
    """A task's generation_kwargs, with the defaults of lm_eval's `hf` model. ValueError names an option that is not
    available."""
    for name, value in kwargs.items():
        if name not in GENERATION_KWARGS and (name, value) != ("num_beams", 1):
            available = ", ".join(GENERATION_KWARGS)
            raise ValueError(f"task {task}: the generation option {name} {value} is not available ({available} are)")
    until, do_sample = kwargs.get("until") or [], kwargs.get("do_sample")
    temperature = 0 if do_sample is False else kwargs.get("temperature", 1 if do_sample else 0)
    return GenerationOptions(
        tuple(filter(None, [until] if isinstance(until, str) else until)),
        int(kwargs.get("max_gen_toks", kwargs.get("max_new_tokens", 256))),
        float(temperature),
        float(kwargs.get("top_p", 1)),
    )


def cut_at(text: str, until: tuple[str, ...]) -> str:
    """`text` up to the first of the strings in it."""
    return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]


class MoA:
    """A model of this project as lm_eval wants it; `register` adds lm_eval's base class, an optional package.

    Plain text gets BOS where the tokenizer has one. With a template, special tokens are read from a text, as
    `apply_chat_template` spells them there, and context and continuation are encoded apart, as in training.
    """

    def __init__(
        self,
        ckpt_dir: str,
        adapter_path: str | None = None,
        method: str | None = None,
        template: str | None = None,
        max_seq_len: int = 2048,
        batch_size: int = 16,
        bf16: bool | None = None,
        quantize: str | None = None,
        device: str = "auto",
        seed: int = 0,
    ):
        from llama import Llama
        from llama.distributed import bf16_is_fast, get_device

        super().__init__()
        bf16 = bf16_is_fast(get_device(device)) if bf16 is None else bf16
        self.llm = Llama.build(
            ckpt_dir,
            adapter_path,
            method=method,
            max_seq_len=max_seq_len,
            max_batch_size=batch_size,
            bf16=bf16,
            device=str(get_device(device)),
            quantize=quantize,
        )
        self.template, self.seed, rules = template, seed, self.llm.tokenizer.rules
        if template is not None:
            require_template(self.llm.tokenizer, template)
        self.files = ckpt_dir, adapter_path
        self.special = rules.special_tokens | rules.added_tokens if template in CHAT_TEMPLATES else {}

    @property
    def eot_token_id(self) -> int:
        return self.llm.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        bos_id = self.llm.tokenizer.bos_id
        return self.eot_token_id if bos_id is None else bos_id

    def get_model_info(self) -> dict[str, Any]:
        """What lm_eval writes down of a model, beside the arguments."""
        from llama.checkpoint import fingerprint
        from moa.adapter_file import adapter_file
        from moa.files import file_hash

        ckpt_dir, adapter_path = self.files
        adapter = file_hash(adapter_file(adapter_path)) if adapter_path else None
        return {"base_fingerprint": fingerprint(ckpt_dir), "adapter_sha256": adapter}

    @property
    def tokenizer_name(self) -> str:
        return f"moa-{self.template}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation up to where the answer begins; without the prompt for one, the last message is
        the beginning of the answer. Alpaca's template has no turns: all that is said is its instruction."""
        if not add_generation_prompt:
            return self.apply_chat_template(chat_history[:-1]) + chat_history[-1]["content"]
        if self.template == ALPACA:
            return format_prompt("\n\n".join(message["content"] for message in chat_history))
        messages = [(ROLES[message["role"]], message["content"]) for message in chat_history]
        tokenizer = self.llm.tokenizer
        return tokenizer.decode(encode_chat(tokenizer, self.template, messages, open_answer=True)[0])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        """Token ids, after BOS unless there is none, it is not wanted, or the text begins with a special token."""
        tokenizer, special = self.llm.tokenizer, self.special
        is_whole = add_special_tokens is False or string.startswith(tuple(special))
        ids = tokenizer.encode("", bos=not is_whole)
        spellings = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        for part in re.split(f"({spellings})", string) if special else [string]:
            ids += [special[part]] if part in special else tokenizer.encode(part)
        return ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.template is None:
            return super()._encode_pair(context, continuation)
        return self.tok_encode(context), self.tok_encode(continuation, add_special_tokens=False)

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """requests: (texts, tokens of the context, tokens of the continuation) each."""
        from llama.likelihood import log_likelihoods

        with tqdm(total=len(requests), unit="text", disable=disable_tqdm or None) as bar:
            return log_likelihoods(self.llm, [(context, text) for _, context, text in requests], bar.update)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows of max_seq_len tokens."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows, owners = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.llm.max_seq_len, context_len=1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[i] += log_prob
        return sums

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Answers, up to the first of a task's `until` strings. Prompts that are too long lose their beginning."""
        groups = defaultdict(list)
        for i, request in enumerate(requests):
            groups[read_options(request.task_name, request.args[1]), request.task_name].append(i)
        texts = [""] * len(requests)
        with tqdm(total=len(requests), unit="answer", disable=disable_tqdm or None) as bar:
            for (options, task), members in groups.items():
                room = self.llm.max_seq_len - options.max_gen_toks
                if room < 1:
                    raise ValueError(
                        f"task {task}: max_gen_toks {options.max_gen_toks} must be below max_seq_len "
                        f"{self.llm.max_seq_len}"
                    )
                prompts = [self.tok_encode(requests[i].args[0])[-room:] or [self.prefix_token_id] for i in members]
                answers = self.generate_texts(prompts, options, bar.update)
                for i, text in zip(members, answers, strict=True):
                    texts[i] = text
        return texts

    def generate_texts(self, prompts: list[list[int]], options: GenerationOptions, on_answer) -> list[str]:
        """Answers to prompts, without special tokens; equal prompts are samples of one answer."""
        decode, until = self.llm.tokenizer.decode, options.until
        special = {*self.llm.tokenizer.rules.special_tokens.values()}
        reach = max((len(stop.encode()) for stop in until), default=1)  # a token is a byte at least
        seen, samples = Counter(), []
        for prompt in map(tuple, prompts):
            samples.append(seen[prompt])
            seen[prompt] += 1
        answers = self.llm.generate(
            prompts,
            options.max_gen_toks,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=self.seed,
            samples=samples,
            on_finish=lambda index, tokens: on_answer(),
            is_complete=lambda tokens: any(stop in decode(tokens[-reach:]) for stop in until),
        )
        return [cut_at(decode([t for t in tokens if t not in special]), until) for tokens in answers]


@cache
def register() -> type:
    """lm_eval's model class `moa`. ValueError where lm_eval is not installed."""
    try:
        from lm_eval.api.model import TemplateLM
        from lm_eval.api.registry import register_model
    except ModuleNotFoundError:
        raise ValueError("lm-evaluation-harness is not installed (pip install lm_eval==0.4.13)") from None
    return register_model("moa")(type("MoALM", (MoA, TemplateLM), {}))


def load_tasks(manager, names: list[str]) -> list:
    """lm_eval's tasks and groups of these names. ValueError names what is not known, or cannot be loaded."""
    objects = []
    for name in names:
        matches = manager.match_tasks([name])
        if not matches:
            raise ValueError(f"--tasks: lm_eval has no task {name!r} (nearest: {nearest(name, manager.all_tasks)})")
        for match in matches:
            try:
                loaded = manager.load([match])
            except Exception as error:  # of a data set that cannot be had, or of the task's own code
                raise ValueError(f"--tasks {match}: cannot be loaded: {type(error).__name__}: {error}") from None
            objects += [loaded["groups"][match]] if match in loaded["groups"] else loaded["tasks"].values()
    return objects


def main(argv: list[str] | None = None) -> None:
    flags = parse(Flags, argv, prog="lm_eval_harness.py", description=__doc__)
    advice = f"lower --batch_size (now {flags.batch_size}) or --max_seq_len ({flags.max_seq_len})"
    with cli_errors(memory_advice=advice):
        prepare_libraries()
        run(flags)


def run(flags: Flags) -> None:
    """Evaluate, print the tables, and write the results."""
    register()
    # Both take seconds to load, and a wrong flag should not
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    from moa.files import atomic_write

    tasks = load_tasks(TaskManager(include_path=flags.include_path), flags.tasks.split(","))
    if flags.save_path:
        Path(flags.save_path).parent.mkdir(parents=True, exist_ok=True)
    ckpt_dir = str(ensure_model()) if flags.ckpt_dir is None else flags.ckpt_dir
    results = simple_evaluate(
        "moa",
        {name: getattr(flags, name) for name in MODEL_ARGS} | {"ckpt_dir": ckpt_dir},
        tasks,
        num_fewshot=flags.num_fewshot,
        batch_size=flags.batch_size,
        device=flags.device,
        limit=flags.limit,
        log_samples=flags.log_samples,
        apply_chat_template=flags.template is not None,
        fewshot_as_multiturn=flags.template in CHAT_TEMPLATES,
        gen_kwargs=flags.gen_kwargs,
    )
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))
    if flags.save_path:
        text = json.dumps(results, indent=1, default=handle_non_serializable, ensure_ascii=False)
        atomic_write(Path(flags.save_path), text.encode())


if __name__ == "__main__":
    main(sys.argv[1:])
