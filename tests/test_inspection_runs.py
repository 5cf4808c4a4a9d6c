"""Runs as they are read, and charts: what they show is what was measured, and all of it can be read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from inspection import charts
from inspection.running_stats import RouterStatistics
from inspection.runs import find_runs, group_runs
from run_folders import VAL_LOSSES, log, loss, write_run
from tiny import shared, tokens


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "math"
    for method in ("soft_moa", "lora", "a_method_with_a_long_name"):
        for seed in (0, 1):
            sizes = {"trainable_parameters": 30_000} if method.startswith("a_") else {}
            write_run(folder / method / f"s{seed}", (40.0 + seed,), steps=30, **sizes)
    write_run(folder / "base" / "s0", (40.0,))
    return folder


# Reading runs


def test_a_finished_run_and_an_untuned_base(runs: Path) -> None:
    read = find_runs([runs, runs / "lora"])
    assert [run.method for run in read][:2] == ["base", "a_method_with_a_long_name"] and len(read) == 7
    assert all(run.problems == [] and run.dataset == "math" for run in read)
    run = next(run for run in read if (run.method, run.seed) == ("lora", 1))
    assert (run.logged_steps, run.numbers["trainable_parameters"]) == (30, 1_000_004)
    assert run.numbers["seconds"] == 30 * 21 and run.numbers["peak_memory_bytes"] == 30 * 2**29
    assert run.scores["AddSub (100 of 395)"]["robust"] == (42, None, [42], 5)
    assert run.val_losses == VAL_LOSSES and run.numbers["val_loss"] == 0.75 and run.numbers["best_step"] == 20
    assert run.numbers["val_score"] == 5 * 19  # of that step


def scores(**addsub: Any) -> str:
    part = {"rows": 5, "problems": 5} | {rule: {"percent": 10.0} for rule in ("published", "robust")}
    return json.dumps({"suites": {"AddSub": part | addsub}, "families": {}})


SETTINGS = '{"settings": {"seed": 3}, "adapter": {"method": "lora"}, "rows_per_step": 8, "steps": 4'


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("log.jsonl", log(1, 3) + '{"st', "1 of 4 steps in log.jsonl"),
        ("log.jsonl", None, "0 of 4 steps in log.jsonl"),
        ("log.jsonl", "nonsense\n" + log(4, 3), "log.jsonl: line 1: not valid JSON"),
        ("log.jsonl", log(4, 3).replace('"seconds"', '"secs"'), "log.jsonl: line 1: not a step (KeyError: 'seconds')"),
        ("log.jsonl", log(4, 3).replace("33.0", '"x"'), "log.jsonl: line 1: not a step (ValueError: could not"),
        ("adapter.pth", None, "no adapter file"),
        ("scores.json", None, "no scores.json"),
        ("scores.json", "{", "scores.json: not valid JSON"),
        ("scores.json", "[]", "scores.json: not scores of `python -m evaluate"),
        ("scores.json", '{"suites": {"AddSub": []}, "families": 3}', "scores.json: not scores of"),
        ("scores.json", scores(robust={"percent": "ten"}), "scores.json: not scores of"),
        ("scores.json", scores(robust={"percent": 1000}), "(ValueError: 1000 is no percentage)"),
        ("AddSub.jsonl.settings.json", "[1]", "AddSub.jsonl.settings.json: not the settings of generate.py"),
        ("config.json", "nonsense", "config.json: not valid JSON"),
        ("config.json", None, "4 of unknown steps"),
        ("config.json", "{}", "config.json: not the record of finetune.py (KeyError: 'settings')"),
        (
            "config.json",
            SETTINGS + "}",
            "config.json: not the record of finetune.py (KeyError: 'trainable_parameters')",
        ),
        ("config.json", SETTINGS + ', "trainable_parameters": "4"}', "expected whole numbers"),
    ],
)
def test_what_a_run_lacks_is_a_sentence(tmp_path: Path, name: str, text: str | None, problem: str) -> None:
    (run,) = find_runs([write_run(tmp_path / "d" / "lora" / "s3", files={name: text})])
    assert run.method == "lora" and run.seed == 3
    assert any(problem in sentence for sentence in run.problems), run.problems


def test_method_data_set_and_seed_are_in_the_path(tmp_path: Path) -> None:
    names = {"d/lora/s10": ("d", "lora", 10), "d/lora/s9": ("d", "lora", 9), "d/prompt-s8": ("d", "prompt", 8)}
    for i, path in enumerate(names):
        (tmp_path / "runs" / path).parent.mkdir(parents=True, exist_ok=True)
        write_run(tmp_path / str(i) / "lora" / "s0", files={"config.json": None}).rename(tmp_path / "runs" / path)
    read = [(run.dataset, run.method, run.seed) for run in find_runs([tmp_path / "runs"])]
    assert read == [("d", "lora", 9), ("d", "lora", 10), ("d", "prompt", 8)]


# Charts


def require_legible(figure: Any) -> None:
    """No text is small, cut off, or on another one."""
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    assert width / figure.dpi == charts.WIDTH and height / figure.dpi < 9
    visible = [axes for axes in figure.axes if axes.get_visible()]
    texts = [text for axes in visible for text in (axes.title, axes.xaxis.label)]
    texts += [tick.label1 for axes in visible for tick in axes.xaxis._update_ticks() if tick.label1.get_visible()]
    texts += [text for legend in figure.legends for text in legend.get_texts()] + figure.texts
    boxes = [text.get_window_extent() for text in texts if text.get_text().strip()]
    assert len(boxes) > 5 and all(text.get_fontsize() >= 7 for text in texts)
    for i, box in enumerate(boxes):
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, texts[i]
        for other in boxes[i + 1 :]:
            apart = box.x1 <= other.x0 + 1 or other.x1 <= box.x0 + 1 or box.y1 <= other.y0 + 1 or other.y1 <= box.y0 + 1
            assert apart, (box, other)


@pytest.fixture(autouse=True)
def in_style() -> Iterator[None]:
    with charts.styled():
        yield


@pytest.mark.parametrize("name", ["soft_moa", "sparse_moa", "unipeft", "adamole", "mola", "comol", "soft_moa_experts"])
def test_routers(name: str) -> None:
    statistics = RouterStatistics(shared(name))
    statistics.read([tokens(9).tolist(), tokens(5, seed=1).tolist()], [tokens(6, seed=2).tolist(), []])
    result = statistics.result({})
    figure = charts.routers(result)
    require_legible(figure)
    *grid, _ = [axes for axes in figure.axes if axes.get_visible()]  # the last is the colour bar
    titles = {result["method"]: "block"}
    by_title = {titles.get(heat.get_title(), heat.get_title()): (heat, lines) for heat, lines in pairs(grid)}
    assert by_title.keys() == {router["slot"] or "block" for router in result["routers"]}
    for title, (heat, lines) in by_title.items():
        routers = [router for router in result["routers"] if (router["slot"] or "block") == title]
        names = max((router["names"] for router in routers), key=len)
        cells = heat.collections[0].get_array()
        for router in routers:
            part = router["parts"]["all"]
            by_name = dict(zip(router["names"], part["mean"], strict=True))
            for i, column in enumerate(names):
                cell = cells[router["layer"], i]
                assert (cell == pytest.approx(by_name[column])) if column in by_name else cell.mask
        parts = [router["parts"]["all"] for router in routers]
        share, *more = [list(line.get_xdata()) for line in lines.lines]
        assert share == pytest.approx([sum(part["active"]) / len(part["active"]) for part in parts])
        if title == "block":
            assert more == ([[part["threshold"]["mean"] for part in parts]] if name == "sparse_moa" else [])
        else:
            assert more == [[part[measure] for part in parts] for measure in ("balance", "entropy")]


def pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)


def test_losses(runs: Path) -> None:
    curves = [(run.method, run.losses, run.val_losses) for run in find_runs([runs])[1:]]
    figure = charts.losses([*curves, ("no validation", curves[0][1], [])])
    require_legible(figure)
    lines = figure.axes[0].lines
    faint, mean, validation, best = lines[:4]
    assert [list(faint.get_xdata()), mean.get_ydata()[0]] == [list(range(1, 31)), loss(0, 0)]
    assert mean.get_ydata()[6] == pytest.approx(sum(loss(i, 0) for i in range(4, 7)) / 3)  # a tenth of 30 steps
    assert list(zip(*validation.get_data(), strict=True)) == VAL_LOSSES
    assert (best.get_xdata()[0], best.get_ydata()[0]) == (20, 0.75)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["a_method_with_a_long_name", "lora", "soft_moa", "no validation", "validation", "its lowest"]
    require_legible(charts.losses([("lora", curves[0][1], [])]))


def test_lines_differ_without_colour() -> None:
    assert len({(str(charts.look(i)["linestyle"]), charts.look(i)["marker"]) for i in range(55)}) == 55


@pytest.mark.parametrize(("rule", "extra"), [("published", 0), ("robust", 1)])
def test_tradeoff(runs: Path, rule: str, extra: int) -> None:
    figure = charts.tradeoff(group_runs(find_runs([runs])), rule, "AddSub (100 of 395)")
    require_legible(figure)
    assert {"100k", "1M"} <= {tick.get_text() for tick in figure.axes[0].get_xticklabels()}
    by_label = {line.get_label(): line for line in figure.axes[1].lines}
    assert by_label["lora"].get_xdata()[0] == 30 * 18 / 60 and by_label["lora"].get_ydata()[0] == 40.5 + extra
    assert by_label["base"].get_ydata()[0] == 40 + extra
