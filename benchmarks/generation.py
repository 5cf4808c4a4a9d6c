"""Time and memory of generation: our base and methods, transformers with and without PEFT's LoRA, and llama.cpp.

    python -m benchmarks.generation [--methods soft_moa,lora | all] [--peft] [--prompts 16] [--new_tokens 64]
    python -m benchmarks.generation --methods "" --peft --natural_stops --prompts 200 [--batch_size 32] [--json FILE]
    python -m benchmarks.generation --methods soft_moa --compile --llama_cpp --batch_size 1 --prompts 2 --new_tokens 128

Greedy, on the same weights and prompts, with new adapters. Each kind answers in a process of its own, once to warm up
and then --repeats times, and --rounds such processes take turns, in the order ABBA. Times are medians over processes of
each one's median; memory is a process's largest resident set. "prefill": the time of the prompts and one token each;
"decode": what each token more takes, of all rows together. "first": the first call, in which ours prepacks weights.

Without --natural_stops each prompt is answered by --new_tokens tokens. With it, answers end where the model ends them:
ours with rows that leave and come one by one, transformers in batches of prompts of like length. "same tokens": the
share of rows whose first token, and of all tokens, are those of our base; bf16 rounds differently.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import common, models, peers
from benchmarks.common import BASE, CPU, LLAMA_CPP, PEERS, PEFT, TRANSFORMERS, Figures, median, multiple, number, timed
from cli import cli_errors, flag, parse
from llama import Llama
from llama.checkpoint import load_params_and_tokenizer
from llama.data import encode_prompt
from moa.files import write_json
from moa.reading import read_rows
from training.loop import peak_memory

Answers = list[list[int]]
ANY_LENGTH = 10**6  # tokens: room for any prompt


@dataclass(frozen=True)
class Flags(common.SideBySide):
    methods: str = flag("soft_moa,lora", help="methods with new adapters, with commas, or all")
    peft: bool = flag(False, help="also transformers, and PEFT's LoRA on it (if installed)")
    llama_cpp: bool = flag(False, help="also llama.cpp by the package xllamacpp (needs --batch_size 1)")
    compile: bool = flag(False, help="as of generate.py, for the base and the methods")
    prompts: int = flag(16, least=1, help="prompts, the first of the rows")
    natural_stops: bool = flag(False, help="answers end where the model ends them")
    new_tokens: int = flag(64, least=1, help="tokens of each answer, with --natural_stops at most")
    batch_size: int | None = flag(None, least=1, help="rows at once; default: all")
    repeats: int = flag(2, least=1, help="times that count in each process")
    only: str | None = flag(None, help="answer by this kind alone, in this process, and print its figures as JSON")

    def __post_init__(self):
        common.methods_named(self.methods)
        if self.peft:
            peers.require_installed("peft")
        if self.llama_cpp and (self.batch_size != 1 or self.natural_stops):
            raise ValueError("--llama_cpp needs --batch_size 1, and no --natural_stops")

    def kinds(self) -> list[str]:
        """Return all kinds of work that are measured."""
        return [BASE, *common.methods_named(self.methods), *(PEERS if self.peft else ()), *[LLAMA_CPP] * self.llama_cpp]

    def lengths(self) -> tuple[int, int]:
        """Return new tokens at most and at least."""
        return self.new_tokens, 0 if self.natural_stops else self.new_tokens


def prompts_of(path: str, ckpt_dir: str, n: int) -> Answers:
    """Return the token ids of the first n rows' prompts. ValueError where there are fewer rows."""
    _, tokenizer = load_params_and_tokenizer(ckpt_dir)
    rows = read_rows(path, ("instruction", "input"))[:n]
    if len(rows) < n:
        raise ValueError(f"{path}: --prompts {n}, but there are {len(rows)} rows")
    return [encode_prompt(tokenizer, row, ANY_LENGTH) for row in rows]


def answerer(kind: str, prompts: Answers, flags: Flags) -> Callable[[int, int], Answers]:
    """Load a kind -> a function of the new tokens at most and at least that answers all prompts."""
    ckpt_dir, bf16, batch_size = flags.base_folder(), flags.use_bf16(), flags.batch_size or flags.prompts
    args, tokenizer = load_params_and_tokenizer(ckpt_dir)
    if kind in PEERS:
        model = peers.transformers_model(ckpt_dir, bf16)
        model = peers.new_lora(model) if kind == PEFT else model
        return lambda most, least: peers.padded_answers(model, tokenizer.stop_ids, prompts, most, least, batch_size)
    longest = max(map(len, prompts)) + flags.new_tokens
    if kind == LLAMA_CPP:
        server = peers.llama_cpp_server(ckpt_dir, bf16, longest, flags.threads)
        return lambda most, _: peers.llama_cpp_answers(server, tokenizer.stop_ids, prompts, most)
    config, sizes = models.config_of(kind, args.n_layers), {"max_seq_len": longest, "max_batch_size": batch_size}
    llm = Llama.build(ckpt_dir, config=config, bf16=bf16, compile=flags.compile, **sizes)
    return lambda most, least: llm.generate(prompts, most, least)


def measure(answer: Callable[[int, int], Answers], flags: Flags) -> Figures:
    """Answer all prompts, first to warm up -> seconds of each time, of the prefill alone, memory and the answers."""
    first, answers = timed(lambda: answer(*flags.lengths()))
    seconds, prefill = [], []
    for _ in range(flags.repeats):
        seconds.append(timed(lambda: answer(*flags.lengths()))[0])
        prefill.append(timed(lambda: answer(1, 1))[0])
    figures = {"first": first, "seconds": seconds, "prefill": prefill}
    return figures | {"peak_memory_bytes": peak_memory(CPU), "answers": answers}


def agreement(answers: Answers, others: Answers) -> dict[str, float]:
    """Return the shares of rows with the same first token, and of the same tokens at the same positions."""
    pairs = list(zip(answers, others, strict=True))
    same = sum(x == y for a, b in pairs for x, y in zip(a, b, strict=False))
    positions = sum(max(len(a), len(b)) for a, b in pairs)
    return {"first": sum(a[:1] == b[:1] for a, b in pairs) / len(pairs), "all": same / positions if positions else 1.0}


def summary(flags: Flags, runs: list[Figures], reference: Answers) -> Figures:
    """Sum up a kind's runs. reference: our base's answers."""
    seconds, prefill, answers = median(runs, "seconds"), median(runs, "prefill"), runs[0]["answers"]
    tokens = sum(map(len, answers))
    return {
        "seconds": seconds,
        "seconds_per_answer": seconds / len(answers),
        "seconds_per_token": seconds / max(1, tokens),
        "first": median(runs, "first"),
        "prefill": prefill,
        "decode_step": None if flags.natural_stops else (seconds - prefill) / max(1, flags.new_tokens - 1),
        "peak_memory_bytes": median(runs, "peak_memory_bytes"),
        "tokens": tokens,
        "same_tokens": agreement(answers, reference),
    }


def report(flags: Flags, results: dict[str, list[Figures]]) -> None:
    """Print the table and write the JSON file."""
    reference = results[BASE][0]["answers"]
    figures = {kind: summary(flags, runs, reference) for kind, runs in results.items()}
    columns = [
        ("answers of", lambda figures: figures["kind"]),
        ("seconds", number("seconds")),
        ("tokens each", number("tokens", 1, flags.prompts)),
        ("ms per token", number("seconds_per_token", 2, 1e-3)),
        ("x base", multiple("seconds_per_token", figures[BASE])),
        ("x transformers", multiple("seconds_per_token", figures.get(TRANSFORMERS))),
        ("x PEFT", multiple("seconds_per_token", figures.get(PEFT))),
        ("x llama.cpp", multiple("seconds_per_token", figures.get(LLAMA_CPP))),
        ("prefill, s", number("prefill")),
        ("decode step, ms", number("decode_step", 1, 1e-3)),
        ("first, s", number("first")),
        ("peak memory, GB", number("peak_memory_bytes", 2, 1e9)),
        ("same tokens", lambda figures: " / ".join(f"{share:.0%}" for share in figures["same_tokens"].values())),
    ]
    until = "natural stops, at most " * flags.natural_stops + f"{flags.new_tokens} new tokens each"
    rows = flags.batch_size or flags.prompts
    print(f"{flags.prompts} prompts, {until}, {rows} rows at once, greedy, {flags.conditions()}\n")
    print(common.table(columns, [{"kind": kind} | f for kind, f in figures.items()]))
    if flags.json:
        task = {"prompts": flags.prompts, "new_tokens": flags.new_tokens, "natural_stops": flags.natural_stops}
        task |= {"batch_size": rows, "bf16": flags.use_bf16(), "threads": flags.threads}
        write_json(Path(flags.json), {"task": task, "kinds": figures, "runs": results})


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    flags = parse(Flags, argv, prog="python -m benchmarks.generation", description=__doc__)
    with cli_errors():
        torch.set_num_threads(flags.threads)
        prompts = prompts_of(flags.rows_file(1), flags.base_folder(), flags.prompts)
        if flags.only:
            print(json.dumps(measure(answerer(flags.only, prompts, flags), flags)))
            return
        kinds = flags.kinds()
        works = {kind: common.run_only("benchmarks.generation", argv, kind, flags.threads) for kind in kinds}
        report(flags, common.measure_in_turn(works, flags.rounds))


if __name__ == "__main__":
    main()
