"""The flags of several measurements, and what they may be."""

from dataclasses import dataclass

import torch

from cli import flag
from moa.methods import METHODS

ALL = [method for method in METHODS if method != "custom"]


@dataclass(frozen=True)
class Figures:
    json: str | None = flag(None, help="write the figures to this file too")


@dataclass(frozen=True)
class Timed(Figures):
    threads: int = flag(torch.get_num_threads(), help="threads")


@dataclass(frozen=True)
class OnBase:
    ckpt_dir: str | None = flag(None, help="base model, a folder in Meta's layout; default: the demo model")


def methods_named(text: str) -> list[str]:
    """The methods that --methods names, with commas; every one for "all", none for "". ValueError for one that is none
    or has no preset, or is there twice."""
    if text in ("", "all"):
        return list(ALL) if text else []
    methods = text.split(",")
    for method in methods:
        if method not in ALL:
            raise ValueError(f"--methods: {method!r} is none of {', '.join(ALL)} (or all)")
        if methods.count(method) > 1:
            raise ValueError(f"--methods: {method} is there twice")
    return methods


def numbers_of(flag: str, text: str) -> list[int]:
    """The numbers that a flag lists, with commas. ValueError unless all are whole and above 0."""
    words = text.split(",")
    if not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(f"--{flag}: expected whole numbers above 0, with commas, got {text!r}")
    return list(map(int, words))


def require_positive(flags: object, *names: str) -> None:
    """ValueError unless these flags, where they are given, are at least 1."""
    for name in names:
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, not {value}")
