"""A made-up folder of runs in all the states that a report meets, with texts that would like to be markup."""

import json
import math
from pathlib import Path
from typing import Any

from evaluate import score_file
from evaluate.report import scores_json

HOSTILE = "</span></style><script>document.title='taken'</script><img src=x onerror=alert(1)>"
HOSTILE += "&lt;b&gt;\x1b[31m\u202eevil\u202c"
HALF = "half a pair: \ud83d, and the end: \0"
LAYERS, SLOTS = 3, ("lora_Q", "lora_FFN_DOWN", "prompt", "p_adapter")


def write_run(
    place: Path, method: str, seed: int = 0, steps: int = 20, done: int | None = None, **changes: Any
) -> Path:
    """A run that is finished unless told otherwise. changes: `settings` and `adapter` (entries of config.json),
    `answers` (texts of AddSub), `scored`, `extracted`."""
    place.mkdir(parents=True)
    if method != "base":
        settings = {"seed": seed, "output_dir": str(place), "batch_size": 2, "weight_decay": 0.02, "lr": 1e-3}
        record = {
            "settings": settings | changes.get("settings", {}),
            "adapter": {"method": method, "lora_rank": 8} | changes.get("adapter", {}),
            "steps": steps,
            "rows_per_step": 2,
            "trainable_parameters": 1_000_000 + 1000 * len(method),
            "base_fingerprint": "cd" * 32,
            "data_sha256": "ef" * 32,
        }
        (place / "config.json").write_text(json.dumps(record))
        log = [
            {"step": i + 1, "loss": loss(i, seed), "seconds": 2.0 + seed, "tokens": 300, "peak_memory_bytes": 2**30 + i}
            for i in range(steps if done is None else done)
        ]
        (place / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
        if done is None and changes.get("extracted", True):
            (place / "adapter.pth").write_bytes(b"tensors")
    if done is None:
        write_answers(place / "AddSub.jsonl", changes.get("answers", ["The answer is 4.", "It is 5", "It is 4 or 7."]))
        if changes.get("scored", True):
            write_scores(place)
    return place


def loss(step: int, seed: int) -> float:
    return 1.5 * math.exp(-step / 8) + 0.5 + 0.01 * seed


def write_answers(file: Path, texts: list[str], **fields: Any) -> None:
    """Answers to as many rows, all of whose right answer is 4."""
    asked = {"instruction": "What is 2 + 2?", "input": "", "output": "4", "answer": "4"} | fields
    file.write_text("".join(json.dumps(asked | {"generate": text}) + "\n" for text in texts))
    settings = {"temperature": 0.0, "max_gen_len": 100, "data_sha256": "ab" * 32, "seed": 0}
    file.with_name(f"{file.name}.settings.json").write_text(json.dumps(settings))


def write_scores(place: Path) -> None:
    text = scores_json([score_file(file) for file in sorted(place.glob("*.jsonl")) if file.name != "log.jsonl"])
    (place / "scores.json").write_text(text, encoding="utf-8", errors="backslashreplace")


def write_gates(place: Path, threshold: bool = False, experts: int = 0) -> None:
    """Statistics as `python -m inspection gates` saves them, as far as a report reads them."""
    blocks, mixtures = [], []
    for layer in range(LAYERS):
        gates = [(layer + i) / 6 for i in range(len(SLOTS))]
        part = {"count": 9, "mean": gates, "std": [0.1] * len(SLOTS), "active": [0.75] * len(SLOTS)}
        part["used"] = {"mean": 2.5 + layer / 4, "histogram": []}
        if threshold:
            part["threshold"] = {"mean": 0.125 * layer, "std": 0.1}
        blocks.append({"layer": layer, "unit": "token", "slots": list(SLOTS), "parts": {"all": part}})
        shares = [(i + 1) / sum(range(1, experts + 1)) for i in range(experts)]
        told = {"mean": shares, "load": [0.25] * experts, "used": {"mean": 2.0}, "balance": 0.875, "entropy": 0.5}
        mixtures.append({"layer": layer, "slot": "lora_Q", "experts": experts, "parts": {"all": told}})
    content = {"format": "moa-router-statistics", "version": 1, "source": {"data": "test.json", "rows": 3}}
    content |= {"counts": {"prompt": 6, "answer": 3, "all": 9}}
    content |= {"blocks": [] if experts else blocks, "experts": mixtures if experts else []}
    (place / "gates.json").write_text(json.dumps(content))


def ten_runs(root: Path) -> Path:
    """Ten runs and an empty folder where an eleventh should be."""
    data = root / "runs" / "gsm8k"
    write_run(data / "base" / "s0", "base")
    write_run(data / "lora" / "s0", "lora")
    write_run(data / "lora" / "s1", "lora", 1, answers=["4", "4", "5"])
    write_gates(write_run(data / "soft_moa" / "s0", "soft_moa"))
    write_gates(write_run(data / "sparse_moa" / "s0", "sparse_moa"), threshold=True)
    write_gates(write_run(data / "adamole" / "s0", "adamole"), experts=4)
    write_run(data / "prompt" / "s0", "prompt", done=7)
    write_run(data / "molora" / "s0", "molora", scored=False)
    hydra = write_run(data / "hydralora" / "s0", "hydralora")
    (hydra / "MultiArith.jsonl.part0").write_text('{"index": 0, "generate": "4"}\n')
    hostile = [HOSTILE + " The answer is 4.", HALF, "very long " * 200_000 + "5", "مرحبا 5"]
    bad = write_run(data / "unipeft" / "s0", "unipeft", answers=hostile, settings={HOSTILE: HOSTILE})
    write_answers(bad / "SVAMP.jsonl", ["4"], instruction=HOSTILE, answer="4")
    (data / "topk_moelora" / "s0").mkdir(parents=True)
    return data
