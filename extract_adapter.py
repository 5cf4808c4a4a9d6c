"""Take the adapter out of a training checkpoint.

    python extract_adapter.py OUT/checkpoint-LAST.pth

writes OUT/adapter.pth (the adapter's tensors) and OUT/adapter_params.json (all that rebuilds the model around them).
LAST stands for the newest step.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from cli import errors, knob, parse


@dataclass(frozen=True)
class Flags:
    checkpoint: str = knob(help="OUT/checkpoint-STEP.pth, OUT/checkpoint-LAST.pth, or the folder OUT", positional=True)
    output_dir: str | None = knob(None, help="where to write; default: the checkpoint's folder")


def main(argv: list[str] | None = None) -> None:
    flags = parse(Flags, argv, prog="extract_adapter.py", description=__doc__)
    with errors():
        from moa.adapter_file import save_adapter
        from moa.files import read_torch

        checkpoint = newest(Path(flags.checkpoint))
        content = read_torch(checkpoint)
        if not isinstance(content.get("adapter"), dict) or not isinstance(content.get("adapter_params"), dict):
            raise ValueError(f"{checkpoint}: not a checkpoint of finetune.py (no adapter in it)")
        path = save_adapter(
            Path(flags.output_dir) if flags.output_dir else checkpoint.parent,
            content["adapter"],
            content["adapter_params"],
        )
        size = sum(tensor.numel() for tensor in content["adapter"].values())
        print(f"{path}: {size:,} parameters after {content['step']} steps")


def newest(path: Path) -> Path:
    """The file meant: itself, or the newest checkpoint where a folder or .../checkpoint-LAST.pth is named."""
    if path.is_file() or not (path.is_dir() or path.name == "checkpoint-LAST.pth"):
        return path
    folder = path if path.is_dir() else path.parent
    found = {f.stem.removeprefix("checkpoint-"): f for f in folder.glob("checkpoint-*.pth")}
    steps = [int(step) for step in found if step.isdecimal()]
    if not steps:
        raise ValueError(f"{folder}: no checkpoint-STEP.pth in it")
    return found[str(max(steps))]


if __name__ == "__main__":
    main(sys.argv[1:])
