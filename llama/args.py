"""The shape of a LLaMA model: the keys of Meta's `params.json`."""

from dataclasses import dataclass, fields
from pathlib import Path

from moa.config import MAX_LAYERS
from moa.reading import parse_json, read_text, safe_name, short_repr

# Far beyond every model there is; a larger number is a damaged file, and would only fail later and less clearly.
MAX_SIZE, MAX_NUMBER = 2**24, 1e12


@dataclass(frozen=True)
class ModelArgs:
    """Sizes of the frozen base. Field names are the keys of `params.json`; an unknown key is an error.

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

    def __post_init__(self):
        if self.n_kv_heads is None:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "rope_original_max_seq_len"):
            value = getattr(self, name)
            most = MAX_LAYERS if name == "n_layers" else MAX_SIZE
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
                raise ValueError(f"{name} must be a whole number from 1 to {most}, not {short_repr(value)}")
        vocab = self.vocab_size
        if isinstance(vocab, bool) or not isinstance(vocab, int) or not -1 <= vocab <= MAX_SIZE or vocab == 0:
            raise ValueError(f"vocab_size must be a positive whole number (or -1), not {short_repr(vocab)}")
        positive = ("norm_eps", "rope_theta", "rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor")
        for name in positive + (("ffn_dim_multiplier",) if self.ffn_dim_multiplier is not None else ()):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not 1 / MAX_NUMBER <= value <= MAX_NUMBER:
                raise ValueError(f"{name} must be a positive number up to {MAX_NUMBER:g}, not {short_repr(value)}")
        if not isinstance(self.use_scaled_rope, bool):
            raise ValueError(f"use_scaled_rope must be true or false, not {short_repr(self.use_scaled_rope)}")
        if self.dim % self.n_heads or (self.dim // self.n_heads) % 2:
            raise ValueError(f"dim {self.dim} must split into n_heads {self.n_heads} heads of even width")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} must be a multiple of n_kv_heads {self.n_kv_heads}")
        if self.ffn_dim_multiplier is not None and self.ffn_dim_multiplier > 1000:
            raise ValueError(f"ffn_dim_multiplier must be at most 1000, not {self.ffn_dim_multiplier}")
        if self.use_scaled_rope and self.rope_low_freq_factor >= self.rope_high_freq_factor:
            raise ValueError(
                f"rope_low_freq_factor {self.rope_low_freq_factor} must be below "
                f"rope_high_freq_factor {self.rope_high_freq_factor}"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_dim(self) -> int:
        """Hidden width of the feed-forward block, by Meta's rule (14336 for LLaMA-3.1-8B)."""
        hidden = int(2 * 4 * self.dim / 3)
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        return self.multiple_of * -(-hidden // self.multiple_of)

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelArgs":
        """Read a `params.json`. Raises ValueError naming the file and the key that is unknown, missing or wrong."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path}: no such file (a Meta checkpoint folder holds a params.json)")
        raw = parse_json(read_text(path), str(path))
        if not isinstance(raw, dict):
            raise ValueError(f"{path}: expected a JSON object, found {type(raw).__name__}")
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(raw) - known)
        if unknown:
            raise ValueError(f"{path}: unknown key{'s' * (len(unknown) > 1)} {', '.join(map(safe_name, unknown[:3]))}")
        missing = [name for name in ("dim", "n_layers", "n_heads") if name not in raw]
        if missing:
            raise ValueError(f"{path}: missing key{'s' * (len(missing) > 1)} {', '.join(missing)}")
        try:
            return cls(**raw)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
