"""Statistics of a model's routers over the prompts and answers of a test file, or over one prompt.

    python -m inspection gates --ckpt_dir DIR --adapter_path OUT/adapter.pth --data_path test.json --save_path G.json
    torchrun --nproc_per_node N -m inspection gates ...        the rows are shared out among N processes

The model answers the rows as generate.py does while hooks listen to its routers: per layer and slot the mean gate, its
spread, how often it is on; the threshold and the adapters used per token of a sparse router; the load, balance and
entropy of mixtures of experts. Prompts' tokens and answers' tokens apart, and together. --of_answers reads the answers
of a file of predictions instead, which takes one forward pass per row. inspection/statistics.py describes the file.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from cli import cli_errors, flag, parse_into
from inspection.model import ModelFlags, running
from llama.machine import check_sampling

ROWS = "rows and answers"


@dataclass(frozen=True)
class Flags:
    save_path: str = flag(help="JSON file to write, as OUT/gates.json; one that is there is replaced", group=ROWS)
    data_path: str | None = flag(None, help="test rows, JSON or JSON lines, to be answered", group=ROWS)
    prompt: str | None = flag(None, help="an instruction to be answered, in the place of a file", group=ROWS)
    of_answers: str | None = flag(None, help="predictions, as generate.py writes them: prompts and answers", group=ROWS)
    max_rows: int | None = flag(None, help="only the first so many rows", group=ROWS)
    max_gen_len: int = flag(200, help="new tokens at most; --of_answers: of an answer, the first so many", group=ROWS)
    temperature: float = flag(0.0, help="0: greedy", group=ROWS)
    top_p: float = flag(0.75, help="draw from the most likely tokens that together have this probability", group=ROWS)
    seed: int = flag(0, help="seed of the draws", group=ROWS)

    def __post_init__(self):
        given = [name for name in ("data_path", "prompt", "of_answers") if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(f"--{name}" for name in given) or "none of them"
            raise ValueError(f"give one of --data_path, --prompt and --of_answers, not {found}")
        for name in ("max_rows", "max_gen_len"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        check_sampling(self.temperature, self.top_p)
        if Path(self.save_path).is_dir():
            raise ValueError(f"--save_path {self.save_path} is a folder, expected the path of a file")


def main(argv: Sequence[str], prog: str) -> None:
    (flags, model_flags), _ = parse_into([Flags, ModelFlags], argv, prog=prog, description=__doc__)
    if flags.max_gen_len >= model_flags.max_seq_len:
        from cli import die

        die(f"--max_gen_len {flags.max_gen_len} must be below --max_seq_len {model_flags.max_seq_len}", status=2)
    with cli_errors(memory_advice=f"lower --max_batch_size (now {model_flags.max_batch_size}) or --max_seq_len"):
        rows = read(flags)
        with running(model_flags) as llm:
            observe(flags, llm, rows, model_flags)


def read(flags: Flags) -> list[dict[str, Any]]:
    """Rows with an instruction and an input, and (--of_answers) an answer as `generate`: one row per sample."""
    from llama.data import read_rows

    if flags.prompt is not None:
        return [{"instruction": flags.prompt, "input": ""}]
    if flags.data_path is not None:
        return read_rows(flags.data_path, ("instruction", "input"))[: flags.max_rows]
    rows = []
    for number, row in enumerate(read_rows(flags.of_answers, ("instruction", "input"))[: flags.max_rows], 1):
        samples = row.get("generate")
        samples = [samples] if isinstance(samples, str) else samples
        if not isinstance(samples, list) or not all(isinstance(text, str) for text in samples):
            raise ValueError(f"{flags.of_answers}: row {number}: field 'generate' is missing or not text")
        rows += [row | {"generate": text} for text in samples]
    return rows


def observe(flags: Flags, llm: Any, rows: list[dict[str, Any]], model_flags: ModelFlags) -> None:
    """This process's share of the rows; then the main process writes the sums of all."""
    from inspection.statistics import Statistics
    from llama.data import encode_prompt
    from llama.distributed import dp_rank, dp_size, is_rank0
    from moa.files import write_json

    statistics = Statistics(llm.model)
    room = llm.max_seq_len - flags.max_gen_len
    prompts = [encode_prompt(llm.tokenizer, row, room) for row in rows]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < llm.max_seq_len]
    if not fitting:
        raise ValueError(f"no row leaves room for an answer within --max_seq_len {llm.max_seq_len}")
    mine = fitting[dp_rank() :: dp_size()]
    with statistics.recorder():
        if flags.of_answers is not None:
            answers = [llm.tokenizer.encode(rows[i]["generate"])[: flags.max_gen_len] for i in mine]
            read_answers(llm, [prompts[i] for i in mine], answers)
        else:
            settings = {"temperature": flags.temperature, "top_p": flags.top_p, "seed": flags.seed}
            llm.generate([prompts[i] for i in mine], flags.max_gen_len, **settings)
    statistics.reduce()
    if is_rank0():
        result = statistics.result(source(flags, llm, len(fitting), len(rows), model_flags))
        Path(flags.save_path).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(flags.save_path), result)
        print("\n".join(summary(result)))


def read_answers(llm: Any, prompts: list[list[int]], answers: list[list[int]]) -> None:
    """One forward pass over each prompt with its answer, as far as both fit; `max_batch_size` rows at a time."""
    import torch

    from llama.packing import PackedBatch

    device = llm.model.output.weight.device
    for begin in range(0, len(prompts), llm.max_batch_size):
        part = slice(begin, begin + llm.max_batch_size)
        whole = [(p + a)[: llm.max_seq_len] for p, a in zip(prompts[part], answers[part], strict=True)]
        rows = PackedBatch([len(tokens) for tokens in whole], device, [len(prompt) for prompt in prompts[part]])
        with torch.inference_mode():
            llm.model.hidden(torch.tensor([token for tokens in whole for token in tokens], device=device), rows)


def source(flags: Flags, llm: Any, fitting: int, asked: int, model_flags: ModelFlags) -> dict[str, Any]:
    """What was read, and how; files by name and content, not by where they lie."""
    from llama.checkpoint import fingerprint
    from llama.distributed import dp_size
    from moa.files import file_hash

    file = flags.data_path or flags.of_answers
    adapter = Path(model_flags.adapter_path)
    adapter = adapter / "adapter.pth" if adapter.is_dir() else adapter
    told = {
        "answers": "generated" if flags.of_answers is None else "given",
        "data": Path(file).name if file else None,
        "data_sha256": file_hash(file) if file else None,
        "prompt": flags.prompt,
        "rows": fitting,
        "rows_left_out": asked - fitting,
        "max_gen_len": flags.max_gen_len,
        "max_seq_len": llm.max_seq_len,
    }
    if flags.of_answers is None:
        told |= {"temperature": flags.temperature, "top_p": flags.top_p, "seed": flags.seed}
    dtype = str(llm.model.output.weight.dtype).removeprefix("torch.")
    hashes = {"base_fingerprint": fingerprint(model_flags.ckpt_dir), "adapter_sha256": file_hash(adapter)}
    return told | hashes | {"dtype": dtype, "processes": dp_size(), "adapter": llm.model.config.to_dict()}


def summary(result: dict[str, Any]) -> list[str]:
    """What a terminal shows of it: means over the layers."""
    counts = result["counts"]
    lines = [f"{result['method']}: {counts['prompt']} tokens of prompts, {counts['answer']} of answers"]
    blocks = [(block["slots"], block["parts"]["all"]) for block in result["blocks"]]
    for slot in dict.fromkeys(slot for slots, _ in blocks for slot in slots):
        places = [(part, slots.index(slot)) for slots, part in blocks if slot in slots]
        gate, active = (mean([part[name][i] for part, i in places]) for name in ("mean", "active"))
        lines.append(f"  {slot:14} mean gate {gate:.3f}, above 0 in {active:.1%}")
    if blocks:
        used, there = mean([part["used"]["mean"] for _, part in blocks]), mean([len(slots) for slots, _ in blocks])
        lines.append(f"  adapters used per layer: {used:.2f} of {there:.2f}")
    mixtures = [(one["slot"], one["parts"]["all"]) for one in result["experts"]]
    for slot in dict.fromkeys(slot for slot, _ in mixtures):
        parts = [part for other, part in mixtures if other == slot]
        balance, entropy = (mean([part[name] for part in parts]) for name in ("balance", "entropy"))
        used = mean([part["used"]["mean"] for part in parts])
        lines.append(f"  {slot:14} experts used {used:.2f}, balance {balance:.3f}, entropy {entropy:.3f}")
    return lines
