"""A tokenizer in Qwen3's form, trained here: transformers' own ids on 2,000 strings of many scripts, through both
converters; chats as its template writes them."""

import json
import random
import unicodedata

import gguf
import pytest
from tokenizers import AddedToken, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from convert.__main__ import main
from convert_samples import as_gguf, write_gguf, write_hf
from llama.data import encode_example, encode_prompt
from llama.tokenizer import Tokenizer

# Of the published tokenizer.json, in the order of their ids
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIAL += [f"<|{kind}_{side}|>" for kind in ("object_ref", "box", "quad", "vision") for side in ("start", "end")]
SPECIAL += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
ADDED = ["<tool_call>", "</tool_call>", *(f"<|fim_{part}|>" for part in ("prefix", "middle", "suffix", "pad"))]
ADDED += ["<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
UNNAMED_ROWS = 267  # of the published embeddings, 151,936 rows for 151,669 tokens

# First and last letters
SCRIPTS = {
    **{"latin": "az", "capitals": "AZ", "accented": "À\u024f", "greek": "Αω", "cyrillic": "Ая", "armenian": "Աև"},
    **{"hebrew": "את", "arabic": "ءي", "devanagari": "अ्", "bengali": "অহ", "tamil": "அஹ", "thai": "กฺ"},
    **{"tibetan": "ཀཬ", "georgian": "აჰ", "ethiopic": "ሀቈ", "cherokee": "Ꭰᏼ", "khmer": "កឳ", "mongolian": "ᠠᡂ"},
    **{"jamo": "\u1100\u11c2", "hangul": "가깋", "hiragana": "ぁゖ", "katakana": "ァヺ", "han": "一丿"},
    **{"deseret": "\U00010400\U0001044f", "cuneiform": "\U00012000\U00012060", "han beyond": "\U00020000\U00020040"},
}
ODDITIES = [
    *("'s", "'LL", "’re", "it's", "I'M", "x = 3.14;", "(a+b)*c", "http://a.b/c?d=e&f", "--flag", "#tag", "…", "«»"),
    *("0", "12", "2024", "1,000,000", "٣٤٥", "१२३", "๑๒๓", "１２", "Ⅷ", "½", "²³", "①", "1️⃣", "3rd"),
    *(" ", "  ", "\t", "\n", "\r\n", "\n\n", " \n ", "\x0b", "\u0085"),
    *("\u00a0", "\u2003", "\u3000", "\u2028", "\u200b", "\ufeff"),
    *("e\u0301", "\u0301", "a\u0323\u0307", "a\u0307\u0323", "n\u0303", "ñ", "ﬁ"),
    *("\u1100\u1161\u11a8", "\u212b", "\u2126", "\u0958"),
    *("😀", "👩\u200d👩\u200d👧", "👍🏽", "🇩🇪", "❤️", "🏴\U000e0067\U000e007f", "\U0001f9d1\u200d🚀"),
    *("\x00", "\x1c", "\x7f", "\ue000", "\ufffd", "\U0010ffff"),
    *("<|im_end", "<think", "think>", "<|im_sTart|>", "<tool_call", "<|fim_"),
]  # fmt: skip


def sentences(seed: int, count: int, names: list[str]) -> list[str]:
    """Strings of words of one script or several, with oddities among them, and tokens by name."""
    generator, lexicon = random.Random(seed), random.Random(0)
    words: dict[str, list[str]] = {}
    for script, (first, last) in SCRIPTS.items():
        # Assigned ones: of others each library's version of Unicode has its own opinion
        letters = [c for c in map(chr, range(ord(first), ord(last) + 1)) if unicodedata.category(c) != "Cn"]
        words[script] = ["".join(lexicon.choices(letters, k=lexicon.randint(1, 7))) for _ in range(80)]
    texts = []
    for _ in range(count):
        pieces, scripts = [], generator.sample([*SCRIPTS], generator.randint(1, 3))
        for _ in range(generator.randint(1, 14)):
            kind = generator.random()
            if kind < 0.6:
                pieces.append(generator.choice(words[generator.choice(scripts)]))
            else:
                pieces.append(generator.choice(names if kind > 0.92 and names else ODDITIES))
        texts.append("".join(piece + generator.choice(("", " ", " ", "\n")) for piece in pieces))
    return texts


def trained() -> Qwen2Tokenizer:
    """Thousands of merges under transformers' own normaliser and splitting rule for Qwen, and Qwen3's named tokens."""
    empty = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, show_progress=False)
    empty.train_from_iterator(sentences(1, 3000, []), trainer)
    model = json.loads(empty.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]])
    for names, special in ((SPECIAL, True), (ADDED, False)):
        tokenizer.add_tokens([AddedToken(name, normalized=False, special=special) for name in names])
    tokenizer.eos_token = "<|im_end|>"
    return tokenizer


@pytest.fixture(scope="module")
def theirs() -> Qwen2Tokenizer:
    return trained()


@pytest.fixture(scope="module", params=["hf", "gguf"])
def ours(request: pytest.FixtureRequest, theirs: Qwen2Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The tokenizer of a Qwen3 that `python -m convert` has read."""
    folder, n_tokens = tmp_path_factory.mktemp(request.param), len(theirs)
    source, end = folder / "hf", theirs.convert_tokens_to_ids("<|im_end|>")
    sizes = {"vocab_size": n_tokens + UNNAMED_ROWS, "eos_token_id": end, "num_hidden_layers": 1}
    model = write_hf(source, "qwen", qwen3=True, **sizes)
    if request.param == "hf":
        theirs.save_pretrained(source)
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, end - 2]}))
    else:
        source = folder / "model.gguf"
        numbers = {f"qwen3.attention.{name}_length": model.config.head_dim for name in ("key", "value")}
        write_gguf(
            source, as_gguf(model), None, "qwen3", metadata=numbers, add_tokenizer=lambda w: add_tokenizer(w, theirs)
        )
    main([request.param, "--input", str(source), "--output_dir", str(folder / "meta")])
    return Tokenizer(folder / "meta" / "tokenizer.model")


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Qwen2Tokenizer) -> None:
    """As llama.cpp's converter does, which names the rows that have no token."""
    kinds = dict.fromkeys(SPECIAL, gguf.TokenType.CONTROL) | dict.fromkeys(ADDED, gguf.TokenType.USER_DEFINED)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    padding = [f"[PAD{len(tokens) + i}]" for i in range(UNNAMED_ROWS)]
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens + padding)
    unused = [gguf.TokenType.UNUSED] * UNNAMED_ROWS
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens] + unused)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    writer.add_add_bos_token(False)


def test_ids_of_strings_of_many_scripts(ours: Tokenizer, theirs: Qwen2Tokenizer) -> None:
    texts = sentences(2, 2000, SPECIAL + ADDED)
    # The spelling of a special token in a text is text; other added tokens are read from it
    expected = theirs(texts, split_special_tokens=True)["input_ids"]
    for text, ids in zip(texts, expected, strict=True):
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == theirs.decode(ids) == unicodedata.normalize("NFC", text), repr(text)
    assert sum(map(len, texts)) > 1.2 * sum(map(len, expected))  # merged
    assert {i for ids in expected for i in ids} > set(theirs.convert_tokens_to_ids(ADDED))


def test_named_tokens_and_ends(ours: Tokenizer, theirs: Qwen2Tokenizer) -> None:
    ids = theirs.get_added_vocab()
    assert ours.rules.added_tokens == {name: ids[name] for name in ADDED}
    assert {name: ours.rules.special_tokens[name] for name in SPECIAL} == {name: ids[name] for name in SPECIAL}
    assert (ours.bos_id, ours.eos_id) == (None, ids["<|im_end|>"]) and ours.n_words == len(theirs) + UNNAMED_ROWS
    assert ours.stop_ids == (ids["<|endoftext|>"], ids["<|im_end|>"])
    for name in SPECIAL + ADDED:
        assert ours.decode([ids[name]]) == name


def test_chats_are_written_as_the_template_of_qwen3_does(ours: Tokenizer, theirs: Qwen2Tokenizer) -> None:
    """Without thinking. An answer that begins with white space would be cut elsewhere: its first token is its own."""
    texts = iter(sentences(3, 600, ADDED[:-2]))
    for system, user, first, follow_up, answer in zip(*[texts] * 5, strict=True):
        first, answer = first.lstrip(), "\n" + answer.lstrip()
        chat = [("system", system), ("user", user), ("assistant", first), ("user", follow_up), ("assistant", answer)]
        row = {"messages": [{"role": role, "content": text} for role, text in chat]}
        turns = [f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in chat[:-1]]
        prompt = "".join(turns) + "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        assert encode_prompt(ours, row, 10**6, "qwen3") == theirs(prompt)["input_ids"], repr(prompt)
        whole = prompt + answer.lstrip("\n") + "<|im_end|>\n"
        assert encode_example(ours, row, 10**6, template="qwen3").tokens == theirs(whole)["input_ids"], repr(whole)
