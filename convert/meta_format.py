"""Checkpoints in Meta's layout: assembled from another format's tensors, and written as folders."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from convert.vocabulary import Vocabulary
from llama.args import ModelArgs
from llama.checkpoint import shard_specs
from llama.distributed import init_distributed
from llama.model import Transformer
from moa.config import AdapterConfig
from moa.state import FLOATS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
# Tensors by their names in Meta's layout, Hugging Face's and GGUF's, all without ".weight"; those of a block come after
# the layer's number. Norms of queries and keys: Qwen3 alone has them.
NAMES = (
    ("tok_embeddings", "model.embed_tokens", "token_embd"),
    ("norm", "model.norm", "output_norm"),
    ("output", "lm_head", "output"),
)
LAYER_NAMES = (
    ("attention.wq", "self_attn.q_proj", "attn_q"),
    ("attention.wk", "self_attn.k_proj", "attn_k"),
    ("attention.wv", "self_attn.v_proj", "attn_v"),
    ("attention.wo", "self_attn.o_proj", "attn_output"),
    ("attention.q_norm", "self_attn.q_norm", "attn_q_norm"),
    ("attention.k_norm", "self_attn.k_norm", "attn_k_norm"),
    ("feed_forward.w1", "mlp.gate_proj", "ffn_gate"),
    ("feed_forward.w2", "mlp.down_proj", "ffn_down"),
    ("feed_forward.w3", "mlp.up_proj", "ffn_up"),
    ("attention_norm", "input_layernorm", "attn_norm"),
    ("ffn_norm", "post_attention_layernorm", "ffn_norm"),
)
HF, GGUF = 1, 2  # columns
# Keys whose rows run along queries or keys, where the rotary embedding pairs components of a head
ROTATED = (".wq.weight", ".wk.weight", ".q_norm.weight", ".k_norm.weight")
LAYER_PREFIX = {HF: "model.layers.", GGUF: "blk."}
CHECKPOINT_FILES = ("params.json", "tokenizer.model", "README.md", "consolidated.[0-9][0-9].pth")  # a folder's files


class SourceTensor(NamedTuple):
    """A tensor of another format, read when it is needed."""

    origin: str  # "FILE: tensor NAME", for messages
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class Source(NamedTuple):
    """A model as another format states it.

    origin: its file or folder. tensors: by their names there. names: Meta's key -> the name there. pairs_halves: rows
    of queries and keys are as `permute_rope` takes them, not yet in Meta's order.
    """

    origin: Path
    args: ModelArgs
    vocabulary: Vocabulary
    tensors: Mapping[str, SourceTensor]
    names: Mapping[str, str]
    pairs_halves: bool


class Written(NamedTuple):
    """A checkpoint that was made, and what there is to say of it."""

    folder: Path
    args: ModelArgs
    summary: str
    notes: list[str]

    def __str__(self) -> str:
        return "\n".join([*(f"note: {note}" for note in self.notes), f"wrote {self.folder} ({self.summary})"])


def bare_model(args: ModelArgs, config: AdapterConfig | None = None) -> Transformer:
    """A model without weights, which tells the shapes of its tensors and how they are sharded."""
    init_distributed(torch.device("cpu"))
    return Transformer(args, config)


def source_names(n_layers: int, column: int) -> dict[str, str]:
    """Meta's key -> another format's name (column HF or GGUF), for each tensor of a model."""
    names = {f"{row[0]}.weight": f"{row[column]}.weight" for row in NAMES}
    for i in range(n_layers):
        prefix = f"{LAYER_PREFIX[column]}{i}"
        names |= {f"layers.{i}.{row[0]}.weight": f"{prefix}.{row[column]}.weight" for row in LAYER_NAMES}
    return names


def whole_number(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A size that another format states. ValueError naming the key."""
    value = values.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or value is True or value < 1:
        raise ValueError(f"{key} must be a positive whole number, not {value!r}")
    return value


def permute_rope(rows: Tensor, head_dim: int) -> Tensor:
    """Rows (heads * head_dim, ...) of queries or keys: per head from [first half, second half], which are the pairs of
    Hugging Face's rotary embedding, to Meta's interleaved pairs."""
    return rows.view(-1, 2, head_dim // 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def unpermute_rope(rows: Tensor, head_dim: int) -> Tensor:
    """Inverse of `permute_rope`."""
    return rows.view(-1, head_dim // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def convert(
    read: Callable[[Path], Source], path: str | Path, output_dir: str | Path, dtype: str, overwrite: bool
) -> Written:
    """Write what `read` makes of a file or folder as a checkpoint of one shard; `dtype` is bf16, fp32 or fp16.

    Every shape is checked before the first tensor is read. Raises ValueError or OSError naming the file and the tensor
    or key that is missing, too many or wrong; then nothing was written.
    """
    output_dir = check_output(output_dir, overwrite)
    origin, args, vocabulary, tensors, names, pairs_halves = read(Path(path))
    shapes = {key: spec.shape for key, spec in shard_specs(bare_model(args)).items()}
    for name in tensors.keys() - {names[key] for key in shapes}:
        raise ValueError(f"{tensors[name].origin} has no place in a model of this shape")
    for key, shape in shapes.items():
        tensor = tensors.get(names[key])
        if tensor is None:
            raise ValueError(f"{origin}: tensor {names[key]} is missing")
        if tensor.shape != shape:
            raise ValueError(f"{tensor.origin} has shape {tensor.shape}, expected {shape}")
    state = {}
    for key in shapes:
        source = tensors[names[key]]
        values = source.read()
        if values.dtype not in FLOATS:
            raise ValueError(f"{source.origin} is {values.dtype}, expected floating-point numbers")
        if pairs_halves and key.endswith(ROTATED):
            values = permute_rope(values, args.head_dim)
        state[key] = values.to(DTYPES[dtype])
        require_finite(state[key], source.origin)
    with new_folder(output_dir, overwrite) as new:
        (new / "params.json").write_text(json.dumps(args.shape, indent=2) + "\n", encoding="utf-8")
        (new / "tokenizer.model").write_bytes(vocabulary.file())
        save_shard(state, new / "consolidated.00.pth")
    return Written(output_dir, args, f"{args.n_layers} layers, vocabulary {args.vocab_size}", vocabulary.notes)


def require_finite(tensor: Tensor, origin: str) -> None:
    """ValueError, beginning with `origin`, where a floating-point tensor has infinite values or NaN."""
    if not torch.stack(tensor.aminmax()).isfinite().all():  # min and max are NaN where any value is
        dtype = next((name for name, dtype in DTYPES.items() if dtype == tensor.dtype), str(tensor.dtype))
        raise ValueError(f"{origin} has values that are not finite numbers in {dtype}")


def check_output(folder: str | Path, overwrite: bool, allowed: tuple[str, ...] = CHECKPOINT_FILES) -> Path:
    """Return the output folder. ValueError where it exists; with `overwrite`, where it holds anything but `allowed`
    (file names, or patterns of them)."""
    folder = Path(folder)
    if not os.path.lexists(folder):
        return folder
    if not overwrite:
        raise ValueError(f"{folder}: exists already (--overwrite replaces it)")
    if not folder.is_dir() or folder.is_symlink():
        raise ValueError(f"{folder}: is not a folder")
    for entry in folder.iterdir():
        if not any(entry.match(name) for name in allowed):
            raise ValueError(f"{folder}: holds {entry.name}, which does not belong there; it is not overwritten")
    return folder


@contextmanager
def new_folder(folder: Path, overwrite: bool, allowed: tuple[str, ...] = CHECKPOINT_FILES) -> Iterator[Path]:
    """An empty folder beside `folder`, which takes its place when the block ends and vanishes when it raises: `folder`
    is never there by half. `overwrite`, `allowed`: as for `check_output`."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True)
    with temporary as root:
        new, old = Path(root, "new"), Path(root, "old")
        new.mkdir()
        yield new
        check_output(folder, overwrite, allowed)
        if folder.exists():
            os.rename(folder, old)
        try:
            os.rename(new, folder)
        except OSError:
            if old.exists():
                os.rename(old, folder)
            raise


def save_shard(state: dict[str, Tensor], path: Path) -> None:
    """`torch.save`, with an OSError for a full disk."""
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"{path}: could not be written ({str(error).splitlines()[0]})") from None
