"""Chat templates: a conversation as tokens, and which of them the assistant is to learn.

Special tokens are those of the tokenizer, by name; their spelling inside a message is ordinary text.
"""

from dataclasses import dataclass
from typing import Any

from llama.tokenizer import Tokenizer
from moa.reading import short_repr

ALPACA = "alpaca"  # the paper's: one instruction, one answer (`llama.data.format_prompt`)
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
Message = tuple[str, str]  # role, text


@dataclass(frozen=True)
class ChatTemplate:
    """A turn is: `start` role `header_end` `gap` text `end` `after`; start, header_end and end are special tokens.

    answer_prefix: text before the last answer that belongs to the prompt. strip: messages lose outer white space.
    """

    start: str
    header_end: str
    gap: str
    end: str
    after: str
    answer_prefix: str = ""
    strip: bool = False


CHAT_TEMPLATES = {
    "llama3": ChatTemplate("<|start_header_id|>", "<|end_header_id|>", "\n\n", "<|eot_id|>", "", strip=True),
    "chatml": ChatTemplate("<|im_start|>", "", "\n", "<|im_end|>", "\n"),
    # Without thinking, as its own template writes it then
    "qwen3": ChatTemplate("<|im_start|>", "", "\n", "<|im_end|>", "\n", answer_prefix="<think>\n\n</think>\n\n"),
}
TEMPLATES = (ALPACA, *CHAT_TEMPLATES)


def prompt_fields(template: str) -> tuple[str, ...]:
    """The text fields that every row to answer has; a chat's are checked by `messages_of`."""
    return ("instruction", "input") if template == ALPACA else ()


def messages_of(row: dict[str, Any], with_answer: bool) -> list[Message]:
    """The messages of a row of `messages` (role, content), `conversations` (from, value), or Alpaca's fields.

    with_answer: the last message must be the assistant's; otherwise a last answer is left out. ValueError names what is
    wrong with the row.
    """
    for field, role_key, text_key in (("messages", "role", "content"), ("conversations", "from", "value")):
        if field in row:
            messages = _read_messages(row[field], field, role_key, text_key)
            break
    else:
        fields = ("instruction", "input", "output") if with_answer else ("instruction", "input")
        for field in fields:
            if not isinstance(row.get(field), str):
                raise ValueError(f"field {field!r} is missing or no text (a chat has 'messages' or 'conversations')")
        text = row["instruction"] + (f"\n\n{row['input']}" if row["input"] else "")
        messages = [("user", text), *([("assistant", row["output"])] if with_answer else [])]
    if not with_answer and messages[-1][0] == "assistant":
        messages = messages[:-1]
    expected = "assistant" if with_answer else "user"
    if not messages or messages[-1][0] != expected:
        raise ValueError(f"the last message must be the {expected}'s")
    return messages


def _read_messages(value: Any, field: str, role_key: str, text_key: str) -> list[Message]:
    problem = (
        f"field {field!r} must be a list of objects with {role_key!r} ({', '.join(ROLES)}) and {text_key!r}, a text"
    )
    if not isinstance(value, list) or not value:
        raise ValueError(problem)
    messages = []
    for number, message in enumerate(value, 1):
        role = message.get(role_key) if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES or not isinstance(message.get(text_key), str):
            raise ValueError(f"{problem}; message {number} is {short_repr(message)}")
        messages.append((ROLES[role], message[text_key]))
    return messages


def require_template(tokenizer: Tokenizer, name: str) -> None:
    """ValueError naming the special token of a template that the tokenizer lacks."""
    if name in CHAT_TEMPLATES:
        template, known = CHAT_TEMPLATES[name], tokenizer.rules.special_tokens | tokenizer.rules.added_tokens
        for token in filter(None, (template.start, template.header_end, template.end)):
            if token not in known:
                raise ValueError(f"--template {name} needs the token {token}, which this model's tokenizer lacks")


def encode_chat(
    tokenizer: Tokenizer, name: str, messages: list[Message], open_answer: bool = False
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether it is the assistant's: its text and the token that ends it.

    open_answer: the header of an answer follows, for generation.
    """
    template = CHAT_TEMPLATES[name]
    special = tokenizer.rules.special_tokens | tokenizer.rules.added_tokens
    ids: list[int] = []
    learned: list[bool] = []

    def add(tokens: list[int], is_answer: bool = False) -> None:
        ids.extend(tokens)
        learned.extend([is_answer] * len(tokens))

    def header(role: str) -> str:
        """Add what stands before a message's text -> the part of it that is encoded together with the text."""
        add([special[template.start]])
        if not template.header_end:
            return role + template.gap
        add([*tokenizer.encode(role), special[template.header_end]])
        return template.gap

    if tokenizer.bos_id is not None and name == "llama3":
        add([tokenizer.bos_id])
    for number, (role, text) in enumerate(messages, 1):
        text, lead = text.strip() if template.strip else text, header(role)
        if role == "assistant":
            prefix = template.answer_prefix if number == len(messages) else ""
            add(tokenizer.encode(lead + prefix))
            # As Qwen3's own template has it behind its prefix
            add([*tokenizer.encode(text.lstrip("\n") if prefix else text), special[template.end]], is_answer=True)
        else:
            add([*tokenizer.encode(lead + text), special[template.end]])
        add(tokenizer.encode(template.after))
    if open_answer:
        add(tokenizer.encode(header("assistant") + template.answer_prefix))
    return ids, learned
