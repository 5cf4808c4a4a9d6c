"""The score of a suite during training: the model answers some rows of it, and evaluate scores the answers."""

import json
from pathlib import Path

import torch.distributed as dist

from evaluate.scoring import score_file
from evaluate.tasks import task_named
from llama import Llama
from llama.data import encode_prompt
from llama.distributed import broadcast_from_rank0, dp_rank, dp_size
from llama.templates import prompt_fields
from moa.files import atomic_write
from moa.reading import read_rows
from training.config import TrainConfig

ANSWER_LENGTH = 200  # most new tokens of an answer


class SuiteScore:
    """Calling it answers the rows of --val_suite greedily -> percent that the robust rule finds right.

    All processes must call it; they share the rows. The last answers stay in `folder`/validation.
    """

    def __init__(self, llm: Llama, flags: TrainConfig, folder: Path):
        path, self.task = flags.val_suite_path or flags.val_data_path, task_named(flags.val_suite)
        self.rows, self.prompts = read_rows(path, prompt_fields(flags.template))[: flags.val_suite_rows], []
        for number, row in enumerate(self.rows, 1):
            self.task.answer_of(row, f"{path}: row {number}")
            try:
                prompt = encode_prompt(llm.tokenizer, row, flags.max_seq_len, flags.template)
            except ValueError as error:
                raise ValueError(f"{path}: row {number}: {error}") from None
            if len(prompt) > flags.max_seq_len:
                raise ValueError(f"{path}: row {number}: its prompt is longer than --max_seq_len {flags.max_seq_len}")
            self.prompts.append(prompt)
        # Plain decoding keeps no copies of weights, which training is about to change
        self.llm = Llama(llm.model, llm.tokenizer, flags.max_seq_len + ANSWER_LENGTH, len(self.rows))
        self.file = folder / "validation" / f"{self.task.name}.jsonl"

    def __call__(self) -> float:
        answers = self.answers()
        return broadcast_from_rank0(lambda: self.score(answers))

    def answers(self) -> list[str]:
        """The answers to all rows, on all processes."""
        share = range(dp_rank(), len(self.rows), dp_size())
        texts = map(self.llm.tokenizer.decode, self.llm.generate([self.prompts[i] for i in share], ANSWER_LENGTH))
        parts: list[dict[int, str]] = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, dict(zip(share, texts, strict=True)))
        by_row = {i: text for part in parts for i, text in part.items()}
        return [by_row[i] for i in range(len(self.rows))]

    def score(self, answers: list[str]) -> float:
        """Write the answers down and score them."""
        lines = [json.dumps(row | {"generate": text}) + "\n" for row, text in zip(self.rows, answers, strict=True)]
        atomic_write(self.file, "".join(lines).encode())
        return score_file(self.file, self.task).robust.percent
