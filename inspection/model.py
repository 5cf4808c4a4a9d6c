"""The flags that name a model and its machine, and the running model."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from cli import flag
from llama import Llama
from llama.distributed import bf16_is_fast, distributed_run, get_device
from llama.machine import check_machine
from llama.templates import ALPACA
from moa.adapter_file import recorded_template
from moa.methods import METHODS

WHAT, MACHINE = "model", "machine"


@dataclass(frozen=True)
class ModelFlags:
    """Which model, and where it runs; as in generate.py."""

    adapter_path: str = flag(help="adapter.pth, beside its adapter_params.json, or their folder", group=WHAT)
    ckpt_dir: str = flag(help="base model, a folder in Meta's layout", group=WHAT)
    method: str | None = flag(
        None, help="method of an authors' adapter whose flags do not tell", choices=tuple(METHODS), group=WHAT
    )
    max_seq_len: int = flag(512, least=1, help="longest prompt with its answer, in tokens", group=WHAT)
    max_batch_size: int = flag(32, least=1, help="rows that are read at once", group=MACHINE)
    bf16: bool | None = flag(None, help="base in bf16; default: where the hardware multiplies bf16", group=MACHINE)
    device: str = flag("auto", help="auto, cpu, cuda or cuda:N", group=MACHINE)
    model_parallel_size: int = flag(1, least=1, help="processes that share one copy of the model", group=MACHINE)

    def __post_init__(self):
        check_machine(self.device, self.bf16, False)


@contextmanager
def running(flags: ModelFlags) -> Iterator[Llama]:
    """The model among the processes of this run. ValueError where its prompts are not of Alpaca's template."""
    template = recorded_template(flags.adapter_path, ALPACA)
    if template != ALPACA:
        raise ValueError(
            f"{flags.adapter_path}: trained with --template {template}; only {ALPACA}'s prompts are read here"
        )
    device = get_device(flags.device)
    with distributed_run(device, flags.model_parallel_size):
        yield Llama.build(
            flags.ckpt_dir,
            flags.adapter_path,
            method=flags.method,
            max_seq_len=flags.max_seq_len,
            max_batch_size=flags.max_batch_size,
            bf16=bf16_is_fast(device) if flags.bf16 is None else flags.bf16,
            device=str(device),
            model_parallel_size=flags.model_parallel_size,
        )
