"""The flags of a fine-tuning run. Needs no torch, so that a wrong flag is refused at once."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, make_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cli import cli_errors, die, flag, parse_into
from evaluate.tasks import task_named
from llama.args import ModelArgs
from llama.machine import QUANTIZATIONS, check_machine
from llama.templates import TEMPLATES
from moa.config import AdapterConfig
from moa.methods import METHODS, config_fields
from moa.reading import parse_json, read_text, short_repr

CHECKPOINTING_MODES = ("none", "selective", "full")  # of --activation_checkpointing; each saves less than the last
_OLD_MODES = {"off": "none", "False": "none", "ffn": "selective", "all": "full", "True": "full"}  # earlier names
BATCH_SIZE, LARGEST_BATCH_SIZE = 4, 32  # rows of a micro-batch: the default, and at most with --batch_size auto
TRACKERS = ("trackio", "wandb")  # packages of which one may be installed
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
    val_data_path: str | None = flag(None, help="validation rows, like --data_path; default: none", group=DATA)
    val_share: float | None = flag(
        None, above=0, help="share of the training rows to validate on instead; the seed draws them", group=DATA
    )
    val_suite: str | None = flag(
        None, help="suite of python -m evaluate to answer and score at each validation too", group=DATA
    )
    val_suite_path: str | None = flag(None, help="its test rows; default: those of --val_data_path", group=DATA)
    val_suite_rows: int = flag(32, least=1, help="how many of them, from the first on", group=DATA)
    template: str = flag("alpaca", help="how rows become prompts; chats need another", choices=TEMPLATES, group=DATA)
    leak_tests: str | None = flag(
        None, help="test files or folders, with commas: are their rows among the training rows?", group=DATA
    )
    max_seq_len: int = flag(
        300, least=1, help="longest row in tokens, prompt and answer; longer ones are cut or left out", group=DATA
    )
    init_adapter: str | None = flag(
        None, help="adapter.pth, or its folder, whose numbers the adapters start from; same settings", group=DATA
    )
    output_dir: str | None = flag(None, help="folder of the run; default: runs/METHOD-DATA-sSEED", group=RUN)
    seed: int = flag(0, least=0, help="seed of the adapters' start and of the order of rows", group=RUN)
    save_every: int | None = flag(None, least=1, help="steps between checkpoints; default: one per epoch", group=RUN)
    keep_checkpoints: int | None = flag(
        None, least=1, help="how many of the newest to keep, beside the best; default: all", group=RUN
    )
    eval_every: int | None = flag(
        None, least=1, help="steps between validations; default: one per epoch; always one at the end", group=RUN
    )
    patience: int | None = flag(
        None, least=1, help="end after so many validations without a lower loss; default: never", group=RUN
    )
    report_to: str | None = flag(
        None, help="log to this too, beside TensorBoard; on this machine alone", choices=TRACKERS, group=RUN
    )
    resume: bool = flag(False, help="go on from the output folder's last whole checkpoint, if it has one", group=RUN)
    overwrite: bool = flag(False, help="delete the checkpoints of an earlier run in the output folder", group=RUN)
    dry_run: bool = flag(False, help="print parameters, steps and memory, last as JSON, and stop", group=RUN)
    epochs: float = flag(2.0, above=0, help="passes over the data", group=STEPS)
    max_steps: int | None = flag(None, least=1, help="stop after this many optimizer steps instead", group=STEPS)
    batch_size: int | None = flag(
        BATCH_SIZE,
        least=1,
        none="auto",
        help=f"rows per data-parallel rank and micro-batch; auto: a step has the rows of --batch_size {BATCH_SIZE}, in "
        f"the largest micro-batches, of at most {LARGEST_BATCH_SIZE} rows, that fit into free memory",
        group=STEPS,
    )
    accum_iter: int = flag(1, least=1, help="micro-batches per optimizer step", group=STEPS)
    lr: float | None = flag(None, above=0, help="peak learning rate; default: blr * rows per step / 256", group=STEPS)
    blr: float = flag(6e-3, above=0, help="peak learning rate per 256 rows", group=STEPS)
    min_lr: float = flag(0.0, least=0, help="learning rate at the end", group=STEPS)
    warmup_epochs: float | None = flag(
        None, least=0, help="epochs of linear warm-up; default: half of the run, at most 1", group=STEPS
    )
    lr_schedule: str = flag("cosine", help="after the warm-up", choices=("cosine", "constant"), group=STEPS)
    weight_decay: float = flag(0.02, least=0, help="AdamW's, on matrices", group=STEPS)
    beta2: float = flag(0.95, help="AdamW's second beta; the first is 0.9", group=STEPS)
    grad_clip: float | None = flag(
        None, above=0, help="largest norm of a step's gradient, over all adapters; default: no limit", group=STEPS
    )
    train_on_input: bool = flag(False, help="learn the prompt as well, not the answer alone", group=STEPS)
    bf16: bool | None = flag(
        None, help="base in bf16 (adapters stay fp32); default: where the hardware multiplies bf16", group=MACHINE
    )
    quantize: str | None = flag(
        None, help="hold the base's matrices in 4 bits (needs bitsandbytes)", choices=QUANTIZATIONS, group=MACHINE
    )
    flash_attention2: bool = flag(False, help="attention by flash-attn 2 (if installed; a GPU and bf16)", group=MACHINE)
    compile: bool = flag(False, help="fuse small operations with torch.compile", group=MACHINE)
    device: str = flag("auto", help="auto, cpu, cuda or cuda:N", group=MACHINE)
    model_parallel_size: int = flag(1, least=1, help="processes that share one copy of the model", group=MACHINE)
    activation_checkpointing: str = flag(
        "auto",
        help="what the backward pass recomputes to save memory: none; selective, the blocks' feed-forward parts; full "
        "(or the flag alone), whole blocks; auto, the least that fits into free memory. The rest are earlier names",
        choices=("auto", *CHECKPOINTING_MODES, *_OLD_MODES),
        alone="full",
        group=MACHINE,
    )

    def __post_init__(self):
        if self.epochs > 1e6 or self.seed >= 2**32:
            raise ValueError(f"--epochs {self.epochs:g} or --seed {self.seed} is too large (1e6, 2**32 - 1)")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"--beta2 must be from 0 to below 1, not {self.beta2}")
        if self.lr is not None and self.min_lr > self.lr:
            raise ValueError(f"--min_lr {self.min_lr} is above --lr {self.lr}")
        if self.min_lr > 0 and self.lr_schedule == "constant":
            raise ValueError("--min_lr has no effect with --lr_schedule constant")
        check_machine(self.device, self.bf16, self.flash_attention2)
        if self.quantize and self.model_parallel_size > 1:
            raise ValueError("--quantize needs --model_parallel_size 1")
        mode = self.activation_checkpointing
        object.__setattr__(self, "activation_checkpointing", _OLD_MODES.get(mode, mode))
        if self.val_data_path is not None and self.val_share is not None:
            raise ValueError("--val_data_path and --val_share exclude each other")
        if self.val_share is not None and self.val_share >= 1:
            raise ValueError(f"--val_share must be below 1, not {self.val_share:g}")
        if self.val_suite and not (self.val_data_path or (self.val_share and self.val_suite_path)):
            raise ValueError("--val_suite needs --val_data_path, or --val_share and --val_suite_path")
        if self.val_suite and task_named(self.val_suite).runs_code:
            raise ValueError(f"--val_suite {self.val_suite}: programs are scored afterwards, by evaluate")
        if self.report_to and find_spec(self.report_to) is None:
            raise ValueError(f"--report_to {self.report_to}: the package {self.report_to} is not installed")
        if self.resume and self.overwrite:
            raise ValueError("--resume and --overwrite exclude each other")

    @property
    def rows_per_rank(self) -> int:
        """Rows of an optimizer step on each data-parallel rank."""
        return (self.batch_size or BATCH_SIZE) * self.accum_iter


ADAPTER_GROUP = "adapters (default: the method's)"
# The options of the adapters as flags; None: the method's preset decides.
AdapterFlags = make_dataclass(
    "AdapterFlags",
    [
        (name, f.type | None, flag(None, help=f.metadata["help"], choices=f.metadata["choices"], group=ADAPTER_GROUP))
        for name, f in config_fields().items()
    ],
)

# Flags in which a resumed run may differ from its start: they do not change what is computed. Where the rows and the
# base lie may change too; that they are the same is told by their contents.
RESUMABLE_FIELDS = frozenset(
    "resume overwrite dry_run report_to save_every keep_checkpoints device ckpt_dir data_path val_data_path "
    "val_suite_path output_dir leak_tests adapter_config model_parallel_size batch_size accum_iter "
    "activation_checkpointing".split()
)
# Flags in which the processes of a run may differ: paths and devices of a process's own machine.
PER_HOST_FIELDS = frozenset(
    "device ckpt_dir data_path val_data_path val_suite_path init_adapter output_dir leak_tests adapter_config".split()
)


@dataclass(frozen=True)
class RunConfig:
    """A checked command line. adapter: the adapter options that were typed; explicit: the names of all typed flags."""

    train: TrainConfig
    adapter: dict[str, Any]
    explicit: frozenset[str]

    @property
    def folder(self) -> Path:
        """The folder of the run; by default it is named after method, data and seed."""
        flags = self.train
        if flags.output_dir is not None:
            return Path(flags.output_dir)
        data = Path(flags.data_path or "demo")
        name = data.parent.name if data.stem in ("train", "data") and data.parent.name else data.stem
        return Path("runs") / f"{flags.method}-{name}-s{flags.seed}"

    @property
    def record(self) -> Path:
        """The file that holds the record of the run's start."""
        return self.folder / "config.json"

    def adapter_config(self, args: ModelArgs) -> AdapterConfig:
        """Return the adapters for a model of this shape. ValueError names the flag that does not fit."""
        preset, known = METHODS[self.train.method], config_fields()
        config = AdapterConfig.from_dict({"method": self.train.method} | self.adapter, args.n_layers)
        # A file may spell out a default that the configuration does not use.
        changed = {name for name, value in self.adapter.items() if value != preset.get(name, known[name].default)}
        problem = config.unused_flag_message(self.explicit & known.keys() | changed)
        if problem:
            raise ValueError(problem)
        return config


def parse_flags(argv: list[str] | None, recipe: Mapping[str, Any], description: str) -> RunConfig:
    """Return the checked command line of finetune.py.

    recipe: values for flags that are not typed, of a run that names neither model nor data (the demo).
    """
    parsed = parse_into([TrainConfig, AdapterFlags], argv, prog="finetune.py", description=description)
    train, adapter = parsed.values
    explicit, decided = parsed.given, set(parsed.given)
    for pair in ({"epochs", "max_steps"}, {"lr", "blr"}):
        if pair <= explicit:
            die(" and ".join(f"--{name}" for name in sorted(pair)) + " exclude each other", status=2)
        if pair & explicit:
            decided |= pair  # the recipe has no say in either
    values = asdict(train)
    options = {name: value for name, value in asdict(adapter).items() if value is not None}
    if train.adapter_config is not None:
        method = train.method if "method" in explicit else None
        with cli_errors():
            from_file = read_adapter_config(Path(train.adapter_config), method)
        explicit |= {"method"} & from_file.keys()
        values["method"] = from_file.pop("method", method or "custom")
        options = from_file | options
    if train.data_path is None and train.ckpt_dir is None:
        values |= {name: value for name, value in recipe.items() if name not in decided}
    if {"resume", "init_adapter"} <= explicit:
        die("--resume goes on with a run's own adapter: leave --init_adapter out", status=2)
    config = RunConfig(TrainConfig(**values), options, explicit)
    # Whether flags fit the start of a run to resume is checked by `merge_with_previous_run`
    if not (train.resume and config.record.exists()):
        _check_adapters(config)
        for name in ("eval_every", "patience"):
            if name in explicit and train.val_data_path is None and train.val_share is None:
                die(f"--{name} has no effect without --val_data_path or --val_share", status=2)
        for name in ("val_suite_path", "val_suite_rows"):
            if name in explicit and train.val_suite is None:
                die(f"--{name} has no effect without --val_suite", status=2)
    return config


def read_adapter_config(path: Path, method: str | None) -> dict[str, Any]:
    """Read adapter options from a file: an `adapter_params.json` (its base does not matter) or a part of one.

    ValueError names the file, also where its method is another than `method`.
    """
    options = parse_json(read_text(path), str(path))
    if not isinstance(options, dict):
        raise ValueError(f"{path}: expected a JSON object of adapter settings, found {type(options).__name__}")
    options.pop("base", None)
    named = options.get("method", method)
    if named is not None and named not in tuple(METHODS):
        raise ValueError(f"{path}: method {short_repr(named)} is none of {', '.join(METHODS)}")
    if method not in (None, named):
        raise ValueError(f"{path}: its method is {named}, not {method} (--method)")
    return options


def _check_adapters(config: RunConfig) -> None:
    """Exit with one sentence where the adapter flags do not fit together or, if its params.json is there, the base."""
    flags = config.train
    args = ModelArgs(dim=2, n_layers=10_000, n_heads=1)  # deeper than any: for ranges where no base is at hand
    params = Path(flags.ckpt_dir or "") / "params.json"
    if flags.ckpt_dir and params.is_file():
        with cli_errors():
            args = ModelArgs.from_file(params)
    try:
        config.adapter_config(args)
    except ValueError as error:
        if flags.adapter_config:
            die(f"{flags.adapter_config}: {error}")
        die(str(error), status=2)
