"""Tokenizers of Hugging Face folders and GGUF files, as the `tokenizer.model` of a checkpoint in Meta's layout.

Every token keeps its id. Normalizer, splitting rule and tokens that are read whole are kept, or refused by name; merges
must be those that tiktoken makes by rank. Ends of answers are those that the model's files declare, and special tokens
that are ends in every model.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from llama.tokenizer import (
    BOS,
    EOS,
    FORMS,
    LLAMA3_SPLIT,
    N_SPECIAL,
    Rules,
    special_tokens,
    write_tokenizer,
)
from moa.files import read_json
from moa.reading import short_repr

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
GGUF_SPLITS = {  # tokenizer.ggml.pre
    "llama-bpe": [LLAMA3_SPLIT],
    "gpt-2": [GPT2_SPLIT],
    **dict.fromkeys(("smollm", "starcoder"), [r"\p{N}", GPT2_SPLIT]),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), [QWEN2_SPLIT]),
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = range(1, 6)  # of tokenizer.ggml.token_type
ENDS = ("<|end_of_text|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|im_end|>")  # also where no file says so

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [b for b in range(256) if b not in _PRINTABLE]
# GPT-2's spelling of bytes as characters: printable ones stand for themselves, the others from U+0100 on
BYTES = {chr(b): b for b in _PRINTABLE} | {chr(0x100 + i): b for i, b in enumerate(_OTHERS)}


class Vocabulary(NamedTuple):
    """A tokenizer, and what there is to say about its conversion."""

    ids: dict[bytes, int]  # of byte-pair tokens
    rules: Rules
    notes: list[str]

    def file(self) -> bytes:
        """The content of `tokenizer.model`."""
        return write_tokenizer(self.ids, self.rules)


class Stated(NamedTuple):
    """A tokenizer as another format states it. Token maps are name -> id."""

    base: dict[str, int]  # byte-pair tokens, in GPT-2's spelling of bytes
    special: dict[str, int]
    added: dict[str, int]  # read from a text
    merges: list[tuple[str, ...]]
    ignore_merges: bool  # a piece of text that is a token is not merged from its bytes
    split: list[str]
    normalize: str | None
    bos: Any  # token that the tokenizer puts before a text: id, name or None
    ends: list[tuple[str, Any]]  # where ends of answers are declared; an id, a name or a list of them


def from_hf(folder: Path, rows: int) -> Vocabulary:
    """The tokenizer of a Hugging Face folder, for an embedding of `rows` rows. ValueError naming the file at fault."""
    config, settings, generation = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("config.json", "tokenizer_config.json", "generation_config.json")
    )
    ends = [
        ("tokenizer_config.json", settings.get("eos_token")),
        ("generation_config.json", generation.get("eos_token_id")),
        ("config.json", config.get("eos_token_id")),
    ]
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file (a tokenizer.model alone, as SentencePiece writes it, is not read)")
    content = read_json(path)
    try:
        bos = settings.get("add_bos_token") and settings.get("bos_token")
        return _vocabulary(_read_tokenizer_json(content, bos, ends), rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: not a tokenizer.json ({type(error).__name__}: {error})") from None


def from_gguf(metadata: Mapping[str, Any], rows: int) -> Vocabulary:
    """The tokenizer in a GGUF's metadata. ValueError, or KeyError for a missing key."""
    get = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}.get
    if get("model") != "gpt2":
        kind = "SentencePiece ('llama')" if get("model") == "llama" else repr(get("model"))
        raise ValueError(f"tokenizer.ggml.model is {kind}; only byte-level BPE ('gpt2') can be converted")
    if get("pre") not in GGUF_SPLITS:
        known = ", ".join(GGUF_SPLITS)
        raise ValueError(f"tokenizer.ggml.pre, the splitting rule, is {get('pre')!r}, expected one of {known}")
    require_off(metadata, ["tokenizer.ggml.add_space_prefix"])  # a space before every text
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    if len(tokens) != len(kinds):
        raise ValueError(f"{len(tokens)} tokenizer.ggml.tokens but {len(kinds)} tokenizer.ggml.token_type")
    of_kind: dict[int, dict[str, int]] = {kind: {} for kind in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED)}
    for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind not in of_kind or token in of_kind[kind]:
            problem = "is in the vocabulary twice" if kind in of_kind else f"has type {kind}, which is not known"
            raise ValueError(f"token {token!r} (id {i}) {problem}")
        of_kind[kind][token] = i
    is_llama3 = get("pre") == "llama-bpe"
    stated = Stated(
        base=of_kind[NORMAL],
        special=of_kind[CONTROL] | of_kind[UNKNOWN] | of_kind[UNUSED],
        added=of_kind[USER_DEFINED],
        merges=[tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]],
        ignore_merges=is_llama3,
        split=GGUF_SPLITS[get("pre")],
        normalize="NFC" if GGUF_SPLITS[get("pre")] == [QWEN2_SPLIT] else None,
        bos=get("bos_token_id") if get("add_bos_token", is_llama3) else None,
        ends=[(f"tokenizer.ggml.{key}", get(key)) for key in ("eos_token_id", "eot_token_id", "eom_token_id")],
    )
    return _vocabulary(stated, rows)


def _read_tokenizer_json(content: dict[str, Any], bos: Any, ends: list[tuple[str, Any]]) -> Stated:
    model, tokens = content["model"], content.get("added_tokens") or []
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        kind = f"SentencePiece's {model['type']}" if model.get("type") in ("BPE", "Unigram") else model.get("type")
        raise ValueError(f"only byte-level BPE tokenizers can be converted, not {kind}")
    require_off(model, ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    special, added = {}, {}
    for token in tokens:
        (special if token.get("special") else added)[token["content"]] = token["id"]
        if not token.get("special"):
            require_off(token, ("lstrip", "rstrip", "single_word"), f" of the added token {token['content']!r}")
    for step in _steps(content.get("post_processor"), "processors"):
        if step["type"] == "TemplateProcessing" and "SpecialToken" in step["single"][0]:
            bos = step["single"][0]["SpecialToken"]["id"]
    others = {*special.values(), *added.values()}
    return Stated(
        base={token: i for token, i in model["vocab"].items() if i not in others},
        special=special,
        added=added,
        merges=[tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]],
        ignore_merges=bool(model.get("ignore_merges")),
        split=_read_split(content.get("pre_tokenizer")),
        normalize=_read_normalizer(content.get("normalizer")),
        bos=bos or None,
        ends=ends,
    )


def require_off(values: Mapping[str, Any], keys: Iterable[str], of: str = "") -> None:
    """ValueError naming a setting that is on and has no counterpart in Meta's layout."""
    for key in keys:
        if values.get(key):
            raise ValueError(f"{key} = {values[key]!r}{of} has no counterpart here")


def _steps(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a part of tokenizer.json: those of a Sequence, or the only one."""
    if component is None:
        return []
    return component[key] if component["type"] == "Sequence" else [component]


def _read_normalizer(component: dict[str, Any] | None) -> str | None:
    forms = [step["type"] for step in _steps(component, "normalizers")]
    if len(forms) > 1 or not {*forms} <= {*FORMS}:
        raise ValueError(f"the normalizer {' + '.join(forms)} has no counterpart here")
    return forms[0] if forms else None


def _read_split(component: dict[str, Any] | None) -> list[str]:
    """The regular expressions of a pre-tokenizer."""
    *steps, last = _steps(component, "pretokenizers") or [{"type": None}]
    if last["type"] != "ByteLevel":
        raise ValueError(f"the pre-tokenizer must end in ByteLevel, not {last['type']}")
    require_off({"add_prefix_space": True} | last, ["add_prefix_space"])  # a space before every text
    patterns = []
    for step in steps:
        # With "Removed" and inverted, what lies between matches is lost; rules of this kind match all there is
        isolates = (step.get("behavior"), step.get("invert")) in (("Isolated", False), ("Removed", True))
        if step["type"] == "Split" and isolates:
            patterns.append(step["pattern"].get("Regex") or re.escape(step["pattern"]["String"]))
        elif step["type"] == "Digits":
            patterns.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
        else:
            raise ValueError(f"the pre-tokenizer {short_repr(step)} has no counterpart here")
    return patterns + ([GPT2_SPLIT] if last.get("use_regex", True) else []) or [r"[\s\S]+"]


def _vocabulary(stated: Stated, rows: int) -> Vocabulary:
    merges = [tuple(map(_spelled_bytes, merge)) for merge in stated.merges]
    ids = {_spelled_bytes(token): i for token, i in stated.base.items()}
    # An added token is read whole from a text, but may also be on the way to a larger one
    made = {b"".join(merge) for merge in merges}
    ids = {name.encode(): i for name, i in stated.added.items() if name.encode() in made} | ids
    token_ids = stated.special | stated.added
    names = {i: name for name, i in token_ids.items()}
    numbers = [*stated.base.values(), *stated.special.values(), *stated.added.values()]
    if len({*numbers}) < len(numbers) or min(numbers) < 0:
        raise ValueError("ids of tokens must be 0 and more, none twice")
    if both := stated.special.keys() & stated.added.keys():
        raise ValueError(f"token {min(both)!r} is there both as a special one and as one that is read from a text")
    if max(numbers) >= rows:
        raise ValueError(f"has {max(numbers) + 1} tokens, but the embedding has {rows} rows")
    _check_merges(ids, merges, stated.ignore_merges)

    special, meta, first = stated.special, special_tokens(), len(ids)
    has_llama3_ids = sorted(ids.values()) == list(range(first)) and rows == first + N_SPECIAL
    if has_llama3_ids and not stated.added and all(_alike(names.get(first + k), meta[k]) for k in range(N_SPECIAL)):
        special = {name: first + k for k, name in enumerate(meta)}
    stop_ids, notes = [], []
    for where, value in stated.ends:
        for token in value if isinstance(value, list) else [value]:
            if (token_id := _token_id(token, token_ids)) in names:
                stop_ids.append(token_id)
            elif token is not None:
                notes.append(f"{where} declares the end {token!r}, at which no answer ends: it is no special token")
    stop_ids += [special[name] for name in ENDS if name in special]
    if not stop_ids:
        raise ValueError(f"no end of answers is declared, and there is none of {', '.join(ENDS)}")
    bos, eos = _token_id(stated.bos, token_ids), stop_ids[0]
    if stated.bos is not None and bos not in names:
        raise ValueError(f"the first token of texts, {stated.bos!r}, is no special token")
    if has_llama3_ids:  # as published, also where the model's own answers end otherwise
        bos = first + BOS if special.get(meta[BOS]) == first + BOS else bos
        eos = first + EOS if first + EOS in stop_ids else eos
    rules = Rules(rows, stated.split, special, bos, eos, sorted({*stop_ids}), stated.added, stated.normalize)
    if missing := [f"0x{b:02x}" for b in range(256) if bytes([b]) not in ids]:
        listed = ", ".join(missing)
        notes.append(f"{len(missing)} bytes have no token; texts lose characters that need them ({listed})")
    if unnamed := rows - len({*ids.values(), *names}):
        notes.append(f"{unnamed} rows of the embedding belong to no token")
    return Vocabulary(ids, rules, notes)


def _alike(name: str | None, meta: str) -> bool:
    """Whether a special token is Meta's; LLaMA-3.0 numbers its reserved ones otherwise than 3.1."""
    return name == meta or (name is not None and name.startswith("<|reserved_special_token_"))


def _token_id(token: Any, token_ids: dict[str, int]) -> int | None:
    """The id of a token that a file states as its id, its name or an object with its name."""
    token = token.get("content") if isinstance(token, dict) else token
    return token_ids.get(token) if isinstance(token, str) else token


def _check_merges(ids: dict[bytes, int], merges: list[tuple[bytes, ...]], ignore_merges: bool) -> None:
    """ValueError where tiktoken, which merges by rank and takes a piece that is a token whole, would cut otherwise."""
    for merge in merges:
        if b"".join(merge) not in ids:
            raise ValueError(f"the merge {_text(*merge)} makes a token that is not in the vocabulary")
    for before, merge in pairwise(merges):
        if ids[b"".join(merge)] < ids[b"".join(before)]:
            raise ValueError(
                f"{_text(b''.join(merge))} (id {ids[b''.join(merge)]}) is merged after id {ids[b''.join(before)]}; "
                "tiktoken merges in id order and would cut text differently"
            )
    listed = set(merges)
    for token, token_id in ids.items():
        if len(token) == 1:
            continue
        parts = _parts(token, token_id, ids)
        if len(parts) == 2 and tuple(parts) not in listed:
            raise ValueError(f"{_text(*parts)} are not merged to token {token_id}; tiktoken would do it")
        if len(parts) > 2 and not ignore_merges:
            raise ValueError(f"no merges make {_text(token)} (id {token_id}); tiktoken would take it whole")


def _parts(token: bytes, token_id: int, ids: dict[bytes, int]) -> list[bytes]:
    """What merges of lower ids than its own make of a token's bytes."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while True:
        lowest, i = min((ids.get(left + right, token_id), i) for i, (left, right) in enumerate(pairwise(parts)))
        if lowest >= token_id:
            return parts
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def _text(*tokens: bytes) -> str:
    return " and ".join(repr(token.decode("utf-8", "backslashreplace")) for token in tokens)


def _spelled_bytes(token: str) -> bytes:
    if not token or not set(token) <= BYTES.keys():
        raise ValueError(f"token {token!r} is not in the byte-level alphabet")
    return bytes(BYTES[character] for character in token)
