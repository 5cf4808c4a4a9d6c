"""Time and memory of generation: our base and methods, and transformers with and without PEFT's LoRA.

    python -m benchmarks.generation [--methods soft_moa,lora | all] [--peft] [--prompts 16] [--new_tokens 64]
    python -m benchmarks.generation --natural_stops --prompts 200 --data_path gsm8k/test.json --peft \\
        --adapter_path runs/gsm8k/lora,runs/gsm8k/soft_moa [--batch_size 32] [--json FILE]

Greedy, on the same weights and prompts. Each kind answers in a process of its own, once to warm up and then --repeats
times, and --rounds such processes take turns, in the order ABBA. Times are medians over processes of each one's median;
memory is a process's largest resident set. "prefill": the time of the prompts and one token each; "decode": what each
token more takes, of all rows together. "first": the first call, in which ours prepacks weights.

Without --natural_stops each prompt is answered by --new_tokens tokens. With it, answers end where the model ends them:
ours with rows that leave and come one by one, transformers in batches of prompts of like length. Trained adapters
differ in the length of their answers, so compare times per token. PEFT gets the first of --adapter_path that is plain
LoRA, else a new one. "same tokens": the share of rows whose first token, and of all tokens, are those of our base, or
of the same adapter; bf16 rounds differently.
"""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from benchmarks import common, models, peers
from benchmarks.common import BASE, CPU, PEERS, PEFT, TRANSFORMERS, Figures, median, multiple, number, timed
from cli import cli_errors, flag, parse
from convert.adapters import require_alone
from llama import Llama
from llama.checkpoint import load_params_and_tokenizer
from llama.data import encode_prompt
from moa.adapter_file import load_adapter
from moa.reading import read_rows
from training.loop import peak_memory

Answers = list[list[int]]
ANY_LENGTH = 10**6  # tokens: room for any prompt


@dataclass(frozen=True)
class Flags(common.SideBySide):
    methods: str | None = flag(None, help="methods with new adapters; default: soft_moa,lora without --adapter_path")
    adapter_path: str | None = flag(None, help="trained adapters, folders or files, with commas")
    peft: bool = flag(False, help="also transformers, and PEFT's LoRA on it (if installed)")
    prompts: int = flag(16, least=1, help="prompts, the first of the rows")
    natural_stops: bool = flag(False, help="answers end where the model ends them")
    new_tokens: int | None = flag(None, least=1, help="tokens of each answer (64), with --natural_stops at most (200)")
    batch_size: int | None = flag(None, least=1, help="rows at once; default: all, with --natural_stops 32")
    repeats: int = flag(2, least=1, help="times that count in each process")
    only: str | None = flag(None, help="answer by this kind alone, in this process, and print its figures as JSON")

    def __post_init__(self):
        self.fresh()

    def fresh(self) -> list[str]:
        """Return the methods with new adapters."""
        default = "" if self.adapter_path else "soft_moa,lora"
        return common.methods_named(default if self.methods is None else self.methods)

    def lengths(self) -> tuple[int, int, int]:
        """Return new tokens at most and at least, and rows at once."""
        most = self.new_tokens or (200 if self.natural_stops else 64)
        rows = self.batch_size or (32 if self.natural_stops else self.prompts)
        return most, 0 if self.natural_stops else most, rows


def prompts_of(path: str, ckpt_dir: str, n: int) -> Answers:
    """Return the token ids of the first n rows' prompts. ValueError where there are fewer rows."""
    _, tokenizer = load_params_and_tokenizer(ckpt_dir)
    rows = read_rows(path, ("instruction", "input"))[:n]
    if len(rows) < n:
        raise ValueError(f"{path}: --prompts {n}, but there are {len(rows)} rows")
    return [encode_prompt(tokenizer, row, ANY_LENGTH) for row in rows]


def kinds_of(flags: Flags) -> dict[str, str | None]:
    """Return the trained adapter of each kind, None for a new one or none at all.

    ValueError for an adapter that does not fit the base, or a second one of a method.
    """
    args, _ = load_params_and_tokenizer(flags.base_folder())
    kinds: dict[str, str | None] = dict.fromkeys([BASE, *flags.fresh()])
    plain_lora = []
    for path in flags.adapter_path.split(",") if flags.adapter_path else []:
        config, _ = load_adapter(path, args)
        name = f"{config.method}, trained"
        if name in kinds:
            raise ValueError(f"--adapter_path: {path} is a second adapter of method {config.method}")
        kinds[name] = path
        with suppress(ValueError):
            require_alone(config, path)
            plain_lora.append(path)
    return kinds | ({TRANSFORMERS: None, PEFT: next(iter(plain_lora), None)} if flags.peft else {})


def answerer(name: str, adapter_path: str | None, prompts: Answers, flags: Flags) -> Callable[[int, int], Answers]:
    """Load a kind -> a function of the new tokens at most and at least that answers all prompts."""
    ckpt_dir, bf16 = flags.base_folder(), flags.use_bf16()
    max_new_tokens, _, batch_size = flags.lengths()
    args, tokenizer = load_params_and_tokenizer(ckpt_dir)
    if name in PEERS:
        model = peers.transformers_model(ckpt_dir, bf16)
        if name == PEFT:
            model = peers.trained_lora(model, adapter_path, ckpt_dir) if adapter_path else peers.new_lora(model)
        return lambda most, least: peers.padded_answers(model, tokenizer.stop_ids, prompts, most, least, batch_size)
    llm = Llama.build(
        ckpt_dir,
        adapter_path,
        config=None if adapter_path else models.config_of(name, args.n_layers),
        max_seq_len=max(map(len, prompts)) + max_new_tokens,
        max_batch_size=batch_size,
        bf16=bf16,
    )
    return lambda most, least: llm.generate(prompts, most, least)


def measure(answer: Callable[[int, int], Answers], flags: Flags) -> Figures:
    """Answer all prompts, first to warm up -> seconds of each time, of the prefill alone, memory and the answers."""
    most, least, _ = flags.lengths()
    first, answers = timed(lambda: answer(most, least))
    seconds, prefill = [], []
    for _ in range(flags.repeats):
        seconds.append(timed(lambda: answer(most, least))[0])
        prefill.append(timed(lambda: answer(1, 1))[0])
    figures = {"first": first, "seconds": seconds, "prefill": prefill}
    return figures | {"peak_memory_bytes": peak_memory(CPU), "answers": answers}


def agreement(answers: Answers, others: Answers) -> dict[str, float]:
    """Return the shares of rows with the same first token, and of the same tokens at the same positions."""
    pairs = list(zip(answers, others, strict=True))
    same = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
    positions = sum(max(len(a), len(b)) for a, b in pairs)
    return {"first": sum(a[:1] == b[:1] for a, b in pairs) / len(pairs), "all": same / positions if positions else 1.0}


def figures_of(flags: Flags, runs: list[Figures], answers: Answers, reference: Answers) -> Figures:
    """Sum up a kind's runs. reference: what the same weights answer with us."""
    seconds, prefill, tokens = median(runs, "seconds"), median(runs, "prefill"), sum(map(len, answers))
    steps = None if flags.natural_stops else max(1, flags.lengths()[0] - 1)
    return {
        "seconds": seconds,
        "seconds_per_answer": seconds / len(answers),
        "seconds_per_token": seconds / max(1, tokens),
        "first": median(runs, "first"),
        "prefill": prefill,
        "decode_step": steps and (seconds - prefill) / steps,
        "generation_peak_memory_bytes": median(runs, "peak_memory_bytes"),
        "tokens": tokens,
        "same_tokens": agreement(answers, reference),
    }


def report(flags: Flags, results: dict[str, list[Figures]], kinds: dict[str, str | None]) -> None:
    """Print the table and write the JSON file."""
    answers = {name: [run.pop("answers") for run in runs][0] for name, runs in results.items()}
    ours = {path: name for name, path in kinds.items() if name not in PEERS} | {None: BASE}
    figures = {
        name: figures_of(flags, runs, answers[name], answers[ours[kinds[name]]]) for name, runs in results.items()
    }
    columns = [
        ("answers of", lambda figures: figures["kind"]),
        ("seconds", number("seconds")),
        ("tokens each", number("tokens", 1, flags.prompts)),
        ("ms per token", number("seconds_per_token", 2, 1e-3)),
        ("x base", multiple("seconds_per_token", figures[BASE])),
        ("x transformers", multiple("seconds_per_token", figures.get(TRANSFORMERS))),
        ("x PEFT", multiple("seconds_per_token", figures.get(PEFT))),
        ("prefill, s", number("prefill")),
        ("decode step, ms", number("decode_step", 1, 1e-3)),
        ("first, s", number("first")),
        ("peak memory, GB", number("generation_peak_memory_bytes", 2, 1e9)),
        ("same tokens", lambda figures: " / ".join(f"{share:.0%}" for share in figures["same_tokens"].values())),
    ]
    most, least, batch_size = flags.lengths()
    until = f"{most} new tokens each" if least else f"natural stops, at most {most} new tokens"
    print(f"{flags.prompts} prompts, {until}, {batch_size} rows at once, greedy, {flags.conditions()}\n")
    print(common.table(columns, [{"kind": kind} | f for kind, f in figures.items()]))
    if flags.json:
        details = {"prompts": flags.prompts, "max_gen_len": most, "min_new_tokens": least, "batch_size": batch_size}
        details |= {"bf16": flags.use_bf16(), "threads": flags.threads, "runs": results}
        common.add_figures(flags.json, "generation", details, figures)


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    flags = parse(Flags, argv, prog="python -m benchmarks.generation", description=__doc__)
    with cli_errors():
        torch.set_num_threads(flags.threads)
        prompts = prompts_of(flags.rows_file(1), flags.base_folder(), flags.prompts)
        kinds = kinds_of(flags)
        if flags.only:
            print(json.dumps(measure(answerer(flags.only, kinds[flags.only], prompts, flags), flags)))
            return
        works = {kind: common.run_only("benchmarks.generation", argv, kind, flags.threads) for kind in kinds}
        report(flags, common.measure_in_turn(works, flags.rounds), kinds)


if __name__ == "__main__":
    main()
