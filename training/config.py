"""The flags of a fine-tuning run and what they come to. Needs no torch, so that a wrong flag is refused at once."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Any

from cli import die, flag, flags_of, parse_into
from llama.args import ModelArgs
from llama.machine import check_machine
from moa.config import AdapterConfig
from moa.methods import METHODS, config_fields
from moa.reading import parse_json, read_text, safe_name, short_repr
from training.paths import CONFIG, checkpoints

RECOMPUTED = ("off", "ffn", "all")  # choices of what the backward pass works out again, each keeps less than the last
DATA, RUN, STEPS, MACHINE = "data and model", "the run", "optimisation", "machine"


@dataclass(frozen=True)
class TrainConfig:
    """Flags of finetune.py that are not an adapter's."""

    method: str = flag("soft_moa", help="the method; custom: a mixture of your own", choices=tuple(METHODS), group=DATA)
    adapter_config: str | None = flag(
        None, help="settings of the adapters from a file like adapter_params.json; flags go on top", group=DATA
    )
    ckpt_dir: str | None = flag(None, help="base model, a folder in Meta's layout; default: the demo model", group=DATA)
    data_path: str | None = flag(
        None, help="training rows, JSON or JSON lines of instruction, input, output; default: the demo data", group=DATA
    )
    leak_tests: str | None = flag(
        None, help="test files, or folders of them, to look for among the training rows first; commas", group=DATA
    )
    max_seq_len: int = flag(
        300, help="longest row in tokens, prompt and answer; longer ones are cut or left out", group=DATA
    )
    output_dir: str | None = flag(None, help="folder of the run; default: runs/METHOD-DATA-sSEED", group=RUN)
    seed: int = flag(0, help="seed of the adapters' start and of the order of rows", group=RUN)
    save_every: int | None = flag(None, help="steps between checkpoints; default: one per epoch", group=RUN)
    keep_checkpoints: int | None = flag(None, help="only the newest so many stay; default: all", group=RUN)
    resume: bool = flag(False, help="go on from the output folder's last whole checkpoint, if it has one", group=RUN)
    overwrite: bool = flag(False, help="delete the checkpoints of an earlier run in the output folder", group=RUN)
    dry_run: bool = flag(False, help="print parameters, memory, steps and learning rate as JSON, and stop", group=RUN)
    epochs: float = flag(2.0, help="passes over the data", group=STEPS)
    max_steps: int | None = flag(None, help="stop after this many optimizer steps instead", group=STEPS)
    batch_size: int = flag(4, help="rows per data-parallel rank and micro-batch", group=STEPS)
    accum_iter: int = flag(1, help="micro-batches per optimizer step", group=STEPS)
    lr: float | None = flag(None, help="peak learning rate; default: blr * rows per step / 256", group=STEPS)
    blr: float = flag(6e-3, help="peak learning rate per 256 rows", group=STEPS)
    min_lr: float = flag(0.0, help="learning rate at the end", group=STEPS)
    warmup_epochs: float | None = flag(
        None, help="epochs of linear warm-up; default: half of the run, at most 1", group=STEPS
    )
    lr_schedule: str = flag("cosine", help="after the warm-up", choices=("cosine", "constant"), group=STEPS)
    weight_decay: float = flag(0.02, help="AdamW's, on matrices", group=STEPS)
    bf16: bool | None = flag(
        None, help="base in bf16 (adapters stay fp32); default: where the hardware multiplies bf16", group=MACHINE
    )
    flash_attention2: bool = flag(False, help="attention by flash-attn 2 (if installed; a GPU and bf16)", group=MACHINE)
    device: str = flag("auto", help="auto, cpu, cuda or cuda:N", group=MACHINE)
    model_parallel_size: int = flag(1, help="processes that share one copy of the model", group=MACHINE)
    activation_checkpointing: str = flag(
        "auto",
        help="what the backward pass works out again to save memory: nothing, the blocks' feed-forward parts, or whole "
        "blocks (also the flag alone); auto: the least that fits into free memory",
        choices=("auto", *RECOMPUTED),
        switch=("off", "all"),
        group=MACHINE,
    )

    def __post_init__(self):
        counts = ("max_seq_len", "max_steps", "batch_size", "accum_iter", "save_every", "keep_checkpoints")
        for name in (*counts, "model_parallel_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("epochs", "lr", "blr"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"--{name} must be above 0, not {getattr(self, name)}")
        for name in ("min_lr", "warmup_epochs", "weight_decay", "seed"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"--{name} must be 0 or more, not {getattr(self, name)}")
        if self.epochs > 1e6 or self.seed >= 2**32:
            raise ValueError(f"--epochs {self.epochs:g} or --seed {self.seed} is too large (1e6, 2**32 - 1)")
        if self.lr is not None and self.min_lr > self.lr:
            raise ValueError(f"--min_lr {self.min_lr} is above --lr {self.lr}")
        if self.min_lr > 0 and self.lr_schedule == "constant":
            raise ValueError("--min_lr has no effect with --lr_schedule constant")
        check_machine(self.device, self.bf16, self.flash_attention2)
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite exclude each other")


# The adapters' knobs as flags; None: what the method's preset says.
AdapterFlags = make_dataclass(
    "AdapterFlags",
    [
        (name, f.type | None, field(default=None, metadata={**f.metadata, "group": "adapters (default: the method's)"}))
        for name, f in config_fields().items()
    ],
)

# RunConfig in which a resumed run may differ from its start: they do not change what is computed. Where rows and model
# lie may change too; that they are the same is told by their contents.
FREE = {
    *("resume", "overwrite", "dry_run", "save_every", "keep_checkpoints", "device", "ckpt_dir", "data_path"),
    *("output_dir", "leak_tests", "adapter_config", "model_parallel_size", "batch_size", "accum_iter"),
    "activation_checkpointing",
}
# Those in which the processes of a run may differ: what is where on a process's own machine
HERE = {"device", "ckpt_dir", "data_path", "output_dir", "leak_tests", "adapter_config"}


@dataclass(frozen=True)
class RunConfig:
    """A checked command line: `train` and the adapter settings that were typed."""

    train: TrainConfig
    adapter: dict[str, Any]
    given: frozenset[str]

    def config(self, args: ModelArgs) -> AdapterConfig:
        """The adapters for a model of this shape. ValueError naming the flag."""
        method, known = self.train.method, config_fields()
        config = AdapterConfig.from_dict({"method": method} | self.adapter, args.n_layers)
        # A file may tell what its settings would be anyway
        changed = {k for k, v in self.adapter.items() if v != METHODS[method].get(k, known[k].default)}
        problem = config.unused_flag_message(self.given & known.keys() | changed)
        if problem:
            raise ValueError(problem)
        return config


def read_settings(argv: list[str] | None, recipe: Mapping[str, Any], description: str) -> RunConfig:
    """The command line of finetune.py; what it lacks of `recipe` is taken from there where neither
    model nor data is named, which is the demo."""
    parsed = parse_into([TrainConfig, AdapterFlags], argv, prog="finetune.py", description=description)
    train, adapter = parsed.values
    given = set(parsed.given)
    for pair in ({"epochs", "max_steps"}, {"lr", "blr"}):
        if pair <= given:
            die(" and ".join(f"--{name}" for name in sorted(pair)) + " exclude each other", status=2)
        if pair & given:
            given |= pair  # the recipe has no say in either
    values, flat = asdict(train), {k: v for k, v in asdict(adapter).items() if v is not None}
    typed = frozenset(parsed.given)
    if train.adapter_config is not None:
        try:
            chosen = read_adapter_config(Path(train.adapter_config), train.method if "method" in typed else None)
        except (ValueError, OSError) as error:
            die(str(error))
        typed |= {"method"} & chosen.keys()
        values["method"], flat = chosen.pop("method", train.method if "method" in typed else "custom"), chosen | flat
    if train.data_path is None and train.ckpt_dir is None:
        values |= {name: value for name, value in recipe.items() if name not in given}
    settings = RunConfig(TrainConfig(**values), flat, typed)
    # What goes with the settings of a run's start is seen when they are read (`continued`)
    if not (train.resume and (run_folder(settings) / CONFIG).exists()):
        _check_early(settings)
    return settings


def read_adapter_config(path: Path, method: str | None) -> dict[str, Any]:
    """The adapter settings in a file: all that `adapter_params.json` holds or a part of it (the base, which is told
    there too, may be another here). ValueError naming the file, also where its method is another than `method`."""
    found = parse_json(read_text(path), str(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object of adapter settings, found {type(found).__name__}")
    found.pop("base", None)
    named = found.get("method", method)
    if named is not None and named not in tuple(METHODS):
        raise ValueError(f"{path}: method {named!r} is none of {', '.join(METHODS)}")
    if method not in (None, named):
        raise ValueError(f"{path}: its method is {named}, not {method} (--method)")
    return found


def _check_early(settings: RunConfig) -> None:
    """Refuse what does not fit together before any file of the model is read, as far as that can be known."""
    ckpt_dir = settings.train.ckpt_dir
    params = Path(ckpt_dir) / "params.json" if ckpt_dir else None
    try:
        args = ModelArgs.from_file(params) if params and params.is_file() else None
        # Without a model at hand ranges are checked against one that is deeper than any.
        settings.config(args or ModelArgs(dim=2, n_layers=10_000, n_heads=1))
    except OSError as error:
        die(f"{params}: {error.strerror}")
    except ValueError as error:
        if params and str(error).startswith(str(params)):
            die(str(error))
        words = re.findall(r"\w+", str(error).partition("(")[0])
        if settings.train.adapter_config and not settings.given & set(words):
            die(f"{settings.train.adapter_config}: {error}")
        die(str(error), status=2)


def run_folder(settings: RunConfig) -> Path:
    """Folder of a run; by default it is named after method, data and seed."""
    flags = settings.train
    if flags.output_dir is not None:
        return Path(flags.output_dir)
    data = Path(flags.data_path or "demo")
    name = data.parent.name if data.stem in ("train", "data") and data.parent.name else data.stem
    return Path("runs") / f"{flags.method}-{name}-s{flags.seed}"


def continued(settings: RunConfig) -> RunConfig:
    """With --resume and a run in the output folder: flags that are not typed are those of the run's start.

    ValueError naming the flag that is typed and differs.
    """
    folder = run_folder(settings)
    record = folder / CONFIG
    if not settings.train.resume or not (record.exists() or checkpoints(folder)):
        return settings
    start = parse_json(read_text(record), str(record))
    try:
        before, resolved, n_layers = {**start["settings"]}, {**start["adapter"]}, start["base"]["n_layers"]
        if type(n_layers) is not int:
            raise TypeError
        known = {k: v for k, v in resolved.items() if k in config_fields()} | {"method": resolved.get("method")}
        AdapterConfig.from_dict(known, n_layers)
    except (KeyError, TypeError):
        raise ValueError(f"{record}: the record of the run to resume is damaged") from None
    except ValueError as error:
        raise ValueError(f"{record}: {error}") from None
    typed = {k: v for k, v in asdict(settings.train).items() if k in settings.given}
    for name, value in typed.items():
        if name not in FREE and value != before.get(name):
            raise _other_start(folder, name, before.get(name), value)
    # An adapter's flag may also spell out what the method's preset came to
    now_flat = AdapterConfig.from_dict(known | settings.adapter, n_layers).to_dict()
    for name in settings.adapter:
        if now_flat[name] != resolved.get(name, now_flat[name]):
            raise _other_start(folder, name, resolved[name], now_flat[name])
    # Asked for once; what the start's record says of leaks holds as long as the rows are the same,
    # and the folder is the one that was looked into, whatever is written there.
    once = {"overwrite": False, "dry_run": False, "leak_tests": None, "output_dir": str(folder)}
    # What may differ need not be in the record, which may be older than the flag
    now = {k.name: k.default for k in flags_of(TrainConfig) if k.name in FREE} | before | once
    now |= {k: v for k, v in typed.items() if k in FREE}
    try:
        strange = [name for name, value in now.items() if not str(value).isprintable()]
        if strange:
            raise ValueError(f"setting {safe_name(strange[0])} has characters that no path and no setting has")
        train = {k.name: k.convert(str(now.pop(k.name))) for k in flags_of(TrainConfig)}
        adapter = {k.name: k.convert(str(now.pop(k.name))) for k in flags_of(AdapterFlags) if k.name in now}
        if now:
            raise ValueError(f"unknown setting {safe_name(next(iter(now)))}")
        if AdapterConfig.from_dict({"method": train["method"]} | adapter, n_layers).to_dict() != resolved:
            raise ValueError("what it says of the adapters does not follow from its settings")
        return replace(settings, train=TrainConfig(**train), adapter=adapter)
    except KeyError as error:
        raise ValueError(f"{record}: setting {error} is missing") from None
    except ValueError as error:
        raise ValueError(f"{record}: {error}") from None


def _other_start(folder: Path, name: str, before: Any, now: Any) -> ValueError:
    hint = "(--overwrite in the place of --resume begins anew)"
    before = before if before is None or isinstance(before, str | int | float) else short_repr(before)
    return ValueError(f"{folder}: the run was started with --{name} {before}, not {now} {hint}")
