"""Fine-tune a LLaMA model with a mixture of adapters.

    python finetune.py --method soft_moa                                      the demo model and data
    python finetune.py --method soft_moa --ckpt_dir DIR --data_path train.json --output_dir OUT
    torchrun --nproc_per_node N finetune.py --method soft_moa ...             on N processes

Then: python extract_adapter.py OUT/checkpoint-LAST.pth
"""

import sys
from dataclasses import replace

from cli import cli_errors
from demo import RECIPE
from llama.machine import prepare_cpu
from training.config import RunConfig, merge_with_previous_run, parse_flags


def main(argv: list[str] | None = None) -> None:
    settings = parse_flags(argv, RECIPE, __doc__)
    with cli_errors():
        prepare_cpu()
        settings = with_demo(merge_with_previous_run(settings))
        # torch takes seconds to load, and a wrong flag should not
        if settings.train.dry_run:
            from training.dry_run import print_dry_run

            print_dry_run(settings)
        else:
            from training.run import run

            run(settings)


def with_demo(settings: RunConfig) -> RunConfig:
    """Fill in the demo model and data where none is named, making them first if they are not there."""
    flags = settings.train
    ckpt_dir, data_path = flags.ckpt_dir, flags.data_path
    if ckpt_dir is None:
        from demo.model import ensure_model

        ckpt_dir = str(ensure_model())
    if data_path is None and not (flags.dry_run and flags.ckpt_dir is not None):
        from demo.problems import ensure_data

        data_path = str(ensure_data()[0])
    return replace(settings, train=replace(flags, ckpt_dir=ckpt_dir, data_path=data_path))


if __name__ == "__main__":
    main(sys.argv[1:])
