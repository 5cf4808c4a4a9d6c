"""Tokenizers of Hugging Face folders and GGUF files: the same ids as there, every end of answers, or a refusal by name.

The tokenizers are small, trained here by Hugging Face's own `tokenizers`, which also say what is right.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as HfTokenizer

from convert import hf, vocabulary
from convert.vocabulary import QWEN2_SPLIT, Vocabulary
from convert_samples import write_hf
from llama import Llama
from llama.tokenizer import LLAMA3_SPLIT, Tokenizer, llama3_rules, special_tokens

TEXTS = [
    "The cat's 12 kittens weren't there in 2024, were they?  They'LL come at 7:30!\n\n\tif x == 100000:\r\n\t\tx = 3.1",
    "Größe, naïve café, cafe\u0301; ½ Ⅷ ²³; Ελληνικά 123; Привет, мир! 2024 год",
    "中文字符測試 四五六。日本語のテキスト、カタカナ 한국어 텍스트 ไทย ๑๒๓",
    "مرحبا بالعالم ٣٤٥ עברית 456 हिन्दी में १२३",
    "🎉🎊👩\u200d👩\u200d👧 1️⃣ a\u00a0b\u2003c\u3000d \u0085 \u2028 x\x00\x1c\x1f",
    "<|eot_id|> <think>ab</think> is text in a text, <|im_end|> too",
]


def byte_level(use_regex: bool) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def by_regex(*patterns: str | Regex, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    steps = [pre_tokenizers.Split(pattern, behavior, invert) for pattern in patterns]
    return pre_tokenizers.Sequence([*steps, byte_level(False)])


SPLITS = {
    "llama3": by_regex(Regex(LLAMA3_SPLIT)),
    "gpt2": byte_level(True),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), byte_level(True)]),
    "numbers": pre_tokenizers.Sequence([pre_tokenizers.Digits(False), byte_level(True)]),
    "qwen2": by_regex(Regex(QWEN2_SPLIT)),
    "gpt4": by_regex(Regex(LLAMA3_SPLIT), behavior="removed", invert=True),
    "deepseek": by_regex(Regex("[\r\n]"), Regex(r"\s?\p{L}+"), Regex(r"\s?\p{P}+"), Regex(r"\p{N}")),
    "spaces": by_regex(" "),
    "none": byte_level(False),
}


def trained(split: str = "llama3", size: int = 420) -> HfTokenizer:
    """A byte-level BPE trained on the texts under a splitting rule."""
    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = SPLITS[split], decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    return tokenizer


def write(folder: Path, tokenizer: HfTokenizer, edit=None, **files: dict[str, Any]) -> Path:
    """A folder with a tokenizer.json, `edit`ed, and other JSON files by their names."""
    content = json.loads(tokenizer.to_str())
    if edit is not None:
        edit(content)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    for name, values in files.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def convert(folder: Path, rows: int | None = None) -> tuple[Vocabulary, Tokenizer, HfTokenizer]:
    """A folder's tokenizer: converted, as this project reads the result, and as `tokenizers` reads the source."""
    theirs = HfTokenizer.from_file(str(folder / "tokenizer.json"))
    result = vocabulary.from_hf(folder, rows or theirs.get_vocab_size())
    (folder / "tokenizer.model").write_bytes(result.file())
    return result, Tokenizer(folder / "tokenizer.model"), theirs


def with_specials(tokenizer: HfTokenizer, names: list[str]) -> HfTokenizer:
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """For each splitting rule, the converted tokenizer and the source's."""
    root = tmp_path_factory.mktemp("splits")
    folders = {split: write(root / split, with_specials(trained(split), ["<|endoftext|>"])) for split in SPLITS}
    made = {split: convert(folder)[1:] for split, folder in folders.items()}
    for _, theirs in made.values():
        theirs.encode_special_tokens = True  # their spelling in a text is text
    return made


@pytest.mark.parametrize("split", SPLITS)
def test_ids_are_those_of_the_source(split, pairs):
    ours, theirs = pairs[split]
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text


@settings(deadline=None)
@given(text=st.text(max_size=60) | st.text(st.sampled_from("ab1 '\n.é٣中"), max_size=60))
def test_ids_of_any_text_are_those_of_the_source(text, pairs):
    for split, (ours, theirs) in pairs.items():
        assert ours.encode(text) == theirs.encode(text).ids, split


def test_a_normalizer_and_tokens_read_whole_are_kept(tmp_path):
    source = with_specials(trained("qwen2"), ["<|endoftext|>"])
    source.normalizer = normalizers.Sequence([normalizers.NFC()])
    source.add_tokens([AddedToken(name, normalized=False) for name in ("<think>", "<think>ab", "  ")])
    _, ours, theirs = convert(write(tmp_path / "t", source))
    for text in (*TEXTS, "<think>", "<think>abc<thin", "cafe\u0301<think>   e\u0301"):
        assert ours.encode(text) == theirs.encode(text).ids
    assert ours.decode(ours.encode("<think>e\u0301")) == "<think>\xe9"


def test_bytes_and_rows_without_a_token_are_counted(tmp_path):
    source = with_specials(trained("smollm"), ["<|endoftext|>"])

    def edit(content):
        for token in ("\u0104", "\xf1"):  # bytes 0x04 and 0xF1
            del content["model"]["vocab"][token]

    result, ours, theirs = convert(write(tmp_path / "t", source, edit), rows=500)
    assert "2 bytes have no token" in result.notes[0] and "(0x04, 0xf1)" in result.notes[0]
    assert result.notes[1] == "81 rows of the embedding belong to no token"
    assert ours.encode("a\x04b \x04 1") == theirs.encode("a\x04b \x04 1").ids
    assert ours.decode(ours.encode("a\x04b")) == "ab" and ours.decode([499]) == "<|unused_token_499|>"
    assert ours.n_words == 500


def llama3(folder: Path, names: list[str], **files: dict[str, Any]) -> Path:
    return write(folder, with_specials(trained("llama3"), names), **files)


META = {"generation_config": {"eos_token_id": [421, 428, 429]}, "tokenizer_config": {"eos_token": "<|eot_id|>"}}
RESERVED = [f"<|reserved_special_token_{k}|>" for k in range(251)]  # LLaMA-3.0 numbers them otherwise
LLAMA30 = [*special_tokens()[:4], *RESERVED[2:4], *special_tokens()[6:8], RESERVED[4], "<|eot_id|>", *RESERVED[5:]]


@pytest.mark.parametrize("files", [META, {}, {"config": {"eos_token_id": 421}}])
@pytest.mark.parametrize("names", [special_tokens(), LLAMA30], ids=["3.1", "3.0"])
def test_llama3_is_metas_plain_file(names, files, tmp_path):
    result, ours, _ = convert(llama3(tmp_path / "t", names, **files))
    assert result.notes == [] and ours.rules == llama3_rules(420)
    assert (tmp_path / "t" / "tokenizer.model").read_bytes().startswith(b"IQ== 0\n")
    assert (ours.bos_id, ours.eos_id, ours.stop_ids) == (420, 421, (421, 428, 429))


def renamed(*changes: tuple[int, str]) -> list[str]:
    names = special_tokens()
    for k, name in changes:
        names[k] = name
    return names


CHATML = renamed((40, "<|im_end|>"))
R1 = renamed((0, "<｜begin▁of▁sentence｜>"), (1, "<｜end▁of▁sentence｜>"))
OTHERS = ["<s>", "</s>", *(f"<x{i}>" for i in range(254))]


@pytest.mark.parametrize(
    ("names", "files", "bos", "eos", "stops"),
    [
        # Fine-tunes that end in a reserved token of LLaMA-3: answers are learned to end as published, and end at both
        (CHATML, {"generation_config": {"eos_token_id": 460}}, 420, 421, (421, 428, 429, 460)),
        (CHATML, {"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}}, 420, 421, (421, 428, 429, 460)),
        # LLaMA-3's ids by other names
        (R1, {"tokenizer_config": {"eos_token": R1[1], "bos_token": R1[0], "add_bos_token": True}}, 420, 421, ...),
        (R1, {"config": {"eos_token_id": 421}}, None, 421, ...),
        (OTHERS, {"tokenizer_config": {"eos_token": "</s>"}}, None, 421, (421,)),
        (OTHERS, {"config": {"eos_token_id": [422, 421]}}, None, 421, (421, 422)),
        # Other vocabularies: what is declared first is learned
        (["<|im_end|>", "<|endoftext|>"], {"config": {"eos_token_id": 421}}, None, 421, (420, 421)),
        (["<end>", "</s>"], {"generation_config": {"eos_token_id": [421, 420]}}, None, 421, (420, 421)),
        (["<end>", "<|endoftext|>"], {}, None, 421, (421,)),
    ],
)
def test_ends_are_those_that_the_files_declare(names, files, bos, eos, stops, tmp_path):
    _, ours, theirs = convert(llama3(tmp_path / "t", names, **files))
    stops = (421, 428, 429) if stops is ... else stops
    assert (ours.bos_id, ours.eos_id, ours.stop_ids) == (bos, eos, stops)
    assert ours.decode([*ours.stop_ids]) == "".join(map(theirs.id_to_token, stops))


def test_the_first_token_is_what_the_sources_tokenizer_puts_there(tmp_path):
    source = with_specials(trained("gpt2"), ["<s>", "</s>"])
    source.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 420)])
    files = {"config": {"eos_token_id": 421}}
    _, ours, theirs = convert(write(tmp_path / "t", source, **files))
    assert ours.encode("Hello", bos=True) == theirs.encode("Hello").ids == [420, *ours.encode("Hello")]
    source.post_processor = processors.ByteLevel()
    _, ours, theirs = convert(write(tmp_path / "t", source, **files))
    assert ours.encode("Hello", bos=True) == theirs.encode("Hello").ids
    files["tokenizer_config"] = {"bos_token": "<begin>", "add_bos_token": True}
    with pytest.raises(ValueError, match="the first token of texts, '<begin>', is no special token"):
        convert(write(tmp_path / "t", source, **files))


@pytest.mark.parametrize("declared", [35, 9999, [421, 35]])
def test_a_declared_end_that_will_not_stop_is_named(declared, tmp_path):
    result, ours, _ = convert(llama3(tmp_path / "t", special_tokens(), config={"eos_token_id": declared}))
    number = 9999 if declared == 9999 else 35
    assert result.notes == [f"config.json declares the end {number}, at which no answer ends: it is no special token"]
    assert ours.stop_ids == (421, 428, 429)


def test_answers_end_where_transformers_ends_them(tmp_path):
    model, end = write_hf(tmp_path / "hf", "llama3"), 300  # a reserved special token
    prompt = torch.tensor([[260, *b"Count to three."]])
    mask = torch.ones_like(prompt)
    third = int(model.generate(prompt, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=-1)[0, -1])
    for weight in (model.lm_head.weight.data, model.model.embed_tokens.weight.data):
        weight[[end, third]] = weight[[third, end]].clone()
    model.generation_config.eos_token_id = [261, end]
    model.save_pretrained(tmp_path / "hf")
    theirs = model.generate(prompt, attention_mask=mask, max_new_tokens=9, do_sample=False)[0, prompt.shape[1] :]
    assert theirs[-1] == end and 1 <= len(theirs) <= 3
    hf.convert(tmp_path / "hf", tmp_path / "meta", dtype="fp32")
    assert Llama.build(tmp_path / "meta", device="cpu").generate(prompt.tolist(), 9) == [theirs[:-1].tolist()]


# --- refusals ---


def model(**changes: Any):
    return lambda content: content["model"].update(changes)


def vocab(token: str, number: int):
    return lambda content: content["model"]["vocab"].update({token: number})


def added(**changes: Any):
    return lambda content: content["added_tokens"][0].update(changes)


def merges(change):
    return lambda content: change(content["model"]["merges"])


def other_pair(content: dict[str, Any]) -> None:
    """A token of three bytes made by a merge that comes too late for its text."""
    content["model"]["vocab"] |= {"qz": 421, "zq": 422, "qzq": 423}
    content["model"]["merges"] += [["q", "z"], ["z", "q"], ["q", "zq"]]


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
REFUSED = {
    "unigram": (model(type="Unigram"), "not SentencePiece's Unigram"),
    "sentencepiece": (model(byte_fallback=True), "not SentencePiece's BPE"),
    "other model": (model(type="WordPiece"), "only byte-level BPE tokenizers can be converted, not WordPiece"),
    "dropout": (model(dropout=0.1), "dropout = 0.1 has no counterpart here"),
    "not byte-level": (vocab("▁the", 421), "token '▁the' is not in the byte-level alphabet"),
    "too many tokens": (vocab("qz", 422), "has 423 tokens, but the embedding has 422 rows"),
    "an id twice": (vocab("qz", 300), "ids of tokens must be 0 and more, none twice"),
    "no number": (vocab("qz", "300"), "not a tokenizer.json .TypeError"),
    "a name twice": (
        lambda c: c["added_tokens"].append(c["added_tokens"][0] | {"id": 421, "special": False}),
        "token '<.endoftext.>' is there both as a special one and as one that is read",
    ),
    "merge of no token": (merges(lambda m: m.append(["q", "z"])), "the merge 'q' and 'z' makes a token"),
    "merge order": (merges(lambda m: m.append(m.pop(0))), r"\(id 257\) is merged|\(id 256\) is merged after id 419"),
    "merge missing": (merges(lambda m: m.pop(0)), "are not merged to token 256; tiktoken would do it"),
    "orphan": (vocab("hello", 421), r"no merges make 'hello' \(id 421\); tiktoken would take it whole"),
    "merge of another pair": (other_pair, "'qz' and 'q' are not merged to token 423; tiktoken would do it"),
    "lowercase": (lambda c: c.update(normalizer={"type": "Lowercase"}), "the normalizer Lowercase has no counterpart"),
    "prefix space": (
        lambda c: c.update(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True}),
        "add_prefix_space = True has no counterpart",
    ),
    "no byte level": (
        lambda c: c.update(pre_tokenizer={"type": "Whitespace"}),
        "must end in ByteLevel, not Whitespace",
    ),
    "metaspace": (lambda c: c.update(pre_tokenizer=None), "must end in ByteLevel, not None"),
    "merged with previous": (
        lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="MergedWithPrevious"),
        "the pre-tokenizer {'type': 'Split'",
    ),
    "stripping token": (
        added(special=False, lstrip=True),
        "lstrip = True of the added token '<.endoftext.>' has no counterpart",
    ),
    "no end": (added(content="<s>"), "no end of answers is declared, and there is none of"),
    "no model": (lambda c: c.pop("model"), "not a tokenizer.json .KeyError"),
    "a list": (lambda c: c.update(added_tokens=["x"]), "not a tokenizer.json .TypeError"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rules_that_cannot_be_kept_are_refused_by_name(case, tmp_path):
    edit, message = REFUSED[case]
    folder = write(tmp_path / "t", with_specials(trained(), ["<|endoftext|>"]), edit)
    with pytest.raises(ValueError, match=message) as error:
        vocabulary.from_hf(folder, 424 if case == "merge of another pair" else 422)
    assert str(error.value).startswith(f"{folder / 'tokenizer.json'}: ") and "\n" not in str(error.value)


def test_a_token_without_merges_is_taken_whole_where_the_source_does(tmp_path):
    def edit(content):
        content["model"]["vocab"]["hello"] = 421
        content["model"]["ignore_merges"] = True

    _, ours, theirs = convert(write(tmp_path / "t", with_specials(trained(), ["<|endoftext|>"]), edit))
    for text in ("hello", " hello", "hellox", "x hello"):
        assert ours.encode(text) == theirs.encode(text).ids
    assert ours.encode("hello") == [421]


def test_a_folder_without_tokenizer_json_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00")
    with pytest.raises(ValueError, match="tokenizer.json: no such file .*SentencePiece"):
        vocabulary.from_hf(tmp_path, 32000)


# --- GGUF ---


def gguf(source: HfTokenizer, pre: str = "llama-bpe", kinds: dict[str, int] | None = None, **others: Any) -> dict:
    """The metadata that llama.cpp's converter makes of a tokenizer; `others` under tokenizer.ggml."""
    content = json.loads(source.to_str())
    specials = {token["content"] for token in content["added_tokens"]}
    tokens = [source.id_to_token(i) for i in range(source.get_vocab_size())]
    values = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [(kinds or {}).get(token, 3 if token in specials else 1) for token in tokens],
        "merges": [" ".join(merge) for merge in content["model"]["merges"]],
        **others,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def from_gguf(metadata: dict, folder: Path) -> tuple[Vocabulary, Tokenizer]:
    result = vocabulary.from_gguf(metadata, len(metadata["tokenizer.ggml.tokens"]))
    (folder / "tokenizer.model").write_bytes(result.file())
    return result, Tokenizer(folder / "tokenizer.model")


@pytest.mark.parametrize("pre", ["llama-bpe", "smollm", "gpt-2", "qwen2"])
def test_gguf_and_hugging_face_agree(pre, tmp_path):
    split = {"llama-bpe": "llama3", "gpt-2": "gpt2"}.get(pre, pre)
    source = with_specials(trained(split), special_tokens() if pre == "llama-bpe" else ["<|endoftext|>"])
    source.add_tokens([AddedToken("<think>", normalized=False)])
    if pre == "qwen2":
        source.normalizer = normalizers.NFC()
    if pre == "llama-bpe":
        begin = ("<|begin_of_text|>", 420)
        source.post_processor = processors.TemplateProcessing(single=f"{begin[0]} $A", special_tokens=[begin])
    folder = write(tmp_path, source, lambda c: c["model"].update(ignore_merges=pre == "llama-bpe"))
    theirs, _, _ = convert(folder)
    ours, _ = from_gguf(gguf(source, pre, kinds={"<think>": 4}, bos_token_id=420), tmp_path)
    assert ours == theirs and ours.rules.added_tokens == {"<think>": source.get_vocab_size() - 1}


def test_gguf_keeps_every_kind_of_token(tmp_path):
    names = renamed((5, "<tool_call>"), (40, "<|im_end|>"))
    source = with_specials(trained("llama3"), names)
    kinds = {"<tool_call>": 4, special_tokens()[50]: 5, special_tokens()[51]: 2}
    result, ours = from_gguf(gguf(source, kinds=kinds, eos_token_id=460, eot_token_id=429), tmp_path)
    assert result.notes == [] and ours.n_words == 676 and ours.stop_ids == (421, 428, 429, 460)
    assert ours.encode("a<tool_call>b") == [*ours.encode("a"), 425, *ours.encode("b")]
    begin, *text, end = ours.encode("<|im_end|>", bos=True, eos=True)
    assert (begin, end) == (420, 421) and max(text) < 420
    assert [ours.decode([420 + k]) for k in range(256)] == names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, "tokenizer.ggml.model is SentencePiece"),
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre, the splitting rule, is 'tekken', expected one of llama-bpe, gpt-2"),
        ({"add_space_prefix": True}, "add_space_prefix = True has no counterpart"),
        ({"token_type": [1, 1]}, "tokenizer.ggml.tokens but 2 tokenizer.ggml.token_type"),
        ({"token_type": [6] * 421}, r"token '!' \(id 0\) has type 6, which is not known"),
    ],
)
def test_bad_gguf_tokenizers(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        from_gguf(gguf(with_specials(trained("gpt2"), ["<|endoftext|>"]), **({"pre": "gpt-2"} | changes)), tmp_path)
