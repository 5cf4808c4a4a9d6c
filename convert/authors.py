"""An adapter of ours in the format of the paper's authors; what theirs is called is in `moa/authors.py`."""

from dataclasses import asdict
from pathlib import Path

from convert import layout
from convert.peft import OUR_FILES, recorded_shape
from moa.adapter_file import load_adapter, save_reference_adapter


def to_authors(adapter_path: str | Path, output: str | Path, overwrite: bool = False) -> Path:
    """Write the adapter into folder `output`. ValueError or OSError naming the file, or the setting that their format
    cannot express; then nothing was written."""
    output = layout.check_output(output, overwrite, OUR_FILES)
    config, state = load_adapter(adapter_path, asdict(recorded_shape(Path(adapter_path))))
    with layout.new_folder(output, overwrite, OUR_FILES) as new:
        save_reference_adapter(new, state, config)
    return output
