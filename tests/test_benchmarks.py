"""Measurements run, and compare like with like: their figures are nobody's concern here."""

import json

from commands import run, write_rows
from tiny import BASE


def test_a_step_is_measured_beside_pefts_on_the_same_task(tmp_path) -> None:
    """Equal first losses are required by the command itself: PEFT's model has our weights and our labels."""
    data, figures = write_rows(tmp_path / "rows.json", 8), tmp_path / "figures.json"
    words = ["--ckpt_dir", BASE, "--data_path", data, "--methods", "soft_moa", "--rows", 2, "--repeats", 2, "--peft"]
    result = run("-m", "benchmarks.step", *words, "--threads", 1, "--json", figures)
    assert result.returncode == 0, result.stderr
    found = json.loads(figures.read_text())
    assert list(found["seconds"]) == list(found["memory"]) == ["base", "soft_moa", "PEFT lora"]
    assert all(len(times) == 2 and min(times) > 0 for times in found["seconds"].values())
    assert found["labels"] < found["tokens"] and all(found["memory"].values())
    assert sum(line.startswith("| ") for line in result.stdout.splitlines()) == 4
