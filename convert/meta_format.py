"""Checkpoints in Meta's layout: assembled from another format's tensors, and written as folders."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from convert.shards import bare_model
from convert.vocabulary import Vocabulary, gather_rows
from llama.args import ModelArgs
from llama.checkpoint import shard_specs

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}

EMBEDDING, OUTPUT = "tok_embeddings.weight", "output.weight"
CHECKPOINT_FILES = ("params.json", "tokenizer.model", "README.md", "consolidated.[0-9][0-9].pth")  # a folder's files


class Source:
    """Tensors of another format, by their own names."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor there is."""
        raise NotImplementedError

    def read(self, name: str) -> torch.Tensor:
        """One tensor, in a floating-point dtype."""
        raise NotImplementedError

    def where(self, name: str) -> str:
        """The file that a tensor is in, or should be in."""
        raise NotImplementedError

    def error(self, name: str, problem: str) -> ValueError:
        return ValueError(f"{self.where(name)}: tensor {name} {problem}")


@dataclass(frozen=True)
class Converted:
    """What a conversion made. `row_map`, `output_row_map`: for each new id the source's row, -1 for the mean row."""

    folder: Path
    args: ModelArgs
    row_map: list[int]
    output_row_map: list[int]
    notes: list[str]

    def __str__(self) -> str:
        notes = [f"note: {note}\n" for note in self.notes]
        return f"{''.join(notes)}wrote {self.folder} ({self.args.n_layers} layers, vocabulary {self.args.vocab_size})"


def source_names(
    n_layers: int, global_keys: Mapping[str, str], layer_keys: Mapping[str, str], prefix: str
) -> dict[str, str]:
    """Meta's key -> another format's name, for each tensor. prefix: what that format writes before a layer's number."""
    layers = {f"layers.{i}.{key}": f"{prefix}{i}.{name}" for i in range(n_layers) for key, name in layer_keys.items()}
    return {**global_keys, **layers}


def ffn_rule(dim: int, hidden: int) -> dict[str, float]:
    """`multiple_of` and `ffn_dim_multiplier` that give exactly this feed-forward width, round numbers preferred."""
    factors = [1.0, 1.3, 1.5] + [i / 10 for i in range(1, 81)] + [i / 100 for i in range(1, 801)]
    factors.append((hidden + 0.5) / int(8 * dim / 3))  # with multiple_of 1 this always fits
    for factor in factors:
        for multiple in (1024, 256, 512, 128, 64, 32, 16, 8, 4, 2, 1):
            if ModelArgs(dim, 1, 1, multiple_of=multiple, ffn_dim_multiplier=factor).ffn_dim == hidden:
                return {"multiple_of": multiple, "ffn_dim_multiplier": factor}
    raise AssertionError(f"no rule gives width {hidden} at dim {dim}")


def write_converted(
    output_dir: Path,
    args: ModelArgs,
    vocabulary: Vocabulary,
    source: Source,
    names: Mapping[str, str],
    dtype: str,
    overwrite: bool,
    tokenizer: bytes | None = None,
    ignored: Callable[[str], bool] = lambda name: False,
    change: Callable[[str, torch.Tensor], torch.Tensor] = lambda key, tensor: tensor,
) -> Converted:
    """Write a source's tensors as a checkpoint of one shard. Every shape is checked before the first tensor is read.

    names: Meta's key -> the source's name. tokenizer: the content of tokenizer.model (None: the vocabulary's).
    `ignored` says which other tensors need not be used; `change` is applied to each tensor read. Raises ValueError
    naming file and tensor that is missing, too many or of a wrong shape; then nothing was written.
    """
    shapes, source_shapes = shard_specs(bare_model(args)), source.shapes()
    names = {key: names[key] for key in shapes}
    for name in source_shapes:
        if name not in names.values() and not ignored(name):
            raise source.error(name, "has no place in a LLaMA model in Meta's layout")
    rows = source_shapes.get(names[EMBEDDING], (0,))[0]
    for key, name in names.items():
        if name not in source_shapes:
            raise source.error(name, "is missing")
        expected = (rows, args.dim) if key in (EMBEDDING, OUTPUT) else shapes[key].shape
        if source_shapes[name] != expected:
            raise source.error(name, f"has shape {source_shapes[name]}, expected {expected}")
    if rows < vocabulary.rows_needed():
        problem = f"has {rows} rows, but the tokenizer needs {vocabulary.rows_needed()}"
        raise source.error(names[EMBEDDING], problem)
    state = {}
    for key, name in names.items():
        tensor = change(key, source.read(name))
        if key in (EMBEDDING, OUTPUT):
            row_map = vocabulary.row_map if key == EMBEDDING else vocabulary.output_row_map
            tensor = gather_rows(tensor, row_map, vocabulary.special_rows)
        state[key] = tensor.to(DTYPES[dtype])
        require_finite(state[key], f"{source.where(name)}: tensor {name}")
    params = asdict(args)
    if not args.use_scaled_rope:
        params = {key: v for key, v in params.items() if key == "rope_theta" or not key.startswith("rope_")}
    with new_folder(output_dir, overwrite) as new:
        (new / "params.json").write_text(json.dumps(params, indent=2) + "\n", encoding="utf-8")
        (new / "tokenizer.model").write_bytes(vocabulary.tiktoken() if tokenizer is None else tokenizer)
        save_shard(state, new / "consolidated.00.pth")
    return Converted(output_dir, args, vocabulary.row_map, vocabulary.output_row_map, vocabulary.notes)


def require_finite(tensor: torch.Tensor, origin: str) -> None:
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


def require_elsewhere(output: Path, source: Path) -> None:
    """ValueError where a checkpoint would be written in place of the one that it is made from."""
    if output.exists() and output.samefile(source):
        raise ValueError(f"{output}: is the base itself, which is never replaced; --output_dir must be another folder")


@contextmanager
def new_folder(folder: Path, overwrite: bool, allowed: tuple[str, ...] = CHECKPOINT_FILES) -> Iterator[Path]:
    """An empty folder beside `folder`, which takes its place when the block ends and vanishes when it raises: `folder`
    is never there by half. `overwrite`, `allowed`: as for `check_output`."""
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    new, old = temporary / "new", temporary / "old"
    try:
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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_shard(state: dict[str, torch.Tensor], path: Path) -> None:
    """`torch.save`, with an OSError for a full disk."""
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"{path}: could not be written ({str(error).splitlines()[0]})") from None
