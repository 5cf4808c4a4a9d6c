"""Chats as tokens: ids and masks are those of transformers' chat templates; the assistant's turns alone are learned."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from commands import refused, run, script, train_flags
from convert import vocabulary
from convert_samples import STYLES, write_tokenizer_json
from llama.data import IGNORE_INDEX, encode_example, encode_prompt
from llama.templates import messages_of
from llama.tokenizer import Tokenizer
from tiny import BASE

# As their publishers write them, with the marks of what the assistant says
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}PREFIX"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\nTHINK' }}{% endif %}"
)
THINK = "<think>\\n\\n</think>\\n\\n"
SOURCES = {
    "chatml": ("qwen", CHATML.replace("PREFIX", "").replace("THINK", "")),
    "qwen3": (
        "qwen",
        CHATML.replace("PREFIX", f"{{% if loop.last %}}{{{{ '{THINK}' }}}}{{% endif %}}").replace("THINK", THINK),
    ),
    "llama3": (
        "llama3",
        "{{ '<|begin_of_text|>' }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
    ),
}
CHATS = [
    [("user", "How much is 1 + 2?"), ("assistant", "It is 3.")],
    [
        ("system", "Be brief.\n\nAlways."),
        ("user", "Größe?"),
        ("assistant", "日本語 12"),
        ("user", "and"),
        ("assistant", "no"),
    ],
]


@pytest.fixture(scope="module", params=SOURCES)
def pair(request, tmp_path_factory) -> tuple[str, Tokenizer, PreTrainedTokenizerFast]:
    style, source = SOURCES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    write_tokenizer_json(folder, STYLES[style])
    tokens, _ = STYLES[style].vocabulary()
    (folder / "config.json").write_text(
        json.dumps({"eos_token_id": tokens.index(STYLES[style].special[STYLES[style].end])})
    )
    (folder / "tokenizer.model").write_bytes(vocabulary.from_hf(folder, len(tokens)).file())
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), chat_template=source)
    return request.param, Tokenizer(folder / "tokenizer.model"), theirs


def row_of(chat: list[tuple[str, str]]) -> dict:
    return {"messages": [{"role": role, "content": text} for role, text in chat]}


@pytest.mark.parametrize("chat", CHATS)
def test_ids_and_masks_are_those_of_transformers(chat, pair) -> None:
    name, tokenizer, theirs = pair
    expected = theirs.apply_chat_template(
        row_of(chat)["messages"], return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    example = encode_example(tokenizer, row_of(chat), 300, template=name)
    assert example.tokens == expected["input_ids"]
    assert [label != IGNORE_INDEX for label in example.labels] == [bool(m) for m in expected["assistant_masks"]]
    assert all(label in (token, IGNORE_INDEX) for token, label in zip(example.tokens, example.labels, strict=True))
    assert example.prompt_len == expected["assistant_masks"].index(1)
    prompt = theirs.apply_chat_template(row_of(chat[:-1])["messages"], add_generation_prompt=True, return_dict=True)
    assert (
        encode_prompt(tokenizer, row_of(chat), 300, name)
        == prompt["input_ids"]
        == example.tokens[: len(prompt["input_ids"])]
    )


def test_other_spellings_of_a_chat(pair) -> None:
    name, tokenizer, _ = pair
    share_gpt = {"conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}]}
    alpaca = {"instruction": "a b", "input": "", "output": "c"}
    expected = encode_example(tokenizer, row_of([("user", "a b"), ("assistant", "c")]), 300, template=name)
    assert encode_example(tokenizer, share_gpt, 300, template=name) == expected
    assert encode_example(tokenizer, alpaca, 300, template=name) == expected
    assert encode_example(tokenizer, share_gpt, len(expected.tokens) - 1, template=name) is None
    everything = encode_example(tokenizer, share_gpt, 300, train_on_input=True, template=name)
    assert everything.labels == [IGNORE_INDEX, *everything.tokens[1:]]


def test_the_spelling_of_a_special_token_in_a_message_is_text(pair) -> None:
    name, tokenizer, _ = pair
    end = "<|eot_id|>" if name == "llama3" else "<|im_end|>"
    example = encode_example(tokenizer, row_of([("user", f"a{end}b"), ("assistant", "c")]), 300, template=name)
    end_id = (tokenizer.rules.special_tokens | tokenizer.rules.added_tokens)[end]
    assert example.tokens.count(end_id) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": []}, "field 'messages' must be a list of objects with 'role'"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 1 is {'role': 'robot'"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 1 is"),
        ({"conversations": [{"from": "human", "value": "x"}]}, "the last message must be the assistant's"),
        ({"instruction": "x"}, "field 'input' is missing"),
    ],
)
def test_bad_rows_are_named(row, message) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        messages_of(row, with_answer=True)


def test_a_chat_is_trained_on_and_answered_by_its_template(tmp_path: Path) -> None:
    data, out, answers = tmp_path / "chats.jsonl", tmp_path / "out", tmp_path / "answers.jsonl"
    data.write_text("".join(json.dumps(row_of(chat)) + "\n" for chat in CHATS * 3))
    shape = {"lora_rank": 4, "p_adapter_size": None, "prompt_len": None}
    flags = train_flags(data, out, method="lora", max_steps=2, warmup_epochs=0, **shape)
    refused(run("finetune.py", *flags), "is a chat; give --template llama3 or chatml or qwen3")
    refused(run("finetune.py", *flags, "--template", "chatml"), "--template chatml needs the token <|im_start|>")
    script("finetune.py", *flags, "--template", "llama3")
    script("extract_adapter.py", out)
    assert json.loads((out / "adapter_params.json").read_text())["template"] == "llama3"
    files = ("--ckpt_dir", BASE, "--adapter_path", out, "--data_path", data, "--save_path", answers)
    script("generate.py", *files, "--max_gen_len", 4, "--min_gen_len", 4, "--device", "cpu", "--bf16", False)
    assert len(answers.read_text().splitlines()) == 6
