"""Fine-tune a LLaMA model with a mixture of adapters.

    python finetune.py --method soft_moa                                   the demo model and data
    python finetune.py --method soft_moa --ckpt_dir DIR --data_path train.json --output_dir OUT
    torchrun --nproc_per_node N finetune.py --method soft_moa ...          on N processes

Then: python extract_adapter.py OUT/checkpoint-LAST.pth
"""

import sys
from dataclasses import asdict, replace

from cli import cli_errors
from demo import RECIPE
from llama.machine import prepare_libraries
from llama.templates import ALPACA
from training.config import RunConfig, parse_flags
from training.resume import merge_with_previous_run


def main(argv: list[str] | None = None) -> None:
    config = parse_flags(argv, RECIPE, __doc__)
    with cli_errors():
        prepare_libraries()
        config = with_demo(merge_with_previous_run(config))
        if config.train.dry_run:
            from training.dry_run import print_dry_run

            print_dry_run(config)
        else:
            fine_tune(config)


def fine_tune(config: RunConfig) -> None:
    """Build the model, go on from the run's last checkpoint if there is one, and train."""
    # torch takes seconds to load, and a wrong flag should not
    from llama import Llama
    from llama.accelerate import Lanes, fuse_small_operations
    from llama.checkpoint import load_params_and_tokenizer
    from llama.distributed import bf16_is_fast, distributed_run, dp_size, get_device, is_rank0
    from moa.adapter_file import adapter_params
    from training.checkpoint import load_initial_adapter
    from training.data import load_train_and_validation
    from training.loop import expert_fraction, forward_backward, make_optimizer, train, uses_load_balancing
    from training.memory import estimate_memory, oom_hint
    from training.recorder import Recorder, log_rank0
    from training.run_folder import RunFolder
    from training.schedule import Schedule
    from training.suite_score import SuiteScore
    from training.validation import Validation

    device = get_device(config.train.device)
    args, tokenizer = load_params_and_tokenizer(config.train.ckpt_dir)
    if config.train.bf16 is None:
        config = replace(config, train=replace(config.train, bf16=bf16_is_fast(device)))
    flags, adapter_config = config.train, config.adapter_config(args)
    memory = estimate_memory(flags, args, adapter_config, device)
    with distributed_run(device, flags.model_parallel_size), oom_hint(flags, memory):
        if flags.compile:
            fuse_small_operations(device)
        run = RunFolder(config, args)
        examples, val_examples = load_train_and_validation(flags, tokenizer, quiet=not is_rank0())
        schedule = Schedule.from_config(flags, len(examples), dp_size(), run.record)
        llm = Llama.build(
            flags.ckpt_dir,
            config=adapter_config,
            bf16=flags.bf16,
            device=str(device),
            seed=flags.seed,
            model_parallel_size=flags.model_parallel_size,
            flash_attention2=flags.flash_attention2,
            quantize=flags.quantize,
        )
        model = llm.model
        memory.agree()
        model.activation_checkpointing = memory.mode
        if flags.init_adapter is not None:
            load_initial_adapter(flags.init_adapter, model, args)
        validation = None
        if val_examples:
            every = flags.eval_every or schedule.steps_per_epoch
            score = SuiteScore(llm, flags, run.path) if flags.val_suite else None
            validation = Validation(val_examples, memory.batch_size, every, flags.patience, score)
        optimizer = make_optimizer(model, flags.weight_decay, flags.beta2)
        with run.locked():
            state = run.begin(model, optimizer, schedule)
            if state.is_complete(schedule.steps):
                log_rank0(f"{run.path}: the run is complete, it ended after step {state.done}")
                return
            log_rank0(f"{run.summary(model, schedule, len(val_examples))}\n{memory.report()}")
            params = adapter_params(adapter_config, asdict(args))
            if flags.template != ALPACA:
                params["template"] = flags.template
            with (
                Recorder(run.path, flags, schedule, model, optimizer, state, params, validation) as recorder,
                Lanes(model, forward_backward, expert_fraction, uses_load_balancing(model)) as fast,
            ):
                train(
                    model,
                    optimizer,
                    examples,
                    schedule,
                    memory.batch_size,
                    flags.seed,
                    state,
                    recorder.on_step,
                    recorder.stop_signal,
                    flags.grad_clip,
                    fast,
                )
        if validation:
            log_rank0(f"the run ends after step {state.done}; {state.best}")
        log_rank0(f"{run.path}/checkpoint-{state.done}.pth: done; next: python extract_adapter.py {run.path}")


def with_demo(config: RunConfig) -> RunConfig:
    """Fill in the demo model and data where none is named, making them first if they are not there."""
    flags = config.train
    ckpt_dir, data_path = flags.ckpt_dir, flags.data_path
    if ckpt_dir is None:
        from demo.model import ensure_model

        ckpt_dir = str(ensure_model())
    if data_path is None and not (flags.dry_run and flags.ckpt_dir is not None):
        from demo.problems import ensure_data

        data_path = str(ensure_data()[0])
    return replace(config, train=replace(flags, ckpt_dir=ckpt_dir, data_path=data_path))


if __name__ == "__main__":
    main(sys.argv[1:])
