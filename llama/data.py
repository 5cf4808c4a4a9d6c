"""The prompt template, and the tokens and labels that rows of instruction data become."""

from typing import Any, NamedTuple

from llama.templates import ALPACA, encode_chat, messages_of
from llama.tokenizer import Tokenizer

IGNORE_INDEX = -100  # label of a position that is not learned


def format_prompt(instruction: str, input: str = "") -> str:
    """Alpaca's template; the parts about an input stand only where there is one."""
    pairing = ", paired with an input that provides further context" if input else ""
    return (
        f"Below is an instruction that describes a task{pairing}. "
        "Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{input}\n\n" if input else "") + "### Response:"
    )


class Example(NamedTuple):
    """One row to learn: tokens from BOS to EOS, labels aligned with them (IGNORE_INDEX where nothing is learned)."""

    tokens: list[int]
    labels: list[int]
    prompt_len: int


def encode_prompt(tokenizer: Tokenizer, row: dict[str, Any], room: int, template: str = ALPACA) -> list[int]:
    """BOS and the prompt of a row.

    Alpaca's template: the row's input is cut from its end until the prompt has at most `room` tokens; the result is
    longer where even the prompt without an input is. Chats are not cut.
    """
    if template != ALPACA:
        return encode_chat(tokenizer, template, messages_of(row, with_answer=False), open_answer=True)[0]
    instruction, input = row["instruction"], row["input"]
    tokens = tokenizer.encode(format_prompt(instruction, input), bos=True)
    kept = tokenizer.encode(input) if len(tokens) > room else []
    while len(tokens) > room and input:
        kept = kept[: max(0, len(kept) - (len(tokens) - room))]
        input = tokenizer.decode(kept).rstrip("\ufffd")  # half a character may be left at the cut
        tokens = tokenizer.encode(format_prompt(instruction, input), bos=True)
    return tokens


def encode_example(
    tokenizer: Tokenizer,
    row: dict[str, Any],
    max_seq_len: int,
    train_on_input: bool = False,
    template: str = ALPACA,
) -> Example | None:
    """Tokens and labels of a training row; None where it does not fit `max_seq_len` even without its input.

    Prompt and answer are tokenised apart: the boundary seen in training is the one met in generation. Labels are the
    answer (of a chat the assistant's turns), with train_on_input also all before, behind the first token.
    """
    if template != ALPACA:
        tokens, learned = encode_chat(tokenizer, template, messages_of(row, with_answer=True))
        if len(tokens) > max_seq_len:
            return None
        is_label = [False, *(train_on_input or is_answer for is_answer in learned[1:])]
        labels = [token if label else IGNORE_INDEX for token, label in zip(tokens, is_label, strict=True)]
        return Example(tokens, labels, learned.index(True))
    answer = tokenizer.encode(row["output"], eos=True)
    prompt = encode_prompt(tokenizer, row, max_seq_len - len(answer))
    if len(prompt) + len(answer) > max_seq_len:
        return None
    ignored = 1 if train_on_input else len(prompt)
    return Example(prompt + answer, [IGNORE_INDEX] * ignored + prompt[ignored:] + answer, len(prompt))
