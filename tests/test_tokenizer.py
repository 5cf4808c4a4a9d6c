"""The tokenizer: ids of the published LLaMA-3 one, text there and back, and files that are none."""

import base64
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostile import damaged, hostile, sentence_of
from llama.tokenizer import LLAMA3_SPLIT, MAX_RUN, Rules, Tokenizer, special_tokens, write_tokenizer

BYTES = Path(__file__).resolve().parent / "golden" / "base" / "tokenizer.model"
SINGLE = [bytes([i]) for i in range(256)]


def write(path: Path, tokens: list[bytes]) -> Path:
    """A tiktoken file whose ranks are the tokens' places."""
    path.write_text("".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)))
    return path


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """256 bytes and the special tokens."""
    return Tokenizer(BYTES)


@settings(deadline=None)
@given(text=st.text())
def test_text_there_and_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == list(text.encode())  # a token per byte
    assert tokenizer.encode(text, bos=True, eos=True) == [256, *ids, 257]
    assert tokenizer.encode(text, bos=True) == [256, *ids] and tokenizer.encode(text, eos=True) == [*ids, 257]


def test_special_ids_follow_the_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.n_words) == (256, 257, 512)
    assert tokenizer.stop_ids == (257, 264, 265)
    larger = Tokenizer(write(tmp_path / "t", [*SINGLE, b"he", b"hel"]))
    assert (larger.bos_id, larger.eos_id, larger.stop_ids, larger.n_words) == (258, 259, (259, 266, 267), 514)
    names = special_tokens()
    assert len(set(names)) == len(names) == 256
    assert names[:2] == ["<|begin_of_text|>", "<|end_of_text|>"]
    assert names[2:6] == [
        "<|reserved_special_token_0|>",
        "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>",
    ] + ["<|reserved_special_token_2|>"]
    assert names[6:11] == ["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]
    assert names[-1] == "<|reserved_special_token_247|>"  # LLaMA-3.1's last
    assert [tokenizer.decode([256 + i]) for i in range(256)] == names


def test_a_special_token_spelled_in_a_text_is_text(tokenizer: Tokenizer) -> None:
    text = "<|eot_id|><|end_of_text|>"
    ids = tokenizer.encode(text)
    assert ids == list(text.encode()) and max(ids) < 256
    assert tokenizer.decode([265, 257]) == text


def test_bytes_that_are_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([0xC3]) == tokenizer.decode([0xFF]) == "\ufffd"
    assert tokenizer.decode([0xC3, 0xA9]) == "é"
    assert tokenizer.decode([]) == "" and tokenizer.encode("") == []


def test_merges_by_rank(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write(tmp_path / "t", [*SINGLE, b"ll", b"he", b"hel", b"llo"]))
    h, e, o = b"heo"
    # "hello": "ll" is merged first, then "he"; "hel" needs the l that "ll" has, "llo" is there
    assert tokenizer.encode("hello") == [257, 259]
    assert tokenizer.encode("hel") == [258]
    assert tokenizer.encode("ehlol") == [e, h, ord("l"), o, ord("l")]


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("1234567", ["123", "456", "7"]),  # numbers in groups of three
        ("it's we'LL", ["it", "'s", " we", "'LL"]),
        ("Hello world", ["Hello", " world"]),  # one leading space belongs to the word
        ("a  b", ["a", " ", " b"]),
        ("(word) x", ["(word", ")", " x"]),
        ("x = 3;\n\ny", ["x", " =", " ", "3", ";\n\n", "y"]),
        ("a \n  \nb", ["a", " \n  \n", "b"]),
        ("été 四五", ["été", " 四五"]),
        ("end   ", ["end", "   "]),
    ],
)
def test_text_is_cut_before_merging(text: str, pieces: list[str], tmp_path: Path) -> None:
    """Every substring of the text is a token here, so each piece becomes one token."""
    raw = text.encode()
    substrings = {raw[i:j] for i in range(len(raw)) for j in range(i + 2, len(raw) + 1)}
    tokenizer = Tokenizer(write(tmp_path / "t", [*SINGLE, *sorted(substrings)]))
    assert [tokenizer.decode([i]) for i in tokenizer.encode(text)] == pieces


@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 1_000_000, "a b" * 200_000, "é" * 60_000 + "\n" * 60_000])
def test_very_long_texts(text: str, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(text)
    assert ids == list(text.encode()) and len(text) > MAX_RUN


def test_length_alone_does_not_change_the_cut(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write(tmp_path / "t", [*SINGLE, b"ab", b" ab"]))
    words = 2 * MAX_RUN  # far beyond the length at which runs are looked for, below that at which any text is cut
    assert tokenizer.encode("ab" + " ab" * words) == [256] + [257] * words


def lines(*extra: bytes, singles: bool = True) -> bytes:
    head = b"".join(base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(SINGLE)) if singles else b""
    return head + b"".join(extra)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "empty"),
        (lines(b"YWI= 256\nYWJj\n"), "line 258 is not 'base64-token rank'"),
        (lines(b"YW? 256\n"), "line 257"),
        (lines(b"YWI= 256 1\n"), "line 257"),
        (lines(b"YWI= 257\n"), "ranks must be 0 to 256, each once"),
        (lines(b"YQ== 256\n"), "ranks must be 0 to 255, each once"),  # the token "a" twice
        (lines(b"YWI= 0\n", singles=False), "256 of the 256 single bytes have no token"),
        (b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02", "SentencePiece"),
    ],
)
def test_files_that_are_no_tokenizer(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        Tokenizer(path)
    assert str(error.value).startswith(f"{path}: ") and words in str(error.value) and "\n" not in str(error.value)


RULES = {
    "vocab_size": 300,
    "split": [r"\p{N}", LLAMA3_SPLIT],
    "special_tokens": {"<end>": 257},
    "bos_id": None,
    "eos_id": 257,
    "stop_ids": [257, 258],
    "added_tokens": {"<t>": 258, "<t>a": 259},
    "normalize": "NFC",
}


def test_rules_in_the_first_line(tmp_path: Path) -> None:
    ids = {bytes([b]): b for b in range(255)} | {b"12": 256}
    (tmp_path / "t").write_bytes(write_tokenizer(ids, Rules(**RULES)))
    tokenizer = Tokenizer(tmp_path / "t")
    assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (300, None, 257, (257, 258))
    assert tokenizer.encode("12", bos=True, eos=True) == [*b"12", 257]  # digits stand alone
    assert tokenizer.encode("<t>ae\u0301<t><end>") == [259, *b"\xc3\xa9", 258, *b"<end>"]
    assert tokenizer.decode([256, 258, 257, 299]) == "12<t><end><|unused_token_299|>"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"vocab_size": 257}, "257 is no id of 257 tokens"),
        ({"split": []}, "split must be a list"),
        ({"split": ["(", "b"]}, "missing )"),
        ({"special_tokens": {"<end>": -1}}, "-1 is no id of 300 tokens"),
        ({"special_tokens": {"<end>": 257, "<fin>": 257}}, "there twice"),
        ({"special_tokens": {"<end>": 7}, "eos_id": 7, "stop_ids": [7]}, "ids of tokens must be 0 to 299, none twice"),
        ({"bos_id": True}, "True is no id"),
        ({"eos_id": 256}, "eos_id must be one of stop_ids"),
        ({"normalize": "lower"}, "normalize one of"),
        ({"lower": True}, "unexpected keyword argument 'lower'"),
    ],
)
def test_damaged_rules_are_named(change: dict, words: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(json.dumps(RULES | change).encode() + b"\n" + lines(b"YWI= 256\n"))
    with pytest.raises(ValueError) as error:
        Tokenizer(path)
    assert str(error.value).startswith(f"{path}: ") and words in str(error.value) and "\n" not in str(error.value)


@hostile(150)
@given(data=st.data())
def test_a_damaged_line_of_rules_is_named_or_still_one(data: st.DataObject, tmp_path: Path) -> None:
    rules, _, tokens = write_tokenizer({bytes([b]): b for b in range(256)}, Rules(**RULES)).partition(b"\n")
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data.draw(damaged(rules)) + b"\n" + tokens)
    sentence_of(lambda: Tokenizer(path).encode("12 <t> e\u0301 \n", eos=True), f"{path}: ")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="tokenizer.model: no such file"):
        Tokenizer(tmp_path / "tokenizer.model")


# The published tokenizer. Its file is not ours to hand on; the package that Meta published it in is downloaded once.

WHEEL = "llama-models==0.3.0"


@pytest.fixture(scope="module")
def published(request) -> Tokenizer:
    folder = Path(request.config.cache.mkdir("llama-models"))
    file = folder / "tokenizer.model"
    if not file.is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
        done = subprocess.run([*command, "--dest", str(folder), WHEEL], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"this test downloads {WHEEL}, which failed: {done.stderr[-500:]}"
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read("llama_models/llama3/tokenizer.model")
        wheel.unlink()
        file.write_bytes(content)
    return Tokenizer(file)


@pytest.mark.e2e
def test_published_ids(published: Tokenizer) -> None:
    assert published.n_words == 128256
    assert (published.bos_id, published.eos_id, published.stop_ids) == (128000, 128001, (128001, 128008, 128009))
    special = published.rules.special_tokens
    assert (special["<|start_header_id|>"], special["<|end_header_id|>"]) == (128006, 128007)
    assert (special["<|eom_id|>"], special["<|python_tag|>"]) == (128008, 128010)
    sentence = "This is a test sentence."
    ids = [128000, 2028, 374, 264, 1296, 11914, 13, 128001]
    assert published.encode(sentence, bos=True, eos=True) == ids
    assert published.decode(ids) == f"<|begin_of_text|>{sentence}<|end_of_text|>"
    for text, known in {"user": [882], "\n\n": [271], "hello world": [15339, 1917]}.items():
        assert published.encode(text) == known


@pytest.mark.e2e
def test_published_tokenizer_there_and_back(published: Tokenizer) -> None:
    for text in ("### Response:", "Ünïcödé 四五六 🎉", "x = [1, 22, 333, 4444]\n\tdef f():\n\n\n", "  many   spaces  "):
        assert published.decode(published.encode(text)) == text
        assert len(published.encode(text)) < len(text.encode())
    assert published.decode(published.encode("4444")) == "4444" and len(published.encode("4444")) == 2
