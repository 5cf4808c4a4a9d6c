"""Tokenizers of LLaMA-3 and models like it: byte-pair merges by rank, and the rules around them.

`tokenizer.model` is a tiktoken file, lines of `base64-of-token id`; a pair of pieces whose joint token has the lowest
id is merged first. Meta's own has no more in it: `llama3_rules` holds. Any other begins with a line of JSON, the
`Rules` of its tokenizer.
"""

import base64
import binascii
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import regex
import tiktoken

from moa.reading import parse_json, short_repr

# How LLaMA-3 cuts text before merging: contractions, words with one leading mark, numbers in groups of up to three
# digits, punctuation, line breaks, spaces.
LLAMA3_SPLIT = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
N_SPECIAL = 256  # of LLaMA-3, behind its byte-pair tokens; offsets of those with a name of their own:
NAMED_SPECIAL = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
BOS, EOS, EOM, EOT = 0, 1, 8, 9

FORMS = (None, "NFC", "NFD", "NFKC", "NFKD")
MAX_VOCABULARY = 1 << 24

# tiktoken's regular expressions recurse on very long inputs; cut text into pieces well below its limit, and runs of
# (non-)space characters too, as those are what its pattern backtracks over.
MAX_PIECE = 400_000
MAX_RUN = 25_000
LONG_RUN = re.compile(rf"\s{{{MAX_RUN}}}|\S{{{MAX_RUN}}}")


@dataclass(frozen=True)
class Rules:
    """What a tokenizer is beside its byte-pair tokens. Token maps are name -> id."""

    vocab_size: int
    split: list[str]  # regular expressions, applied in turn: a match is a piece of its own, as is what lies between two
    special_tokens: dict[str, int]  # never read from a text
    bos_id: int | None  # before every prompt; None: nothing is
    eos_id: int  # behind every answer to be learned
    stop_ids: list[int]  # each ends an answer
    added_tokens: dict[str, int] = field(default_factory=dict)  # read from a text before it is split, longest first
    normalize: str | None = None  # Unicode form that a text is brought into


def special_tokens() -> list[str]:
    """LLaMA-3's 256 special tokens in id order."""
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(N_SPECIAL))
    return [NAMED_SPECIAL[i] if i in NAMED_SPECIAL else next(reserved) for i in range(N_SPECIAL)]


def llama3_rules(n_base: int) -> Rules:
    """LLaMA-3's rules behind `n_base` byte-pair tokens."""
    special = {name: n_base + i for i, name in enumerate(special_tokens())}
    stop_ids = [n_base + EOS, n_base + EOM, n_base + EOT]
    return Rules(n_base + N_SPECIAL, [LLAMA3_SPLIT], special, n_base + BOS, n_base + EOS, stop_ids)


def read_tokenizer(path: str | Path) -> tuple[dict[bytes, int], Rules]:
    """Byte-pair token -> id, and the rules, from a tokenizer.model. Raises ValueError naming the file and line."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file (a Meta checkpoint folder holds a tokenizer.model)")
    lines = path.read_bytes().splitlines()
    rules = _parse_rules(lines[0], f"{path}: line 1") if lines and lines[0].startswith(b"{") else None
    ids: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and rules):
            continue
        try:
            token, token_id = line.split()
            ids[base64.b64decode(token, validate=True)] = int(token_id)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path}: line {number} is not 'base64-token rank': not a tiktoken file "
                "(a SentencePiece model, as LLaMA-2 has, does not fit)"
            ) from None
    if not ids:
        raise ValueError(f"{path}: empty")
    if rules is None:
        if sorted(ids.values()) != list(range(len(ids))):
            raise ValueError(f"{path}: ranks must be 0 to {len(ids) - 1}, each once")
        missing = 256 - sum(len(token) == 1 for token in ids)
        if missing:
            raise ValueError(f"{path}: {missing} of the 256 single bytes have no token: not every text can be encoded")
        return ids, llama3_rules(len(ids))
    taken = [*ids.values(), *rules.special_tokens.values()]
    if len(set(taken)) < len(taken) or not 0 <= min(taken) <= max(taken) < rules.vocab_size:
        raise ValueError(f"{path}: ids of tokens must be 0 to {rules.vocab_size - 1}, none twice")
    return ids, rules


def write_tokenizer(ids: dict[bytes, int], rules: Rules) -> bytes:
    """The content of a tokenizer.model; without rules in it where they are LLaMA-3's."""
    lines = [base64.b64encode(token) + b" %d\n" % ids[token] for token in sorted(ids, key=ids.__getitem__)]
    head = b"" if rules == llama3_rules(len(ids)) else json.dumps(asdict(rules)).encode() + b"\n"
    return head + b"".join(lines)


def _parse_rules(line: bytes, where: str) -> Rules:
    try:
        rules = Rules(**parse_json(line, where))
        tokens = rules.special_tokens | rules.added_tokens
        if type(rules.vocab_size) is not int or not 0 < rules.vocab_size <= MAX_VOCABULARY:
            raise ValueError(f"vocab_size is {short_repr(rules.vocab_size)}")
        for value in [*tokens.values(), *rules.stop_ids, 0 if rules.bos_id is None else rules.bos_id]:
            if type(value) is not int or not 0 <= value < rules.vocab_size:
                raise ValueError(f"{short_repr(value)} is no id of {rules.vocab_size} tokens")
        if len({*tokens.values()}) < len(rules.special_tokens) + len(rules.added_tokens) or "" in tokens:
            raise ValueError("a special or added token is there twice or empty")
        if rules.eos_id not in rules.stop_ids or rules.normalize not in FORMS:
            raise ValueError(f"eos_id must be one of stop_ids, normalize one of {FORMS}")
        if not rules.split or type(rules.split) is not list:
            raise ValueError("split must be a list of regular expressions")
        for pattern in rules.split:
            regex.compile(pattern)
    except (TypeError, AttributeError, ValueError, regex.error) as error:
        problem = str(error).removeprefix(f"{where}: ")
        raise ValueError(f"{where}: not the rules of a tokenizer ({problem})") from None
    return rules


class Tokenizer:
    """Text to token ids and back."""

    def __init__(self, path: str | Path):
        ids, self.rules = read_tokenizer(path)
        rules = self.rules
        self.n_words, self.bos_id, self.eos_id = rules.vocab_size, rules.bos_id, rules.eos_id
        self.stop_ids = tuple(rules.stop_ids)
        named = rules.special_tokens | rules.added_tokens
        unnamed = set(range(rules.vocab_size)) - {*ids.values(), *named.values()}
        # Bytes without a token get ids beyond the vocabulary, which `encode` leaves out
        self._unknown = {bytes([b]): self.n_words + b for b in range(256) if bytes([b]) not in ids}
        # tiktoken splits by LLaMA-3's rule, the fast way, or not at all
        is_llama3 = rules.split == [LLAMA3_SPLIT]
        self._splits = [] if is_llama3 else [regex.compile(pattern) for pattern in rules.split]
        longest_first = sorted(rules.added_tokens, key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self._encoding = tiktoken.Encoding(
            name=Path(path).name,
            pat_str=LLAMA3_SPLIT if is_llama3 else r"[\s\S]+",
            mergeable_ranks=ids | self._unknown,
            special_tokens=named | {f"<|unused_token_{i}|>": i for i in unnamed},
        )

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of `text`. The spelling of a special token inside a text is ordinary text."""
        ids = [self.bos_id] if bos and self.bos_id is not None else []
        for part in self._added.split(text) if self._added else [text]:
            if part in self.rules.added_tokens:
                ids.append(self.rules.added_tokens[part])
            else:
                for piece in self._pieces(part):
                    ids += self._encoding.encode_ordinary(piece)
        if self._unknown:
            ids = [i for i in ids if i < self.n_words]
        return ids + [self.eos_id] if eos else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens in their spelling; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode(list(ids))

    def _pieces(self, text: str) -> Iterator[str]:
        """A text as the splitting rules cut it, or LLaMA-3's in lengths that tiktoken can take."""
        pieces = [unicodedata.normalize(self.rules.normalize, text) if self.rules.normalize else text]
        for pattern in self._splits:
            pieces = [part for piece in pieces for part in _isolate(pattern, piece) if part]
        return iter(pieces) if self._splits else _short_pieces(pieces[0])


def _isolate(pattern: regex.Pattern, text: str) -> Iterator[str]:
    """The matches of a pattern and what lies between them."""
    begin = 0
    for match in pattern.finditer(text):
        yield text[begin : match.start()]
        yield match[0]
        begin = match.end()
    yield text[begin:]


def _short_pieces(text: str) -> Iterator[str]:
    if len(text) <= MAX_RUN:
        yield text
        return
    for start in range(0, len(text), MAX_PIECE):
        piece, begin = text[start : start + MAX_PIECE], 0
        for run in LONG_RUN.finditer(piece):
            yield piece[begin : run.end()]
            begin = run.end()
        yield piece[begin:]
