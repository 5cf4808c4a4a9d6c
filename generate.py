"""Answer test rows with a model and its adapter.

    python generate.py --ckpt_dir DIR --adapter_path OUT/adapter.pth --data_path test.json --save_path OUT/AddSub.jsonl
    torchrun --nproc_per_node N generate.py ...         the rows are shared out among N processes

Each line of the result is the test row plus "generate". Started again, it does only the rows that are missing.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from cli import cli_errors, flag, parse
from demo.model import ensure_model
from demo.problems import ensure_data
from llama.data import encode_prompt
from llama.machine import QUANTIZATIONS, check_machine, check_sampling, prepare_libraries
from llama.templates import ALPACA, TEMPLATES, prompt_fields, require_template
from moa.methods import METHODS
from moa.reading import read_rows

WHAT, HOW, MACHINE = "model and rows", "generation", "machine"


@dataclass(frozen=True)
class Flags:
    save_path: str = flag(help="file of predictions to write, as OUT/AddSub.jsonl", group=WHAT)
    ckpt_dir: str | None = flag(None, help="base model, a folder in Meta's layout; default: the demo model", group=WHAT)
    adapter_path: str | None = flag(None, help="adapter.pth, beside its adapter_params.json; default: none", group=WHAT)
    method: str | None = flag(
        None, help="method of an authors' adapter whose flags do not tell", choices=tuple(METHODS), group=WHAT
    )
    template: str | None = flag(
        None, help="how rows become prompts; default: as the adapter was trained", choices=TEMPLATES, group=WHAT
    )
    data_path: str | None = flag(None, help="test rows, JSON or JSON lines; default: the demo's", group=WHAT)
    overwrite: bool = flag(False, help="begin anew where save_path exists", group=WHAT)
    max_rows: int | None = flag(
        None, least=1, help="answer only the first so many rows (more may follow later)", group=WHAT
    )
    max_gen_len: int = flag(200, least=1, help="new tokens at most", group=HOW)
    min_gen_len: int = flag(120, help="a row's input is cut so that so many tokens can follow", group=HOW)
    min_new_tokens: int = flag(0, help="the end of the answer is not chosen before this many tokens", group=HOW)
    temperature: float = flag(0.1, help="0: greedy", group=HOW)
    top_p: float = flag(0.75, help="draw from the most likely tokens that together have this probability", group=HOW)
    num_samples: int = flag(1, least=1, help="answers per row; more than one: 'generate' is a list", group=HOW)
    seed: int = flag(0, help="seed of the draws", group=HOW)
    max_seq_len: int = flag(512, least=1, help="longest prompt with its answer, in tokens", group=HOW)
    max_batch_size: int = flag(32, least=1, help="rows that are generated at once", group=MACHINE)
    bf16: bool | None = flag(None, help="base in bf16; default: where the hardware multiplies bf16", group=MACHINE)
    quantize: str | None = flag(
        None, help="hold the base's matrices in 4 bits (needs bitsandbytes)", choices=QUANTIZATIONS, group=MACHINE
    )
    flash_attention2: bool = flag(False, help="attention by flash-attn 2 (if installed; a GPU and bf16)", group=MACHINE)
    cuda_graphs: bool = flag(False, help="record a decode step's kernels, start them together (a GPU)", group=MACHINE)
    compile: bool = flag(False, help="compile decode steps of one row (a CPU and a C++ compiler)", group=MACHINE)
    device: str = flag("auto", help="auto, cpu, cuda or cuda:N", group=MACHINE)
    model_parallel_size: int = flag(1, least=1, help="processes that share one copy of the model", group=MACHINE)

    def __post_init__(self):
        check_sampling(self.temperature, self.top_p)
        check_machine(
            self.device, self.bf16, self.flash_attention2, self.cuda_graphs, self.model_parallel_size, self.compile
        )
        if self.adapter_path == "":
            raise ValueError("--adapter_path is empty; leave it out for the base alone")
        if not 0 <= self.min_new_tokens <= self.max_gen_len:
            raise ValueError(f"--min_new_tokens {self.min_new_tokens} must be 0 to --max_gen_len {self.max_gen_len}")
        if not 1 <= self.min_gen_len < self.max_seq_len:
            raise ValueError(f"--min_gen_len {self.min_gen_len} must be 1 or more, and below --max_seq_len")
        if self.method is not None and self.adapter_path is None:
            raise ValueError("--method has no effect without --adapter_path")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError("--num_samples above 1 needs a --temperature above 0: greedy answers are all the same")


def main(argv: list[str] | None = None) -> None:
    flags = parse(Flags, argv, prog="generate.py", description=__doc__)
    advice = f"lower --max_batch_size (now {flags.max_batch_size}) or --max_seq_len ({flags.max_seq_len})"
    with cli_errors(memory_advice=advice):
        prepare_libraries()
        run(flags)


def run(flags: Flags) -> None:
    """Answer the rows that have no answer yet, on all processes."""
    # torch takes seconds to load, and a wrong flag should not
    import torch.distributed as dist

    from llama import Llama
    from llama.distributed import assert_same_on_all_ranks, distributed_run, dp_rank, dp_size, get_device, is_rank0
    from llama.predictions import Predictions
    from moa.adapter_file import recorded_template

    # The demo's where none is named, made first if they are not there
    ckpt_dir = str(ensure_model()) if flags.ckpt_dir is None else flags.ckpt_dir
    data_path = str(ensure_data()[1]) if flags.data_path is None else flags.data_path
    device = get_device(flags.device)
    with distributed_run(device, flags.model_parallel_size):
        template = flags.template or recorded_template(flags.adapter_path, ALPACA)
        rows = read_rows(data_path, prompt_fields(template))[: flags.max_rows]
        settings = settings_of(flags, ckpt_dir, data_path, device)
        predictions = Predictions(Path(flags.save_path), rows, settings, dp_rank(), flags.overwrite)
        missing = predictions.missing
        assert_same_on_all_ranks(settings | {"rows without an answer": missing})  # and nobody adds to them before this
        if missing:
            llm = Llama.build(
                ckpt_dir,
                flags.adapter_path,
                method=flags.method,
                max_seq_len=flags.max_seq_len,
                max_batch_size=flags.max_batch_size,
                bf16=settings["bf16"],
                device=str(device),
                model_parallel_size=flags.model_parallel_size,
                flash_attention2=flags.flash_attention2,
                quantize=flags.quantize,
                cuda_graphs=flags.cuda_graphs,
                compile=flags.compile,
            )
            require_template(llm.tokenizer, template)
        if is_rank0():
            predictions.start()
        dist.barrier()
        predictions.require_started()
        try:
            if missing:
                answer_rows(flags, template, llm, rows, missing[dp_rank() :: dp_size()], predictions)
            dist.barrier()
            if is_rank0():
                predictions.finish()
                print(f"{flags.save_path}: {'' if missing else 'complete, all '}{len(rows)} rows", file=sys.stderr)
        finally:
            predictions.release()


def answer_rows(flags: Flags, template: str, llm, rows: list[dict], share: list[int], predictions) -> None:
    """Answer this data-parallel rank's share of the rows (their numbers)."""
    from llama.distributed import is_rank0
    from moa.parallel import mp_rank

    room = flags.max_seq_len - flags.min_gen_len
    prompts = {}
    for i in share:
        try:
            prompts[i] = encode_prompt(llm.tokenizer, rows[i], room, template)
        except ValueError as error:
            raise ValueError(f"row {i + 1} of the rows to answer: {error}") from None
    too_long = [i for i in share if len(prompts[i]) >= flags.max_seq_len]
    jobs = [(i, sample) for i in sorted({*share} - {*too_long}) for sample in range(flags.num_samples)]
    answers: dict[int, list[str | None]] = {i: [None] * flags.num_samples for i in share}
    writes = mp_rank() == 0  # the ranks of a model-parallel group generate the same
    if too_long and writes:
        numbers = ", ".join(str(i + 1) for i in too_long[:5])
        print(f"{len(too_long)} rows leave no room for an answer (rows {numbers})", file=sys.stderr)

    with tqdm(total=len(share), unit="row", disable=None if is_rank0() else True) as bar:

        def keep(i: int, samples: list[str]) -> None:
            bar.update()
            if writes:
                predictions.add(i, samples[0] if flags.num_samples == 1 else samples)

        def on_finish(job: int, tokens: list[int]) -> None:
            i, sample = jobs[job]
            answers[i][sample] = llm.tokenizer.decode(tokens)
            if None not in answers[i]:
                keep(i, answers[i])

        for i in too_long:
            keep(i, [""] * flags.num_samples)
        llm.generate(
            [prompts[i] for i, _ in jobs],
            flags.max_gen_len,
            flags.min_new_tokens,
            flags.temperature,
            flags.top_p,
            flags.seed,
            [sample for _, sample in jobs],
            on_finish,
        )


def settings_of(flags: Flags, ckpt_dir: str, data_path: str, device) -> dict:
    """Everything that the answers depend on; paths are not among it, what the files hold is."""
    from llama.checkpoint import fingerprint
    from llama.distributed import bf16_is_fast
    from moa.adapter_file import PARAMS, adapter_file
    from moa.files import file_hash

    named = {"save_path", "ckpt_dir", "adapter_path", "data_path"}
    free = named | {"overwrite", "max_rows", "max_batch_size", "device", "model_parallel_size", "cuda_graphs"}
    settings = {name: value for name, value in asdict(flags).items() if name not in free}
    settings["compile"] = flags.compile or None  # as in files from before this flag
    settings["bf16"] = bf16_is_fast(device) if flags.bf16 is None else flags.bf16
    adapter = adapter_file(flags.adapter_path) if flags.adapter_path else None
    return settings | {
        "base_fingerprint": fingerprint(ckpt_dir),
        "data_sha256": file_hash(data_path),
        "adapter_sha256": file_hash(adapter) if adapter else None,
        "adapter_params_sha256": file_hash(adapter.with_name(PARAMS)) if adapter else None,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
