"""Take the adapter out of a training checkpoint.

    python extract_adapter.py OUT/checkpoint-LAST.pth

writes OUT/adapter.pth (the adapter's tensors) and OUT/adapter_params.json (all that rebuilds the model around them).
LAST stands for the newest step; checkpoint-BEST.pth, the lowest validation loss, is a file of a run with validation.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from cli import cli_errors, flag, parse
from training.resume import BEST, checkpoints


@dataclass(frozen=True)
class Flags:
    checkpoint: str = flag(help="OUT/checkpoint-STEP.pth (LAST, BEST), or the folder OUT", positional=True)
    best: bool = flag(False, help="of a folder: the checkpoint of the lowest validation loss, not the newest")
    output_dir: str | None = flag(None, help="where to write; default: the checkpoint's folder")


def find_checkpoint(path: Path, best: bool) -> Path:
    """The file itself, or the newest (best) checkpoint where a folder or .../checkpoint-LAST.pth is named."""
    if best:
        if not path.is_dir():
            raise ValueError(f"{path}: no folder; --best takes {BEST} of a folder")
        return path / BEST
    if path.is_file() or not (path.is_dir() or path.name == "checkpoint-LAST.pth"):
        return path
    folder = path if path.is_dir() else path.parent
    if not checkpoints(folder):
        raise ValueError(f"{folder}: no checkpoint-STEP.pth in it")
    return checkpoints(folder)[-1][1]


def main(argv: list[str] | None = None) -> None:
    flags = parse(Flags, argv, prog="extract_adapter.py", description=__doc__)
    with cli_errors():
        from moa.adapter_file import save_adapter
        from moa.files import load_tensors
        from moa.reading import short_repr

        checkpoint = find_checkpoint(Path(flags.checkpoint), flags.best)
        content = load_tensors(checkpoint)
        if not {"adapter", "adapter_params", "step"} <= content.keys():
            raise ValueError(f"{checkpoint}: not a checkpoint of finetune.py (no adapter in it)")
        if type(content["step"]) is not int:
            raise ValueError(f"{checkpoint}: step must be a whole number, not {short_repr(content['step'])}")
        try:
            folder = Path(flags.output_dir) if flags.output_dir else checkpoint.parent
            path = save_adapter(folder, content["adapter"], content["adapter_params"])
        except ValueError as error:
            raise ValueError(f"{checkpoint}: {error}") from None
        size = sum(tensor.numel() for tensor in content["adapter"].values())
        print(f"{path}: {size:,} parameters after {content['step']} steps")


if __name__ == "__main__":
    main(sys.argv[1:])
