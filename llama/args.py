"""The shape of a LLaMA model: the keys of Meta's `params.json`."""

import os
import sys
from dataclasses import Field, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from moa.config import MAX_LAYERS
from moa.reading import parse_json, read_text, safe_name, short_repr

_SCALING = ("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_seq_len")

# Smallest and largest value of a number, far beyond every model there is: beyond them a file is damaged, and would only
# fail later and less clearly.
_BOUNDS = {"n_layers": (1, MAX_LAYERS), "vocab_size": (-1, 2**24), "ffn_dim_multiplier": (1e-12, 1e3)}
_SIZE, _NUMBER = (1, 2**24), (1e-12, 1e12)  # of other whole numbers and of others

# Meta's own files say `use_scaled_rope` and not by how much. The factors of its releases, published in the config.json
# of each, by (dim, n_layers, n_heads).
_RELEASES = {
    (2048, 16, 32): ("LLaMA-3.2-1B", 32.0),
    (3072, 28, 24): ("LLaMA-3.2-3B", 32.0),
    (4096, 32, 32): ("LLaMA-3.1-8B", 8.0),
    (8192, 80, 64): ("LLaMA-3.1-70B and 3.3-70B", 8.0),
    (16384, 126, 128): ("LLaMA-3.1-405B", 8.0),
}


@dataclass(frozen=True)
class ModelArgs:
    """Sizes of the frozen base. Field names are the keys of `params.json`; an unknown key is an error.

    Beyond Meta's keys: head_dim (default: dim / n_heads), ffn_dim, the feed-forward width (default: Meta's rule of
    multiple_of and ffn_dim_multiplier; 14336 for LLaMA-3.1-8B), qk_norm (queries and keys are normed head by head, as
    in Qwen3) and tied_embeddings (the output matrix is the embedding).

    The four `rope_*` numbers of LLaMA-3.1's frequency scaling count only where `use_scaled_rope` is true; their
    defaults are LLaMA-3.1's.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int | None = None  # None: one key/value head per query head
    vocab_size: int = -1  # -1: as many as the tokenizer has
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    use_scaled_rope: bool = False
    rope_scaling_factor: float = 8.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_max_seq_len: int = 8192
    head_dim: int | None = None
    ffn_dim: int | None = None
    qk_norm: bool = False
    tied_embeddings: bool = False

    def __post_init__(self):
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        for f in fields(self):
            if getattr(self, f.name) is not None or f.default is not None:
                _check_type(f, getattr(self, f.name))
        if self.vocab_size == 0:
            raise ValueError("vocab_size must be positive (or -1), not 0")
        if self.head_dim is None and self.dim % self.n_heads or (self.head_dim or self.dim // self.n_heads) % 2:
            raise ValueError(f"dim {self.dim} must split into n_heads {self.n_heads} heads of even width")
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        if self.ffn_dim is None:
            object.__setattr__(self, "ffn_dim", self._ffn_dim_by_rule())
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")
        if self.use_scaled_rope and self.rope_low_freq_factor >= self.rope_high_freq_factor:
            raise ValueError(
                f"rope_low_freq_factor {self.rope_low_freq_factor} must be below "
                f"rope_high_freq_factor {self.rope_high_freq_factor}"
            )

    def _ffn_dim_by_rule(self) -> int:
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * -(-hidden // self.multiple_of)

    @property
    def shape(self) -> dict[str, Any]:
        """What the model computes with: equal for two spellings of the same model."""
        names = [f.name for f in fields(self) if self.use_scaled_rope or f.name not in _SCALING]
        spelling = ("multiple_of", "ffn_dim_multiplier")
        return {name: getattr(self, name) for name in names if name not in spelling}

    def require_fits(self, recorded: Any) -> None:
        """ValueError naming the difference, unless `recorded`, the base in an adapter's settings, is this model."""
        try:
            trained_on = ModelArgs.from_dict(recorded).shape
        except ValueError as error:
            raise ValueError(f"base: {error}") from None
        for name, ours in self.shape.items():
            if (theirs := trained_on.get(name)) != ours:
                raise ValueError(f"the adapter was trained on a base with {name} {theirs}, this one has {ours}")

    @classmethod
    def from_dict(cls, raw: Any) -> "ModelArgs":
        """The content of a `params.json`. ValueError naming the key that is unknown, missing or wrong."""
        if not isinstance(raw, dict):
            raise ValueError(f"expected a JSON object, found {type(raw).__name__}")
        unknown = sorted(set(raw) - {f.name for f in fields(cls)})
        missing = [name for name in ("dim", "n_layers", "n_heads") if name not in raw]
        for problem, names in {"unknown": unknown, "missing": missing}.items():
            if names:
                raise ValueError(f"{problem} key{'s' * (len(names) > 1)} {', '.join(map(safe_name, names[:3]))}")
        return cls(**raw)

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelArgs":
        """Read a `params.json`. ValueError naming the file too."""
        path = Path(path)
        if path.with_name("config.json").is_file() and not path.is_file():
            hint = f"python -m convert hf --input {path.parent} makes it from a Hugging Face folder"
            raise ValueError(f"{path}: no such file; {hint}")
        raw = parse_json(read_text(path), str(path))
        try:
            args = cls.from_dict(raw)
            if args.use_scaled_rope and "rope_scaling_factor" not in raw:
                args = replace(args, rope_scaling_factor=_published_factor(args, path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return args


def _check_type(f: Field, value: Any) -> None:
    """ValueError unless `value` is of a field's type and within its bounds."""
    if f.type is bool:
        expected, fits = "true or false", isinstance(value, bool)
    else:
        whole = f.type in (int, int | None)
        low, high = _BOUNDS.get(f.name, _SIZE if whole else _NUMBER)
        expected = f"a {'whole ' if whole else ''}number from {low} to {high}"
        fits = type(value) in ((int,) if whole else (int, float)) and low <= value <= high
    if not fits:
        raise ValueError(f"{f.name} must be {expected}, not {short_repr(value)}")


@cache  # said once
def _published_factor(args: ModelArgs, path: Path) -> float:
    release, factor = _RELEASES.get((args.dim, args.n_layers, args.n_heads), (None, None))
    if release is None:
        raise ValueError("use_scaled_rope needs rope_scaling_factor beside it, since this is no known release's shape")
    if os.environ.get("RANK", "0") == "0":
        print(f"{path}: no rope_scaling_factor; {factor:g} is taken, as published for {release}", file=sys.stderr)
    return factor
