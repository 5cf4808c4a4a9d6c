"""Time and memory of generation: our base and methods, and transformers with and without PEFT's LoRA.

    python -m benchmarks.generation [--methods soft_moa,lora | all] [--peft] [--prompts 16] [--new_tokens 64]
    python -m benchmarks.generation --natural_stops --prompts 200 --data_path gsm8k/test.json --peft \\
        --adapter_path runs/gsm8k/lora,runs/gsm8k/soft_moa [--batch_size 32] [--json FILE]

Greedy, on the same weights and prompts. Each kind answers in a process of its own, once to warm up and then --repeats
times, and --rounds such processes take turns, in the order ABBA. Times are medians over processes of each one's median;
memory is a process's largest resident set. "prefill": the time of the prompts and one token each; "decode": what each
token more takes, of all rows together. "first": the first call, in which ours prepacks weights.

Without --natural_stops each prompt is answered by --new_tokens tokens, all at once. With it, answers end where the
model ends them, --batch_size rows at a time: ours with rows that leave and come one by one, transformers in batches of
prompts of like length. Trained adapters differ in the length of their answers, so compare times per token. PEFT gets
the first of --adapter_path that is plain LoRA, else a new one. "same tokens": the share of rows whose first token, and
of all tokens, are those of our base, or of the same adapter; bf16 rounds differently.
"""

import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from benchmarks import common
from benchmarks.common import BASE, CPU, PEFT, TRANSFORMERS, figure, timed
from benchmarks.peers import padded_answers, peft_lora, transformers_model
from cli import cli_errors, flag, parse
from convert.adapters import require_plain_lora
from llama import Llama
from llama.checkpoint import load_params_and_tokenizer
from moa.adapter_file import load_adapter
from moa.config import AdapterConfig
from training.loop import peak_memory

Answers = list[list[int]]


@dataclass(frozen=True)
class Flags(common.SideBySide):
    methods: str | None = flag(None, help="methods with new adapters; default: soft_moa,lora without --adapter_path")
    adapter_path: str | None = flag(None, help="trained adapters, folders or files, with commas")
    peft: bool = flag(False, help="also transformers, and PEFT's LoRA on it (if installed)")
    prompts: int = flag(16, help="prompts, the first of the rows")
    new_tokens: int | None = flag(None, help="tokens of each answer, without --natural_stops; default: 64")
    natural_stops: bool = flag(False, help="answers end where the model ends them")
    max_gen_len: int | None = flag(None, help="new tokens at most, with --natural_stops; default: 200")
    batch_size: int | None = flag(None, help="rows at once, with --natural_stops; default: 32")
    repeats: int = flag(2, help="times that count in each process")
    rounds: int = flag(3, help="processes of each kind")
    only: str | None = flag(None, help="answer by this kind alone, in this process, and print its figures as JSON")

    def __post_init__(self):
        counts = ("prompts", "new_tokens", "max_gen_len", "batch_size", "repeats", "rounds", "threads")
        common.require_positive(self, *counts)
        self.fresh()
        for name in ("new_tokens",) if self.natural_stops else ("max_gen_len", "batch_size"):
            if getattr(self, name) is not None:
                when = "with" if self.natural_stops else "without"
                raise ValueError(f"--{name} has no effect {when} --natural_stops")

    def fresh(self) -> list[str]:
        default = "" if self.adapter_path else "soft_moa,lora"
        return common.methods_named(default if self.methods is None else self.methods)

    def lengths(self) -> tuple[int, int, int]:
        """Return new tokens at most and at least, and rows at once."""
        if self.natural_stops:
            return self.max_gen_len or 200, 0, self.batch_size or 32
        return self.new_tokens or 64, self.new_tokens or 64, self.prompts


class Kind(NamedTuple):
    """What is measured: the base, or an adapter beside it, new or trained."""

    config: AdapterConfig | None = None
    adapter_path: str | None = None


def kinds_of(flags: Flags, ckpt_dir: str) -> dict[str, Kind]:
    """Return all kinds by name. ValueError for an adapter that does not fit, or a second one of a method."""
    args, _ = load_params_and_tokenizer(ckpt_dir)
    kinds = {name: Kind(common.config_of(name, args.n_layers)) for name in (BASE, *flags.fresh())}
    plain = None
    for path in flags.adapter_path.split(",") if flags.adapter_path else []:
        config, _ = load_adapter(path, asdict(args))
        name = f"{config.method}, trained"
        if name in kinds:
            raise ValueError(f"--adapter_path: {path} is a second adapter of method {config.method}")
        kinds[name] = Kind(config, path)
        if plain is None and _is_plain_lora(config):
            plain = path
    return kinds | ({TRANSFORMERS: Kind(), PEFT: Kind(adapter_path=plain)} if flags.peft else {})


def _is_plain_lora(config: AdapterConfig) -> bool:
    try:
        require_plain_lora(config, "")
    except ValueError:
        return False
    return True


def answerer(
    name: str, kind: Kind, ckpt_dir: str, bf16: bool, prompts: Answers, flags: Flags
) -> Callable[[int, int], Answers]:
    """Load a kind -> a function of the new tokens at most and at least that answers all prompts."""
    max_gen_len, _, batch_size = flags.lengths()
    if name in (TRANSFORMERS, PEFT):
        theirs = name == TRANSFORMERS
        model = transformers_model(ckpt_dir, bf16) if theirs else peft_lora(ckpt_dir, bf16, kind.adapter_path)
        stop_ids = load_params_and_tokenizer(ckpt_dir)[1].stop_ids
        return lambda most, least: padded_answers(model, stop_ids, prompts, most, least, batch_size)
    llm = Llama.build(
        ckpt_dir,
        kind.adapter_path,
        config=None if kind.adapter_path else kind.config,
        max_seq_len=max(map(len, prompts)) + max_gen_len,
        max_batch_size=batch_size,
        bf16=bf16,
    )
    return lambda most, least: llm.generate(prompts, most, least)


def measure(answer: Callable[[int, int], Answers], flags: Flags) -> dict[str, Any]:
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


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    flags = parse(Flags, argv, prog="python -m benchmarks.generation", description=__doc__)
    with cli_errors():
        torch.set_num_threads(flags.threads)
        ckpt_dir, bf16 = flags.base_folder(), flags.use_bf16()
        prompts = common.prompts_of(flags.rows_file(1), ckpt_dir, flags.prompts)
        kinds = kinds_of(flags, ckpt_dir)
        if flags.only:
            answer = answerer(flags.only, kinds[flags.only], ckpt_dir, bf16, prompts, flags)
            print(json.dumps(measure(answer, flags)))
            return
        works = {kind: common.run_only("benchmarks.generation", argv, kind, flags.threads) for kind in kinds}
        report(flags, common.measure_in_turn(works, flags.rounds), kinds, bf16)


def figures_of(flags: Flags, runs: list[dict[str, Any]], reference: Answers) -> dict[str, Any]:
    """Sum up a kind's runs. reference: what the same weights answer with us."""
    answers, seconds = runs[0].pop("answers"), common.median_seconds(runs)
    prefill, tokens = statistics.median(t for run in runs for t in run["prefill"]), sum(map(len, answers))
    steps = None if flags.natural_stops else max(1, flags.lengths()[0] - 1)
    return {
        "seconds": seconds,
        "seconds_per_answer": seconds / len(answers),
        "seconds_per_token": seconds / max(1, tokens),
        "first": statistics.median(run["first"] for run in runs),
        "prefill": prefill,
        "decode_step": steps and (seconds - prefill) / steps,
        "generation_peak_memory_bytes": common.peak_bytes(runs),
        "tokens": tokens,
        "same_tokens": agreement(answers, reference),
    }


def report(flags: Flags, results: dict[str, list[dict[str, Any]]], kinds: dict[str, Kind], bf16: bool) -> None:
    """Print the table and write the JSON file."""
    answers = {name: runs[0]["answers"] for name, runs in results.items()}
    ours = {kind.adapter_path: name for name, kind in reversed(kinds.items()) if name not in (TRANSFORMERS, PEFT)}
    ours[None] = BASE
    figures = {name: figures_of(flags, runs, answers[ours[kinds[name].adapter_path]]) for name, runs in results.items()}
    others, rows = [figures.get(name) for name in (BASE, TRANSFORMERS, PEFT)], []
    for name, f in figures.items():
        per_token = [figure(o and f["seconds_per_token"] / o["seconds_per_token"]) for o in others]
        times = [figure(1000 * f["seconds_per_token"]), *per_token, figure(f["prefill"])]
        decode = figure(f["decode_step"] and 1000 * f["decode_step"], 1)
        same = " / ".join(f"{100 * share:.0f} %" for share in f["same_tokens"].values())
        memory, each = figure(f["generation_peak_memory_bytes"] / 1e9), figure(f["tokens"] / flags.prompts, 1)
        rows.append([name, figure(f["seconds"]), each, *times, decode, figure(f["first"]), memory, same])
    most, least, batch_size = flags.lengths()
    until = f"{most} new tokens each" if least else f"natural stops, at most {most} new tokens"
    print(
        f"{flags.prompts} prompts, {until}, {batch_size} rows at once, greedy, {'bf16' if bf16 else 'fp32'}, "
        f"{flags.threads} threads, {flags.rounds} processes that answer {flags.repeats} times\n"
    )
    heads = ["answers of", "seconds", "tokens each", "ms per token", "x base", "x transformers", "x PEFT"]
    print(common.table([*heads, "prefill, s", "decode step, ms", "first, s", "peak memory, GB", "same tokens"], rows))
    if flags.json:
        for runs in results.values():
            for run in runs:
                run.pop("answers", None)
        details = {"prompts": flags.prompts, "max_gen_len": most, "min_new_tokens": least, "batch_size": batch_size}
        details |= {"bf16": bf16, "threads": flags.threads, "runs": results}
        common.add_figures(flags.json, "generation", details, figures)


if __name__ == "__main__":
    main()
