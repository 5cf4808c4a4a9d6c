"""The tokenizer rule: a byte-level BPE vocabulary as tiktoken ranks, and which embedding row each new token gets.

Ids in Meta's layout: the base tokens (rank = place in id order), then the single bytes the vocabulary lacks, then
Meta's 256 special tokens. A LLaMA-3 vocabulary comes out unchanged. In any other, a special token takes the row of the
source's token of the same name, begin- and end-of-text the row of `<|endoftext|>`, `<|eot_id|>` that of `<|im_end|>`;
all other specials and the appended bytes take the mean of the source's special rows, which the model never writes.
"""

import base64
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from llama.tokenizer import BOS, EOS, EOT, N_SPECIAL, NAMED_SPECIAL, read_ranks

MEAN = -1  # in a row map: the mean of the source's special rows

ROLES = {BOS: "<|endoftext|>", EOS: "<|endoftext|>", EOT: "<|im_end|>"}


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as printable characters: printable ones stand for themselves, the rest from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTES = _byte_alphabet()


@dataclass(frozen=True)
class Vocabulary:
    """What becomes of a source vocabulary. Row maps: for each new id the source's embedding row, or MEAN."""

    ranks: list[bytes]  # base tokens and appended bytes, in rank order
    row_map: list[int]  # for tok_embeddings.weight
    output_row_map: list[int]  # for output.weight
    special_rows: list[int]  # the rows behind MEAN
    notes: list[str]

    def rows_needed(self) -> int:
        """How many rows the source's embedding must have at least."""
        averaged = self.special_rows if MEAN in self.row_map else []
        return 1 + max([*self.row_map, *averaged])

    def tiktoken(self) -> bytes:
        """The text of `tokenizer.model`."""
        return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(self.ranks))


def plan(base: dict[int, str], special: dict[int, str], origin: str) -> Vocabulary:
    """The new vocabulary from the source's base tokens {id: spelling in GPT-2's byte alphabet} and specials {id: name}.

    Raises ValueError, beginning with `origin` (the file), where a token is not byte-level or no end token is known.
    """
    order = sorted(base)
    ranks = [_spelled_bytes(base[i], i, origin) for i in order]
    if len(set(ranks)) < len(ranks):
        twice = next(base[i] for i, token in zip(order, ranks, strict=True) if ranks.count(token) > 1)
        raise ValueError(f"{origin}: token {twice!r} is in the vocabulary twice")
    missing = sorted(set(range(256)) - {token[0] for token in ranks if len(token) == 1})
    first = len(order)
    is_llama3 = order == list(range(first)) and all(
        first + k in special and (k not in (BOS, EOS, EOT) or special[first + k] == NAMED_SPECIAL[k])
        for k in range(N_SPECIAL)
    )
    notes = []
    if is_llama3 and not missing:
        rows = output_rows = list(range(first + N_SPECIAL))
    else:
        row_of = {name: i for i, name in special.items()}
        specials = [row_of.get(NAMED_SPECIAL.get(k), row_of.get(ROLES.get(k), MEAN)) for k in range(N_SPECIAL)]
        if specials[EOS] == MEAN:
            raise ValueError(f"{origin}: no special token <|end_of_text|> or <|endoftext|>, so answers could not end")
        rows = order + [MEAN] * len(missing) + specials
        output_rows = list(rows)
        if specials[BOS] == specials[EOS]:
            # Of two equal logits greedy takes the lower id, begin-of-text, and no answer would ever end.
            output_rows[len(order) + len(missing) + BOS] = MEAN
        notes.append(
            f"not LLaMA-3's vocabulary: {specials.count(MEAN)} of Meta's 256 special tokens and {len(missing)} single "
            f"bytes had no row and take the mean of the source's {len(special)} special rows"
        )
    dropped = len(set(special) - set(rows))
    if dropped:
        notes.append(f"{dropped} special tokens of the source have no counterpart and were left out")
    return Vocabulary(ranks + [bytes([b]) for b in missing], rows, output_rows, sorted(special), notes)


def from_tokenizer_json(path: Path) -> Vocabulary:
    """Read a Hugging Face tokenizer.json. Raises ValueError where it is not a byte-level BPE."""
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text)
        model = content["model"]
        if model.get("type") != "BPE" or model.get("byte_fallback"):
            raise ValueError(f"{path}: only byte-level BPE tokenizers can be converted, not {model.get('type')!r}")
        added = {entry["id"]: entry["content"] for entry in content.get("added_tokens") or []}
        base = {i: token for token, i in model["vocab"].items() if i not in added}
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a tokenizer.json ({type(error).__name__}: {error})") from None
    check_merges(merges, base, str(path))
    return plan(base, added, str(path))


def from_tiktoken(path: Path) -> Vocabulary:
    """Read a tokenizer.model in tiktoken format, which is Meta's own and stays as it is."""
    ranks = read_ranks(path)
    tokens = sorted(ranks, key=ranks.__getitem__)
    rows = list(range(len(tokens) + N_SPECIAL))
    return Vocabulary(tokens, rows, rows, rows[len(tokens) :], [])


def check_merges(merges: list[tuple[str, ...]], base: dict[int, str], origin: str) -> None:
    """tiktoken merges in id order: refuse (ValueError) a vocabulary that merges in another order."""
    ids = {token: i for i, token in base.items()}
    last = -1
    for merge in merges:
        merged = "".join(merge)
        if merged not in ids:
            raise ValueError(f"{origin}: the merge {' '.join(merge)!r} makes a token that is not in the vocabulary")
        if ids[merged] < last:
            raise ValueError(
                f"{origin}: token {merged!r} (id {ids[merged]}) is merged after id {last}; "
                "tiktoken merges in id order and would cut text differently"
            )
        last = ids[merged]


def gather_rows(weight: torch.Tensor, rows: list[int], special_rows: list[int]) -> torch.Tensor:
    """Rows of an embedding (source rows, D) in the new order: (new vocabulary, D), MEAN rows averaged in float32."""
    index = torch.tensor(rows)
    out = weight[index.clamp(min=0)]
    if MEAN in rows:
        out[index == MEAN] = weight[special_rows].float().mean(0).to(weight.dtype)
    return out


def _spelled_bytes(token: str, number: int, origin: str) -> bytes:
    if not token or not set(token) <= _BYTES.keys():
        raise ValueError(f"{origin}: token {token!r} (id {number}) is not in the byte-level alphabet")
    return bytes(_BYTES[character] for character in token)
