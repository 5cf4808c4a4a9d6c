"""Made-up run folders in all the states that tables, figures and reports meet, with texts that would like to be
markup."""

import json
import math
from pathlib import Path
from typing import Any

from evaluate import score_file
from evaluate.report import scores_json

HOSTILE = "</span></style><script>document.title='taken'</script><img src=x onerror=alert(1)>"
HOSTILE += "&lt;b&gt;\x1b[31m\u202eevil\u202c $x_$"
LONG = "very long " * 200_000
HALF = "half a pair: \ud83d, and the end: \0"
VAL_LOSSES = [(10, 1.0), (20, 0.75), (30, 0.875)]
LAYERS, SLOTS = 3, ("lora_Q", "lora_FFN_DOWN", "prompt", "p_adapter")


def write_run(
    folder: Path,
    percents: tuple[float, ...] = (10.0,),
    steps: int = 4,
    suites: tuple[str, ...] = ("AddSub",),
    rows: int = 100,
    settings: dict[str, Any] | None = None,
    answers: dict[str, Any] | None = None,
    files: dict[str, str | None] | None = None,
    **changes: Any,
) -> Path:
    """A finished run in DATASET/METHOD/sSEED. settings: typed ones; answers: how the rows were answered, so many rows;
    files: name -> text, None: left out; changes: of config.json's entries."""
    folder.mkdir(parents=True)
    method, seed = folder.parent.name.partition("-")[0], int(folder.name[1:])
    how = {"temperature": 0, "data_sha256": "ab" * 32, "seed": 0, "adapter_sha256": str(folder)} | (answers or {})
    content, scores = {f"{suite}.jsonl": "{}\n" for suite in suites}, {}
    for suite, percent in zip(suites, percents, strict=True):
        both = {rule: {"percent": percent + i, "half_width": 5.0} for i, rule in enumerate(("published", "robust"))}
        scores[suite] = {"file": f"x/{suite}.jsonl", "rows": rows, "problems": 395, "samples": rows, **both}
        content[f"{suite}.jsonl.settings.json"] = json.dumps(how)
    mean = {rule: {"percent": sum(s[rule]["percent"] for s in scores.values()) / len(scores)} for rule in both}
    families = {"math": {"suites": list(suites), "mean": mean}}
    content["scores.json"] = json.dumps({"suites": scores, "families": families})
    if method != "base":
        typed = {"seed": seed, "output_dir": str(folder), "batch_size": seed + 1, "weight_decay": 0.02, "lr": None}
        record = {"settings": typed | (settings or {}), "adapter": {"method": method, "lora_rank": 8}}
        record |= {"steps": steps, "rows_per_step": 32, "trainable_parameters": 1_000_000 + len(method), "lr": 1e-3}
        record |= {"base_fingerprint": "cd" * 32, "data_sha256": "ef" * 32, "rows": 99, "warmup_steps": 1} | changes
        content |= {"config.json": json.dumps(record), "adapter.pth": "tensors", "log.jsonl": log(steps, seed)}
    for name, text in (content | (files or {})).items():
        if text is not None:
            (folder / name).write_text(text)
    return folder


def log(steps: int, seed: int) -> str:
    validation = dict(VAL_LOSSES)
    entries = [
        {"step": i + 1, "loss": loss(i, seed), "seconds": 15.0 + 6 * seed, "tokens": 300}
        | {"peak_memory_bytes": (i + 1) * 2**29}
        | ({"val_loss": validation[i + 1], "val_score": 5.0 * i} if i + 1 in validation else {})
        for i in range(steps)
    ]
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def loss(step: int, seed: int) -> float:
    return 1.5 * math.exp(-step / 8) + 0.5 + 0.01 * seed


def write_answers(file: Path, texts: list[str], **fields: Any) -> None:
    """Answers to as many rows, all of whose right answer is 4."""
    row = {"instruction": "What is 2 + 2?", "input": "", "output": "4", "answer": "4"} | fields
    file.write_text("".join(json.dumps(row | {"generate": text}) + "\n" for text in texts))


def score(folder: Path, texts: tuple[str, ...] = ("The answer is 4.", "It is 5", "It is 4 or 7.")) -> Path:
    """Give a run real answers to AddSub, and their scores."""
    write_answers(folder / "AddSub.jsonl", list(texts))
    text = scores_json([score_file(folder / "AddSub.jsonl")])
    (folder / "scores.json").write_text(text, encoding="utf-8", errors="backslashreplace")
    return folder


def write_gates(folder: Path, threshold: bool = False, experts: int = 0) -> Path:
    """Statistics as `python -m inspection gates` saves them, as far as they are used."""
    routers = []
    for layer in range(LAYERS):
        n = experts or len(SLOTS)
        part = {"count": 9, "mean": [(layer + i) / 6 / n for i in range(n)], "std": [0.1] * n, "active": [0.75] * n}
        part |= {"threshold": {"mean": 0.125 * layer, "std": 0.1}} if threshold else {}
        part |= {"balance": 0.875, "entropy": 0.5} if experts else {}
        names = list(map(str, range(experts))) if experts else list(SLOTS)
        router = {"layer": layer, "slot": "lora_Q" if experts else None, "names": names, "unit": "token"}
        routers.append(router | {"parts": {"all": part}})
    content = {"format": "moa-router-statistics", "version": 3, "method": "x", "n_layers": LAYERS, "routers": routers}
    content |= {"source": {"data": "test.json", "rows": 3}, "counts": {"prompt": 6, "answer": 3, "all": 9}}
    (folder / "gates.json").write_text(json.dumps(content))
    return folder


def ten_runs(root: Path) -> Path:
    """Ten runs of nine methods, three of them incomplete, one full of hostile texts."""
    data = root / "runs" / "gsm8k"
    for method in ("base", "lora", "soft_moa", "sparse_moa", "adamole", "molora", "hydralora"):
        score(write_run(data / method / "s0", steps=20))
    score(write_run(data / "lora" / "s1", steps=20), ("4", "4", "5"))
    write_gates(data / "soft_moa" / "s0")
    write_gates(data / "sparse_moa" / "s0", threshold=True)
    write_gates(data / "adamole" / "s0", experts=4)
    files = {"log.jsonl": log(7, 0), "adapter.pth": None, "scores.json": None, "AddSub.jsonl": None}
    write_run(data / "prompt" / "s0", steps=20, files=files)
    (data / "molora" / "s0" / "scores.json").unlink()
    score(write_run(data / "unipeft" / "s0", steps=20, settings={HOSTILE: HOSTILE, HALF: LONG}), (HALF,))
    return data
