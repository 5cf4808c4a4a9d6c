"""Statistics of a model's routers over prompts with their answers.

    python -m inspection gates --ckpt_dir DIR --adapter_path RUN/adapter.pth --data_path test.json --save_path G.json
    python -m inspection gates ... --data_path RUN/gsm8k.jsonl        predictions of generate.py: rows with answers
    torchrun --nproc_per_node N -m inspection gates ...               the rows are shared out among N processes

The model first answers the rows that have no answer, greedily. Then hooks record its routers while it reads all
prompts and answers: per layer and slot the mean gate, its spread, how often it is on, and the threshold of a sparse
router; the load, balance and entropy of mixtures of experts. Tokens of prompts and of answers are counted apart and
together. inspection/running_stats.py describes the file.
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
from inspection.running_stats import RouterStatistics
from llama import Llama
from llama.checkpoint import fingerprint
from llama.data import encode_prompt
from llama.distributed import dp_rank, dp_size, is_rank0
from moa.adapter_file import adapter_file
from moa.files import file_hash, write_json
from moa.reading import read_rows

ROWS = "rows and answers"


@dataclass(frozen=True)
class Flags:
    data_path: str = flag(help="test rows, JSON or JSON lines; with answers where generate.py wrote them", group=ROWS)
    save_path: str = flag(help="JSON file to write, as RUN/gates.json; replaced if it exists", group=ROWS)
    max_rows: int | None = flag(None, least=1, help="only the first so many rows", group=ROWS)
    max_gen_len: int = flag(200, least=1, help="tokens of an answer at most", group=ROWS)

    def __post_init__(self):
        if Path(self.save_path).is_dir():
            raise ValueError(f"--save_path {self.save_path} is a folder, expected the path of a file")


def main(argv: Sequence[str], prog: str) -> None:
    (flags, model_flags), _ = parse_into([Flags, ModelFlags], argv, prog=prog, description=__doc__)
    if flags.max_gen_len >= model_flags.max_seq_len:
        die(f"--max_gen_len {flags.max_gen_len} must be below --max_seq_len {model_flags.max_seq_len}", status=2)
    with cli_errors(memory_advice=f"lower --max_batch_size (now {model_flags.max_batch_size}) or --max_seq_len"):
        rows = rows_with_answers(flags)
        with running(model_flags) as llm:
            statistics, n_rows = count(flags, llm, rows)
            if is_rank0():
                source = {
                    "rows": n_rows,
                    "rows_left_out": len(rows) - n_rows,
                    "answers": "given" if "generate" in rows[0] else "generated",
                    "data": Path(flags.data_path).name,
                    "data_sha256": file_hash(flags.data_path),
                    "max_gen_len": flags.max_gen_len,
                    "max_seq_len": llm.max_seq_len,
                    "base_fingerprint": fingerprint(model_flags.ckpt_dir),
                    "adapter_sha256": file_hash(adapter_file(model_flags.adapter_path)),
                    "adapter": llm.model.config.to_dict(),
                    "dtype": str(llm.model.output.weight.dtype).removeprefix("torch."),
                    "processes": dp_size(),
                }
                result = statistics.result(source)
                write_json(Path(flags.save_path), result)
                print("\n".join(summary(result)))


def rows_with_answers(flags: Flags) -> list[dict[str, Any]]:
    """Rows with an instruction and an input; where the file has answers, a row for each, as `generate`."""
    rows = read_rows(flags.data_path, ("instruction", "input"))[: flags.max_rows]
    if "generate" not in rows[0]:
        return rows
    samples = [row.texts for row in read_predictions(flags.data_path)]
    return [row | {"generate": text} for row, texts in zip(rows, samples, strict=False) for text in texts]


def count(flags: Flags, llm: Llama, rows: list[dict[str, Any]]) -> tuple[RouterStatistics, int]:
    """Read this process's share of the rows that fit -> the sums of all processes, and the number of those rows."""
    statistics = RouterStatistics(llm)
    prompts = [encode_prompt(llm.tokenizer, row, llm.max_seq_len - flags.max_gen_len) for row in rows]
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) < llm.max_seq_len]
    if not fitting:
        raise ValueError(f"no row leaves room for an answer within --max_seq_len {llm.max_seq_len}")
    share = fitting[dp_rank() :: dp_size()]
    prompts = [prompts[i] for i in share]
    if "generate" in rows[0]:
        answers = [llm.tokenizer.encode(rows[i]["generate"])[: flags.max_gen_len] for i in share]
    else:
        answers = llm.generate(prompts, flags.max_gen_len)
    statistics.read(prompts, answers)
    statistics.reduce()
    return statistics, len(fitting)


def summary(result: dict[str, Any]) -> list[str]:
    """Lines for the terminal: means over the layers."""
    counts, gates, mixtures = result["counts"], defaultdict(list), defaultdict(list)
    for router in result["routers"]:
        part = router["parts"]["all"]
        if router["slot"] is None:
            for name, mean, active in zip(router["names"], part["mean"], part["active"], strict=True):
                gates[name].append((mean, active))
        else:
            mixtures[router["slot"]].append((sum(part["active"]), part["balance"], part["entropy"]))
    lines = [f"{result['method']}: {counts['prompt']} tokens of prompts, {counts['answer']} of answers"]
    for name, (mean, active) in ((name, np.mean(numbers, 0)) for name, numbers in gates.items()):
        lines.append(f"  {name:14} mean gate {mean:.3f}, above 0 in {active:.1%}")
    for slot, (used, balance, entropy) in ((slot, np.mean(numbers, 0)) for slot, numbers in mixtures.items()):
        lines.append(f"  {slot:14} experts used {used:.2f}, balance {balance:.3f}, entropy {entropy:.3f}")
    return lines
