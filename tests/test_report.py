"""The report of a folder of runs: what it says, and that every text stays text."""

import base64
import json
import re
import statistics
import sys
from pathlib import Path
from xml.etree.ElementTree import Element, fromstring

import pytest

from evaluate import score_file
from inspection import report as command
from run_folders import LAYERS, SLOTS, loss, score, ten_runs, write_answers, write_gates, write_run

INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def text_of(element: Element) -> str:
    return "".join(element.itertext())


class Page:
    """A page as a program reads it. Tags that do not match are an error."""

    def __init__(self, html: str):
        self.html, self.root = html, fromstring(html)

    def of(self, tag: str) -> list[str]:
        return [text_of(element) for element in self.root.iter(tag)]

    def rows(self, caption: str) -> list[list[str]]:
        """The first table whose caption begins so."""
        tables = [table for table in self.root.iter("table") if text_of(table.find("caption")).startswith(caption)]
        return [[text_of(cell) for cell in row] for row in tables[0].iter("tr")] if tables else []

    def table(self, caption: str) -> dict[str, dict[str, str]]:
        """Row's name -> column's name -> cell."""
        head, *rows = self.rows(caption)
        return {row[0]: dict(zip(head, row, strict=True)) for row in rows}

    def missing(self) -> dict[str, str]:
        """What each run lacks."""
        return dict(self.rows("What each run lacks"))


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory):
    """Runs the command on a folder; the page that it wrote."""

    def call(folder: Path, *words: object) -> Page:
        file = tmp_path_factory.mktemp("page") / "new" / "report.html"
        command.main([str(folder), "--save_path", str(file), *map(str, words)], "report")
        assert [path.name for path in file.parent.iterdir()] == ["report.html"]
        return Page(file.read_text())

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ten_runs(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def page(read, folder: Path) -> Page:
    return read(folder, "--title", "Runs <of> mine", "--samples", 2)


def test_every_run_is_there_and_what_it_lacks(page: Page) -> None:
    overview = page.table("The methods")
    methods = "base lora soft_moa sparse_moa adamole prompt molora hydralora unipeft"
    assert sorted(overview) == sorted(methods.split())
    incomplete = {name for name, row in overview.items() if row["state"] == "1 of 1 incomplete"}
    assert incomplete == {"prompt", "molora", "hydralora"}
    assert {row["state"] for row in overview.values()} == {"1 of 1 incomplete", "complete", "complete, see notes"}
    assert overview["prompt"]["steps"] == "7" and overview["lora"]["steps"] == "20"
    assert overview["base"]["final loss"] == overview["molora"]["AddSub (3 of 395), robust %"] == "–"
    missing = page.missing()
    for name, sentences in {
        "prompt s0": ("7 of 20 steps", "no adapter file", "no scores.json", "no test"),
        "molora s0": ("no scores.json",),
        "hydralora s0": ("answers to MultiArith are not complete",),
        "unipeft s0": ("answers to SVAMP are not in scores.json",),
        "seed 1": ("no run of", "soft_moa"),
    }.items():
        assert all(words in missing[name] for words in sentences), (name, missing[name])
    assert set(missing) == {f"{name} s0" for name in (*incomplete, "unipeft")} | {"seed 1"}


def test_means_spreads_and_intervals_are_those_of_the_files(folder: Path, page: Page) -> None:
    scores = [score_file(folder / "lora" / f"s{seed}" / "AddSub.jsonl").robust for seed in (0, 1)]
    percents, widths = [s.percent for s in scores], [s.half_width for s in scores]
    assert len(set(percents)) == 2, "seeds that do not differ show no spread"
    cell = page.table("Scores of each test")["lora"]["AddSub (3 of 395), robust %"]
    mean = f"{statistics.fmean(percents):.1f} ± {statistics.fmean(widths):.1f}"
    assert cell == f"{mean}\nseeds {percents[0]:.1f}, {percents[1]:.1f}; sd {statistics.stdev(percents):.1f}"
    row = page.table("The methods")["lora"]
    last = [statistics.fmean(loss(step, seed) for step in (18, 19)) for seed in (0, 1)]
    assert row["final loss"] == f"{statistics.fmean(last):.2f}\nsd {statistics.stdev(last):.2f}"
    assert row["seeds"] == "0, 1"
    costs = page.table("What training cost")["lora"]
    assert costs["a step, s"] == "18.00\nsd 4.24" and costs["peak memory, GB"] == "10.74"
    assert costs["trained parameters"] == "1,000,004" and costs["training, min"] == "6.0\nsd 1.4"


def test_runs_with_other_settings_are_not_averaged(tmp_path: Path, read) -> None:
    for seed, rank in ((0, 8), (1, 16), (2, 8)):
        write_run(tmp_path / "d" / "lora" / f"s{seed}", adapter={"method": "lora", "lora_rank": rank})
    write_run(tmp_path / "d" / "lora" / "s3", files={"config.json": None, "scores.json": None})
    page = read(tmp_path)
    seeds = {name: row["seeds"] for name, row in page.table("The methods").items()}
    assert seeds == {"lora": "0, 2, 3", "lora (lora_rank 16)": "1"}
    differing = page.table("In what each run differs")
    assert differing["lora (lora_rank 16) s1"]["settings of its own"] == "lora_rank 16"
    assert differing["lora s0"]["settings of its own"] == "as most runs"
    assert page.table("All settings of lora s0")["run: rows_per_step"]["value"] == "32"


def test_answers_with_both_verdicts(tmp_path: Path, read) -> None:
    texts = ("The answer is 4.", "The answer is 5.", "The answer is 4. It took 2 steps.")
    folder = score(write_run(tmp_path / "d" / "lora" / "s0"), texts)
    page = read(tmp_path)
    kinds = ["right under both rules", "wrong under both rules", "the two rules differ"]
    captions = [f"AddSub, row {i + 1}: {kind}" for i, kind in enumerate(kinds)]
    assert [caption for caption in page.of("caption") if caption.startswith("AddSub")] == captions
    answer = dict(page.rows(captions[2]))
    assert answer["answered"] == texts[2] and answer["right answer"] == "4"
    assert (answer["published rule"], answer["robust rule"]) == ("✗ wrong: took 2", "✓ right: took 4")
    assert "Answers" not in read(tmp_path, "--samples", 0).of("h3")
    write_answers(folder / "AddSub.jsonl", ["4", "4", "4"])
    sentence = "scores.json has 33.3 % for AddSub (published), its answers give 100.0 % now"
    assert sentence in read(tmp_path).missing()["lora s0"]


def test_verdicts_on_programs_come_from_a_file(tmp_path: Path, read) -> None:
    folder = score(write_run(tmp_path / "d" / "lora" / "s0"))
    row = {"task_id": "HumanEval/0", "instruction": "Write f.", "prompt": "", "test": "", "entry_point": "f"}
    write_answers(folder / "humaneval.jsonl", ["def f(): pass"], **row)
    assert "a report runs no programs, and verdicts.jsonl has none of HumanEval" in read(tmp_path).missing()["lora s0"]
    verdict = {"found": "def f(): pass", "right": False, "why": "AssertionError in line 3"}
    line = {"suite": "HumanEval", "index": 0, "generate": "def f(): pass", "published": verdict, "robust": verdict}
    (folder / "verdicts.jsonl").write_text(json.dumps(line | row) + "\n")
    answer = dict(read(tmp_path).rows("HumanEval, row 1: wrong under both rules"))
    assert answer["task"] == "HumanEval/0" and "AssertionError in line 3" in answer["robust rule"]


def test_routers_as_figures_and_numbers(page: Page) -> None:
    gates = page.table("Gates of sparse_moa s0")
    assert list(gates) == [str(layer) for layer in range(LAYERS)] and set(SLOTS) < set(gates["0"])
    assert gates["2"]["p_adapter"] == f"{5 / 6:.3f}\nsd 0.100, on 75%"
    assert (gates["2"]["used"], gates["2"]["threshold"]) == ("3.000", "0.250")
    assert page.table("Gates of soft_moa s0")["1"]["threshold"] == "–"
    experts = page.table("Experts of adamole s0")["0 lora_Q"]
    assert experts["3"].startswith("0.400") and experts["used"] == "2.000" and experts["balance"] == "0.875"


def test_every_chart_is_an_svg_inside_the_page(page: Page) -> None:
    words = ["Percent right", "against trained parameters", "Loss:", "Median time", "Experts of adamole"]
    words += ["Mean gates of soft_moa", "Mean gates of sparse_moa"]
    captions = [image.get("alt") for image in page.root.iter("img")]
    assert len(captions) == len(words)
    assert all(any(word in caption for caption in captions) for word in words), captions
    for image in page.root.iter("img"):
        svg = base64.b64decode(image.get("src").removeprefix("data:image/svg+xml;base64,"))
        assert b"<svg" in svg and b"<script" not in svg and b'href="http' not in svg


def test_costs_that_were_measured(tmp_path: Path, read) -> None:
    score(write_run(tmp_path / "d" / "lora" / "s0"))
    file = tmp_path / "costs.json"
    costs = {"seconds_per_step": 1.5, "seconds_per_epoch": 120, "peak_memory_bytes": 2**30}
    file.write_text(json.dumps({"methods": {"lora": costs}, "base": costs, "peers": {}, "task": {}}))
    assert next(read(tmp_path, "--costs", file).root.iter("img")).get("alt") == "Costs measured on equal terms"


def test_no_text_becomes_markup(page: Page) -> None:
    assert not INVISIBLE.search(page.html.replace("\n", "").replace("\t", "")), "a character that cannot be seen"
    assert not {"script", "iframe", "object", "embed", "form", "base"} & {element.tag for element in page.root.iter()}
    assert not [name for element in page.root.iter() for name in element.keys() if name.startswith("on")]
    text = text_of(page.root)
    markup, spelt = "</style><script>document.title='taken'", "\\x1b[31m\\u202eevil\\u202c"
    assert all(words in text for words in (markup, spelt, "\\ud83d", "\\x00", "&lt;b&gt;"))
    assert "more characters are not shown" in text and text.count("very long") < 400
    assert page.of("h1") == ["Runs <of> mine"] == page.of("title")


def test_nothing_is_asked_of_the_network(page: Page) -> None:
    links = [link for element in page.root.iter() for name in ("href", "src") if (link := element.get(name))]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "url(" not in page.html and "@import" not in page.html and len(page.html) < 2_000_000
    assert [meta.get("content") for meta in page.root.iter("meta")][1].startswith("default-src 'none'")


def test_hostile_names_of_folders_and_methods(tmp_path: Path, read) -> None:
    for name in ("<b>&$x_$", "\x1b[31m\u202e", "مرحبا🙂"):
        score(write_run(tmp_path / "d$<i>" / name / "s0"))
    page = read(tmp_path)
    assert not page.of("b")
    assert set(page.table("The methods")) == {"\\x1b[31m\\u202e", "<b>&$x_$", "مرحبا🙂"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", json.dumps({"settings": 3, "adapter": {"method": ["x"]}, "steps": "many"})),
        ("log.jsonl", '{"step": 0, "loss": 0}\nnonsense\n{"step": 0, "loss": null}\n'),
        ("scores.json", json.dumps({"families": {"m": {"suites": ["A"], "mean": {"published": {"percent": "9"}}}}})),
        ("AddSub.jsonl", "{"),
        ("gates.json", '{"format": "moa-router-statistics"}'),
        ("notatest.jsonl", ""),
    ],
)
def test_a_damaged_file_takes_nothing_else_with_it(tmp_path: Path, name: str, content: str, read) -> None:
    score(write_run(tmp_path / "d" / "lora" / "s0"))
    (score(write_run(tmp_path / "d" / "soft_moa" / "s0")) / name).write_text(content)
    page = read(tmp_path)
    overview = page.table("The methods")
    assert len(overview) == 2 and overview["lora"]["state"] == "complete"
    assert name.split(".")[0] in page.missing()["soft_moa s0"], "nobody would know"


@pytest.mark.parametrize("change", [{"mean": ["x"] * 4}, {"mean": [0.5]}, {"used": None}, {"active": 3}])
def test_damaged_statistics_are_named(tmp_path: Path, change: dict, read) -> None:
    file = write_gates(score(write_run(tmp_path / "d" / "lora" / "s0"))) / "gates.json"
    content = json.loads(file.read_text())
    content["blocks"][1]["parts"]["all"] |= change
    file.write_text(json.dumps(content))
    assert "gates.json: not router statistics" in read(tmp_path).missing()["lora s0"]


def test_a_folder_without_trainings_or_scores(tmp_path: Path, read) -> None:
    folder = score(write_run(tmp_path / "d" / "base" / "s0"))
    headings = ["Overview", "What is missing", "Scores", "Answers", "Configuration"]
    assert read(tmp_path).of("h3") == headings
    (folder / "scores.json").unlink()
    assert read(tmp_path).of("h3") == [name for name in headings if name != "Scores"]


@pytest.mark.parametrize(
    ("words", "expected", "status"),
    [
        (["EMPTY"], "no run in it", 1),
        (["none"], "none: no such folder", 1),
        (["FULL", "--save_path", "EMPTY"], "--save_path", 2),
        (["FULL", "--samples", "-1"], "--samples", 2),
        (["FULL", "--costs", "FULL/lora/s0/config.json"], "config.json: not what `python -m benchmarks.step", 1),
    ],
)
def test_a_wrong_call_is_refused(words, expected, status, folder: Path, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as end:
        command.main([word.replace("EMPTY", str(tmp_path)).replace("FULL", str(folder)) for word in words], "report")
    assert end.value.code == status and expected in capsys.readouterr().err


def test_without_jinja2(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(SystemExit):
        command.main([str(folder / "base"), "--save_path", str(tmp_path / "x.html")], "report")
    assert "jinja2, which is not installed" in capsys.readouterr().err
