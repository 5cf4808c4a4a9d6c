"""Figures: what they show is what was measured, and all of it can be read."""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from inspection import figures as command
from inspection.plots import comparison, curves, gates, loads, style
from inspection.runs import find_runs, read_run
from inspection.statistics import Statistics
from tiny import shared, tokens

METHODS = ["soft_moa", "sparse_moa", "soft_moa_instance", "unipeft"]


def statistics_of(name: str) -> dict[str, Any]:
    llm = shared(name)
    found = Statistics(llm.model)
    with found.recorder():
        llm.generate([tokens(9).tolist(), tokens(5, seed=1).tolist()], 6, min_new_tokens=6)
    return found.result({})


def write_run(folder: Path, **changes: Any) -> Path:
    """A finished run's files; a change of None leaves a file out."""
    method, seed = folder.parent.name, int(folder.name[1:])
    record = {"settings": {"seed": seed}, "adapter": {"method": method}, "steps": 30, "trainable_parameters": 4000}
    log = [{"step": i + 1, "loss": 3 / (i + 1), "seconds": 2.0, "peak_memory_bytes": 10**9 + i} for i in range(30)]
    mean = {rule: {"percent": 40.0 + seed, "half_width": 5.0} for rule in ("published", "robust")}
    files = {
        "config.json": json.dumps(record),
        "log.jsonl": "".join(json.dumps(entry) + "\n" for entry in log),
        "adapter.pth": "x",
        "AddSub.jsonl": "{}\n",
        "scores.json": json.dumps({"suites": {}, "mean": mean, "families": {}}),
    } | changes
    folder.mkdir(parents=True)
    for name, text in files.items():
        if text is not None:
            (folder / name).write_text(text)
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "math"
    for method in ("soft_moa", "lora", "a_method_with_a_long_name"):
        for seed in (0, 1):
            write_run(folder / method / f"s{seed}")
    write_run(folder / "base" / "s0", **{"config.json": None, "log.jsonl": None, "adapter.pth": None})
    return folder


# Reading runs


def test_a_finished_run_and_an_untuned_base(runs: Path) -> None:
    found = find_runs(runs)
    assert [run.name for run in found][:3] == [
        "base s0",
        "a_method_with_a_long_name s0",
        "a_method_with_a_long_name s1",
    ]
    assert all(run.missing == [] and run.dataset == "math" for run in found)
    run = read_run(runs / "lora" / "s1")
    assert (run.method, run.seed, run.steps, run.trainable_parameters) == ("lora", 1, 30, 4000)
    assert run.seconds == 60 and run.peak_memory_bytes == 10**9 + 29 and len(run.log) == 30
    assert run.mean_score("robust") == 41 and run.half_width("robust") == 5
    assert run.answers == {"AddSub": runs / "lora" / "s1" / "AddSub.jsonl"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"log.jsonl": '{"step": 1, "loss": 2.0}\n{"step": 2, "lo'}, ["the training stands at step 1 of 30"]),
        ({"log.jsonl": None}, ["the training stands at step 0 of 30"]),
        ({"adapter.pth": None}, ["adapter.pth is not there"]),
        ({"scores.json": None}, ["scores.json is not there: the answers were not scored"]),
        ({"scores.json": "{"}, ["scores.json cannot be read: scores.json: not valid JSON"]),
        ({"scores.json": "[]"}, ["scores.json holds no JSON object"]),
        ({"AddSub.jsonl": None, "AddSub.jsonl.part0": ""}, ["no test was answered", "the answers to AddSub are not"]),
        ({"config.json": "nonsense"}, ["config.json cannot be read", "at step 30 of an unknown number"]),
        ({"config.json": "{}"}, ["no object 'settings'", "no object 'adapter'", "'trainable_parameters'", "'steps'"]),
    ],
)
def test_what_a_run_lacks_is_told(tmp_path: Path, changes: dict[str, Any], told: list[str]) -> None:
    run = read_run(write_run(tmp_path / "d" / "lora" / "s3", **changes))
    assert run.method == "lora" and run.seed == 3
    for words in told:
        assert any(words in sentence for sentence in run.missing), (words, run.missing)


def test_folders(tmp_path: Path) -> None:
    assert find_runs(tmp_path) == []
    with pytest.raises(ValueError, match="nothing: no such folder"):
        find_runs(tmp_path / "nothing")
    for name in ("s10", "s9"):
        write_run(tmp_path / "lora" / name)
    assert [run.seed for run in find_runs(tmp_path)] == [9, 10]


# Figures can be read


def texts(figure: Any) -> list[tuple[Any, Any]]:
    """Each text that is drawn, and its box in pixels."""
    from matplotlib.text import Text

    labels, drawn = set(), set()
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        labels |= {label for tick in (*axis.majorTicks, *axis.minorTicks) for label in (tick.label1, tick.label2)}
        if axis.axes.get_visible():
            drawn |= {label for tick in axis._update_ticks() for label in (tick.label1, tick.label2)}
    found = [text for text in figure.findobj(Text) if text in drawn or text not in labels]
    hidden = {axes for axes in figure.axes if not axes.get_visible()}
    found = [text for text in found if text.get_visible() and text.get_text().strip() and text.axes not in hidden]
    return [(text, text.get_window_extent()) for text in found]


def require_legible(figure: Any) -> None:
    """No text is small, cut off, or on another one."""
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    assert width / figure.dpi == style.WIDTH and height / figure.dpi < 9
    drawn = texts(figure)
    assert len(drawn) > 5
    for i, (text, box) in enumerate(drawn):
        assert text.get_fontsize() >= 7, text
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text
        for other, its_box in drawn[i + 1 :]:
            apart = box.x1 <= its_box.x0 + 1 or its_box.x1 <= box.x0 + 1
            apart = apart or box.y1 <= its_box.y0 + 1 or its_box.y1 <= box.y0 + 1
            assert apart, (text, other)


@pytest.fixture(autouse=True)
def in_style() -> Iterator[None]:
    with style.styled():
        yield


@pytest.mark.parametrize("part", ["all", "prompt", "answer"])
def test_layer_by_slot(part: str) -> None:
    named = [("soft", statistics_of("soft_moa")), ("sparse", statistics_of("sparse_moa"))]
    figure = gates.layer_by_slot(named, part)
    require_legible(figure)
    soft, sparse, threshold, used, _ = figure.axes
    for axes, (_, found) in ((soft, named[0]), (sparse, named[1])):
        cells, slots = axes.collections[0].get_array(), gates.slots_of(found)
        assert [tick.get_text() for tick in axes.get_xticklabels()] == slots
        for block in found["blocks"]:
            mean = dict(zip(block["slots"], block["parts"][part]["mean"], strict=True))
            for i, slot in enumerate(slots):
                cell = cells[block["layer"], i]
                assert (cell == pytest.approx(mean[slot])) if slot in mean else cell.mask
    parts = [block["parts"][part] for block in named[1][1]["blocks"]]
    assert list(threshold.lines[0].get_xdata()) == [one["threshold"]["mean"] for one in parts]
    assert list(used.lines[0].get_xdata()) == [one["used"]["mean"] for one in parts]


@pytest.mark.parametrize("names", [["soft_moa", "sparse_moa"] * 2, ["sparse_moa", "sparse_moa", "unipeft"]])
def test_more_than_two_heatmaps_stand_below_each_other(names: list[str]) -> None:
    figure = gates.layer_by_slot([(f"{name} {i}", statistics_of(name)) for i, name in enumerate(names)], "all")
    require_legible(figure)
    titles = [axes.get_title() for axes in figure.axes]
    boxes = [axes.get_window_extent() for axes, title in zip(figure.axes, titles, strict=True) if title[-1:].isdigit()]
    assert [f"{name} {i}" for i, name in enumerate(names)] == [title for title in titles if title[-1:].isdigit()]
    assert boxes[0].y1 == boxes[1].y1 and max(box.y1 for box in boxes[2:]) < min(box.y0 for box in boxes[:2])


@pytest.mark.parametrize("names", [METHODS, ["custom"], ["sparse_moa_const_threshold", "soft_moa_linear_router"]])
def test_spreads(names: list[str]) -> None:
    named = [(name, statistics_of(name)) for name in names]
    figure = gates.spreads(named, "all")
    require_legible(figure)
    axes, found = figure.axes[0], named[0][1]
    slot = axes.get_title()
    blocks = [
        (block["slots"].index(slot), block["parts"]["all"]) for block in found["blocks"] if slot in block["slots"]
    ]
    count = sum(part["count"] for _, part in blocks)
    heights = axes.lines[0].get_ydata()
    assert heights[0] == pytest.approx(1 - sum(part["active"][i] * part["count"] for i, part in blocks) / count)
    half = sum(sum(part["histogram"][i][:25]) for i, part in blocks) / count
    assert heights[25] == pytest.approx(half) and heights[-1] == 1


def test_agreement_of_mean_gates() -> None:
    one, other = statistics_of("soft_moa"), statistics_of("sparse_moa")
    (line,) = gates.agreement([("a", one), ("b", one)], "all")
    assert line == "mean gates of a and b: correlation 1.000 over 18 layers and slots"
    assert len(gates.agreement([("a", one), ("b", other), ("c", one)], "all")) == 3


@pytest.mark.parametrize("name", ["adamole", "topk_moelora", "molora", "prompt_moe", "soft_moa_experts"])
def test_loads(name: str) -> None:
    found = statistics_of(name)
    assert loads.chooses(found) == (name in ("adamole", "topk_moelora"))
    show = "load" if loads.chooses(found) else "mean"
    figure = loads.layer_by_expert(name, found, "all", show)
    require_legible(figure)
    first = next(one for one in found["experts"] if one["slot"] == figure.axes[0].get_title())
    cells = figure.axes[0].collections[0].get_array()
    assert list(cells[first["layer"]]) == pytest.approx(first["parts"]["all"][show])
    balance, entropy = figure.axes[1].lines
    assert balance.get_xdata()[0] == first["parts"]["all"]["balance"]
    assert entropy.get_xdata()[0] == first["parts"]["all"]["entropy"]


def test_losses(runs: Path) -> None:
    found = [run for run in find_runs(runs) if run.log]
    figure = curves.losses([(run.name, run) for run in found], 5)
    require_legible(figure)
    lines = figure.axes[0].lines[1::2]
    assert [line.get_label() for line in lines] == [run.name for run in found]
    assert lines[0].get_ydata()[0] == 3 and lines[0].get_ydata()[6] == pytest.approx(
        sum(3 / i for i in range(3, 8)) / 5
    )
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
    assert len(looks) == len(found)


def test_looks_differ_without_colour() -> None:
    assert len({(str(style.dash(i)), style.mark(i)) for i in range(curves.MOST)}) == curves.MOST


@pytest.mark.parametrize("rule", ["published", "robust"])
def test_tradeoff(runs: Path, rule: str) -> None:
    figure = comparison.tradeoff(find_runs(runs), rule)
    require_legible(figure)
    by_label = {line.get_label(): line for line in figure.axes[1].lines}
    assert by_label["lora"].get_xdata()[0] == 1 and by_label["lora"].get_ydata()[0] == 40.5
    assert by_label["base"].get_ydata()[0] == 40


def test_cost() -> None:
    hours = {f"method_number_{i}": i + 1 for i in range(13)}
    methods = {name: {"seconds_per_epoch": 3600.0 * n, "seconds_per_answer": 0.5} for name, n in hours.items()}
    methods["method_number_0"] = {"peak_memory_bytes": 2e9}
    figure = comparison.costs(methods)
    require_legible(figure)
    assert [axes.get_xlabel() for axes in figure.axes] == ["an epoch, hours", "peak memory, GB", "an answer, seconds"]
    assert [bar.get_width() for bar in figure.axes[0].patches] == list(range(2, 14))
    minutes = comparison.costs({"lora": {"seconds_per_epoch": 90.0, "seconds_per_step": 1.0}}).axes
    assert [axes.get_xlabel() for axes in minutes] == ["an epoch, minutes"]
    assert minutes[0].patches[0].get_width() == 1.5


# The command


def run(*words: object) -> None:
    command.main([str(word) for word in words], "figures")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    for name in ("soft_moa", "sparse_moa", "adamole"):
        (folder / f"{name}.json").write_text(json.dumps(statistics_of(name)))
    torch.manual_seed(0)
    return folder


def test_every_figure_is_written_the_same_each_time_without_a_trace_of_the_machine(saved: Path, runs: Path) -> None:
    soft, sparse, adamole = (saved / f"{name}.json" for name in ("soft_moa", "sparse_moa", "adamole"))
    cost = saved / "cost.json"
    cost.write_text(
        json.dumps({"methods": {"lora": {"seconds_per_step": 2.0, "trainable": 1}}, "base": {"seconds_per_step": 1}})
    )
    asked = [
        ("gates", "--statistics", f"{soft},{sparse}"),
        ("spread", "--statistics", f"{soft},{sparse}", "--names", "one,two"),
        ("loads", "--statistics", adamole),
        ("losses", "--runs", runs),
        ("tradeoff", "--runs", runs),
        ("cost", "--costs", cost),
    ]
    for kind, *words in asked:
        run(kind, *words, "--save_path", saved / f"{kind}.svg")
        for ending in ("svg", "png"):
            content = (saved / f"{kind}.{ending}").read_bytes()
            assert 1000 < len(content) < 200_000, (kind, ending, len(content))
            for trace in (str(saved), "Date", "date>", "Software", "Matplotlib v"):
                assert trace.encode() not in content, (kind, ending, trace)
    for kind, *words in (asked[0], asked[-1]):
        run(kind, *words, "--save_path", saved / "again")
        for ending in ("svg", "png"):
            assert (saved / f"again.{ending}").read_bytes() == (saved / f"{kind}.{ending}").read_bytes()


@pytest.mark.parametrize(
    ("words", "told", "status"),
    [
        (["gates", "--statistics", "SAVED/adamole.json"], "adamole.json: method adamole has no block's router", 1),
        (["loads", "--statistics", "SAVED/soft_moa.json"], "soft_moa.json: method soft_moa has no mixture", 1),
        (["loads", "--statistics", "a,b"], "a figure of loads is of one file", 2),
        (["gates", "--statistics", "SAVED/none.json"], "none.json: no such file", 1),
        (["gates", "--statistics", "a,b", "--names", "one"], "--names has 1 names for 2", 2),
        (["losses", "--runs", "SAVED"], "no run in it", 1),
        (["losses", "--runs", "RUNS/base"], "no run with a loss", 1),
        (["losses", "--runs", "RUNS", "--smooth", "0"], "--smooth must be at least 1", 2),
        (["tradeoff", "--runs", "RUNS/base"], "no finished run", 1),
        (["cost", "--costs", "SAVED/soft_moa.json"], "soft_moa.json: no object 'methods'", 1),
        (["heatmap"], "gates, spread, loads", 2),
    ],
)
def test_what_is_missing_is_named(saved: Path, runs: Path, words: list[str], told: str, status: int, capsys) -> None:
    words = [word.replace("SAVED", str(saved)).replace("RUNS", str(runs)) for word in words]
    with pytest.raises(SystemExit) as end:
        run(*words, *(["--save_path", saved / "no"] if len(words) > 1 else []))
    assert end.value.code == status and told in capsys.readouterr().err
    assert not list(saved.glob("no*"))


def test_unfinished_runs_are_left_out_aloud(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_run(runs / "lora" / "s2", **{"log.jsonl": '{"step": 1, "loss": 1.0}\n'})
    run("tradeoff", "--runs", runs, "--save_path", tmp_path / "t")
    assert re.search(r"lora/s2: left out, the training stands at step 1 of 30", capsys.readouterr().err)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        run("cost", "--costs", tmp_path, "--save_path", tmp_path / "x")
    assert "figures need matplotlib, which is not installed" in capsys.readouterr().err
