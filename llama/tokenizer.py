"""LLaMA-3's tokenizer: byte-pair merges from a tiktoken file (`tokenizer.model`) and Meta's 256 special tokens."""

import base64
import binascii
from collections.abc import Iterator, Sequence
from pathlib import Path

import tiktoken

# How text is cut before merging, as LLaMA-3 was trained: contractions, words with one leading mark, numbers in
# groups of up to three digits, punctuation, line breaks, spaces.
SPLIT_PATTERN = "|".join(
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

N_SPECIAL = 256
# Offsets from the first special id (128000 in LLaMA-3); all others are reserved.
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
BOS, EOS, EOT = 0, 1, 9

# tiktoken's regular expressions recurse on very long inputs; cut text into pieces well below its limit, and runs of
# (non-)space characters too, as those are what its pattern backtracks over.
MAX_PIECE = 400_000
MAX_RUN = 25_000


def special_tokens() -> list[str]:
    """The 256 special tokens in id order."""
    reserved = (f"<|reserved_special_token_{i}|>" for i in range(N_SPECIAL))
    return [NAMED_SPECIAL[i] if i in NAMED_SPECIAL else next(reserved) for i in range(N_SPECIAL)]


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Read a tiktoken file: lines of `base64-of-token rank`, ranks 0..n-1 without holes.

    Raises ValueError naming the file and line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file (a Meta checkpoint folder holds a tokenizer.model)")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(
                f"{path}: line {number} is not 'base64-token rank': not a tiktoken file "
                "(a SentencePiece model, as LLaMA-2 has, does not fit)"
            ) from None
    if not ranks:
        raise ValueError(f"{path}: empty")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: ranks must be 0 to {len(ranks) - 1}, each once")
    missing = sum(bytes([b]) not in ranks for b in range(256))
    if missing:
        raise ValueError(f"{path}: {missing} of the 256 single bytes have no token, so not every text could be encoded")
    return ranks


class Tokenizer:
    """Text to token ids and back. Ids: the file's base tokens, then the 256 special tokens."""

    def __init__(self, path: str | Path):
        ranks = read_ranks(path)
        n_base = len(ranks)
        self.n_words: int = n_base + N_SPECIAL
        self.special: dict[str, int] = {token: n_base + i for i, token in enumerate(special_tokens())}
        self.bos_id: int = n_base + BOS
        self.eos_id: int = n_base + EOS
        self.eot_id: int = n_base + EOT
        self.stop_ids: tuple[int, ...] = (self.eos_id, self.eot_id)
        self._encoding = tiktoken.Encoding(
            name=Path(path).name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=self.special
        )

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of `text`. The spelling of a special token inside a text is ordinary text."""
        ids = [self.bos_id] if bos else []
        for piece in _pieces(text):
            ids += self._encoding.encode_ordinary(piece)
        return ids + [self.eos_id] if eos else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens in their spelling; bytes that are not UTF-8 become U+FFFD."""
        return self._encoding.decode(list(ids))


def _pieces(text: str) -> Iterator[str]:
    if len(text) <= MAX_RUN:
        yield text
        return
    for start in range(0, len(text), MAX_PIECE):
        piece = text[start : start + MAX_PIECE]
        run, begin = 0, 0
        for i in range(1, len(piece)):
            run = run + 1 if piece[i].isspace() == piece[i - 1].isspace() else 0
            if run >= MAX_RUN:
                yield piece[begin:i]
                begin, run = i, 0
        yield piece[begin:]
