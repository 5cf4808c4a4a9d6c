"""Checkpoints in Meta's layout: assembled from another format's tensors, and written as folders."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

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
# the layer's number. GGUF's wq and wk are in Meta's row order, Hugging Face's are not.
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
    ("feed_forward.w1", "mlp.gate_proj", "ffn_gate"),
    ("feed_forward.w2", "mlp.down_proj", "ffn_down"),
    ("feed_forward.w3", "mlp.up_proj", "ffn_up"),
    ("attention_norm", "input_layernorm", "attn_norm"),
    ("ffn_norm", "post_attention_layernorm", "ffn_norm"),
)
HF, GGUF = 1, 2  # columns
LAYER_PREFIX = {HF: "model.layers.", GGUF: "blk."}
CHECKPOINT_FILES = ("params.json", "tokenizer.model", "README.md", "consolidated.[0-9][0-9].pth")  # a folder's files


class SourceTensor(NamedTuple):
    """A tensor of another format, read when it is needed."""

    origin: str  # "FILE: tensor NAME", for messages
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class Written(NamedTuple):
    """A folder that was made, and what there is to say of it."""

    folder: Path
    summary: str

    def __str__(self) -> str:
        return f"wrote {self.folder} ({self.summary})"


class Converted(NamedTuple):
    """What a conversion made."""

    folder: Path
    args: ModelArgs
    vocabulary: Vocabulary

    def __str__(self) -> str:
        notes = [f"note: {note}\n" for note in self.vocabulary.notes]
        return f"{''.join(notes)}wrote {self.folder} ({self.args.n_layers} layers, vocabulary {self.args.vocab_size})"


def bare_model(args: ModelArgs, config: AdapterConfig | None = None) -> Transformer:
    """A model without weights, which tells the shapes of its tensors and how they are sharded."""
    init_distributed(torch.device("cpu"))
    return Transformer(args, config)


def source_names(n_layers: int, column: int) -> dict[str, str]:
    """Meta's key -> another format's name (column HF or GGUF), for each tensor of a model."""
    names = {f"{row[0]}.weight": f"{row[column]}.weight" for row in NAMES}
    for i in range(n_layers):
        names |= {
            f"layers.{i}.{row[0]}.weight": f"{LAYER_PREFIX[column]}{i}.{row[column]}.weight" for row in LAYER_NAMES
        }
    return names


def ffn_rule(dim: int, hidden: int) -> dict[str, float]:
    """`multiple_of` and `ffn_dim_multiplier` that give exactly this feed-forward width: Meta's own numbers where they
    fit."""
    for factor in (1.0, 1.3, 1.5):
        for multiple in (1024, 256):
            if ModelArgs(dim, 1, 1, multiple_of=multiple, ffn_dim_multiplier=factor).ffn_dim == hidden:
                return {"multiple_of": multiple, "ffn_dim_multiplier": factor}
    return {"multiple_of": hidden, "ffn_dim_multiplier": min(1.0, hidden / int(8 * dim / 3))}


def write_converted(
    output_dir: Path,
    args: ModelArgs,
    vocabulary: Vocabulary,
    tensors: Mapping[str, SourceTensor],
    names: Mapping[str, str],
    origin: Path,
    dtype: str,
    overwrite: bool,
    change: Callable[[str, Tensor], Tensor] = lambda key, tensor: tensor,
) -> Converted:
    """Write another format's tensors as a checkpoint of one shard. Every shape is checked before the first is read.

    tensors: by their names there, from the file or folder `origin`. names: Meta's key -> the name there. `change` is
    applied to each tensor read. Raises ValueError naming file and tensor that is missing, too many or of a wrong shape;
    then nothing was written.
    """
    shapes = {key: spec.shape for key, spec in shard_specs(bare_model(args)).items()}
    for name in tensors.keys() - {names[key] for key in shapes}:
        raise ValueError(f"{tensors[name].origin} has no place in a LLaMA model in Meta's layout")
    for key in shapes:
        if names[key] not in tensors:
            raise ValueError(f"{origin}: tensor {names[key]} is missing")
    for key, shape in shapes.items():
        if tensors[names[key]].shape != shape:
            raise ValueError(f"{tensors[names[key]].origin} has shape {tensors[names[key]].shape}, expected {shape}")
    state = {}
    for key in shapes:
        source = tensors[names[key]]
        tensor = source.read()
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{source.origin} is {tensor.dtype}, expected floating-point numbers")
        state[key] = change(key, tensor).to(DTYPES[dtype])
        require_finite(state[key], source.origin)
    params = asdict(args)
    if not args.use_scaled_rope:
        params = {key: v for key, v in params.items() if key == "rope_theta" or not key.startswith("rope_")}
    with new_folder(output_dir, overwrite) as new:
        (new / "params.json").write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")
        (new / "tokenizer.model").write_bytes(vocabulary.file())
        save_shard(state, new / "consolidated.00.pth")
    return Converted(output_dir, args, vocabulary)


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
