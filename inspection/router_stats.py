"""Statistics of a model's routers over the prompts and answers of a test file, or over one prompt.

    python -m inspection gates --ckpt_dir DIR --adapter_path OUT/adapter.pth --data_path test.json --save_path G.json
    torchrun --nproc_per_node N -m inspection gates ...        the rows are shared out among N processes

The model answers the rows as generate.py does while hooks record its routers: per layer and slot the mean gate, its
spread, how often it is on; the threshold and the adapters used per token of a sparse router; the load, balance and
entropy of mixtures of experts. Tokens of prompts and of answers are counted apart and together. --predict_file reads
the answers of a file of predictions instead, in one forward pass per row. inspection/router_file.py describes the file.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cli import cli_errors, die, flag, parse_into
from evaluate.rows import read_rows as read_predictions
from inspection.model import ModelFlags, running
from inspection.router_recorder import read_answers
from inspection.running_stats import RouterStatistics
from llama import Llama
from llama.checkpoint import fingerprint
from llama.data import encode_prompt
from llama.distributed import dp_rank, dp_size, is_rank0
from llama.machine import check_sampling
from moa.adapter_file import adapter_file
from moa.files import file_hash, write_json
from moa.reading import read_rows

ROWS = "rows and answers"


@dataclass(frozen=True)
class Flags:
    save_path: str = flag(help="JSON file to write, as OUT/gates.json; replaced if it exists", group=ROWS)
    data_path: str | None = flag(None, help="test rows, JSON or JSON lines, to be answered", group=ROWS)
    prompt: str | None = flag(None, help="an instruction to be answered, instead of a file", group=ROWS)
    predict_file: str | None = flag(None, help="predictions of generate.py: prompts with their answers", group=ROWS)
    max_rows: int | None = flag(None, least=1, help="only the first so many rows", group=ROWS)
    max_gen_len: int = flag(
        200, least=1, help="new tokens at most; --predict_file: of an answer, the first so many", group=ROWS
    )
    temperature: float = flag(0.0, help="0: greedy", group=ROWS)
    top_p: float = flag(0.75, help="draw from the most likely tokens that together have this probability", group=ROWS)
    seed: int = flag(0, help="seed of the draws", group=ROWS)

    def __post_init__(self):
        given = [f"--{name}" for name in ("data_path", "prompt", "predict_file") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give one of --data_path, --prompt and --predict_file, not {' and '.join(given) or 'none of them'}"
            )
        check_sampling(self.temperature, self.top_p)
        if Path(self.save_path).is_dir():
            raise ValueError(f"--save_path {self.save_path} is a folder, expected the path of a file")


def main(argv: Sequence[str], prog: str) -> None:
    (flags, model_flags), _ = parse_into([Flags, ModelFlags], argv, prog=prog, description=__doc__)
    if flags.max_gen_len >= model_flags.max_seq_len:
        die(f"--max_gen_len {flags.max_gen_len} must be below --max_seq_len {model_flags.max_seq_len}", status=2)
    with cli_errors(memory_advice=f"lower --max_batch_size (now {model_flags.max_batch_size}) or --max_seq_len"):
        rows = read_rows_with_answers(flags)
        with running(model_flags) as llm:
            count_and_save(flags, llm, rows, model_flags)


def read_rows_with_answers(flags: Flags) -> list[dict[str, Any]]:
    """Rows with an instruction and an input, and (--predict_file) an answer as `generate`: one row per sample."""
    if flags.prompt is not None:
        return [{"instruction": flags.prompt, "input": ""}]
    rows = read_rows(flags.data_path or flags.predict_file, ("instruction", "input"))[: flags.max_rows]
    if flags.predict_file is None:
        return rows
    samples = [row.texts for row in read_predictions(flags.predict_file)]
    return [row | {"generate": text} for row, texts in zip(rows, samples, strict=False) for text in texts]


def count_and_save(flags: Flags, llm: Llama, rows: list[dict[str, Any]], model_flags: ModelFlags) -> None:
    """Read this process's share of the rows; then the main process writes the sums of all."""
    statistics = RouterStatistics(llm.model)
    prompts = [encode_prompt(llm.tokenizer, row, llm.max_seq_len - flags.max_gen_len) for row in rows]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < llm.max_seq_len]
    if not fitting:
        raise ValueError(f"no row leaves room for an answer within --max_seq_len {llm.max_seq_len}")
    share = fitting[dp_rank() :: dp_size()]
    sampling = {"temperature": flags.temperature, "top_p": flags.top_p, "seed": flags.seed}
    with statistics.recorder():
        if flags.predict_file is not None:
            answers = [llm.tokenizer.encode(rows[i]["generate"])[: flags.max_gen_len] for i in share]
            read_answers(llm, [prompts[i] for i in share], answers)
        else:
            llm.generate([prompts[i] for i in share], flags.max_gen_len, **sampling)
    statistics.reduce()
    if not is_rank0():
        return
    # What was read; files by name and content, not by where they lie
    file = flags.data_path or flags.predict_file
    result = statistics.result(
        {
            "rows": len(fitting),
            "rows_left_out": len(rows) - len(fitting),
            "answers": "generated" if flags.predict_file is None else "given",
            "data": Path(file).name if file else None,
            "data_sha256": file_hash(file) if file else None,
            "prompt": flags.prompt,
            "max_gen_len": flags.max_gen_len,
            "base_fingerprint": fingerprint(model_flags.ckpt_dir),
            "adapter_sha256": file_hash(adapter_file(model_flags.adapter_path)),
            "max_seq_len": llm.max_seq_len,
            "adapter": llm.model.config.to_dict(),
            **(sampling if flags.predict_file is None else {}),
            "dtype": str(llm.model.output.weight.dtype).removeprefix("torch."),
            "processes": dp_size(),
        }
    )
    Path(flags.save_path).parent.mkdir(parents=True, exist_ok=True)
    write_json(Path(flags.save_path), result)
    print("\n".join(summary(result)))


def summary(result: dict[str, Any]) -> list[str]:
    """Lines for the terminal: means over the layers."""
    counts, parts = result["counts"], [block["parts"]["all"] for block in result["blocks"]]
    lines = [f"{result['method']}: {counts['prompt']} tokens of prompts, {counts['answer']} of answers"]
    gates, experts = defaultdict(list), defaultdict(list)
    for block, part in zip(result["blocks"], parts, strict=True):
        for slot, *numbers in zip(block["slots"], part["mean"], part["active"], strict=True):
            gates[slot].append(numbers)
    for slot, (gate, active) in ((slot, np.mean(numbers, 0)) for slot, numbers in gates.items()):
        lines.append(f"  {slot:14} mean gate {gate:.3f}, above 0 in {active:.1%}")
    if parts:
        used, slots = np.mean([(part["used"]["mean"], len(part["mean"])) for part in parts], 0)
        lines.append(f"  adapters used per layer: {used:.2f} of {slots:.2f}")
    for mixture in result["experts"]:
        part = mixture["parts"]["all"]
        experts[mixture["slot"]].append((part["used"]["mean"], part["balance"], part["entropy"]))
    for slot, (used, balance, entropy) in ((slot, np.mean(numbers, 0)) for slot, numbers in experts.items()):
        lines.append(f"  {slot:14} experts used {used:.2f}, balance {balance:.3f}, entropy {entropy:.3f}")
    return lines
