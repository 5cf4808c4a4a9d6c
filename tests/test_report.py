"""The report of a folder of runs: what it says, and that every text stays text."""

import base64
import json
import re
import statistics
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from evaluate import score_file
from inspection import report as command
from inspection.report import make_report
from run_folders import LAYERS, SLOTS, loss, score, ten_runs, write_answers, write_gates, write_run

INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


class Reader(HTMLParser):
    """A page as a program reads it: elements with their attributes and texts; `problems` where tags do not match."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.problems: list[str] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(html)
        self.close()
        self.problems += [f"<{name}> is not closed" for name, _ in self._open]

    def handle_starttag(self, tag, attrs):
        texts: list[str] = []
        self.elements.append((tag, dict(attrs), texts))
        if tag not in ("meta", "link", "img"):
            self._open.append((tag, texts))

    def handle_endtag(self, tag):
        if not self._open or self._open[-1][0] != tag:
            self.problems.append(f"</{tag}> closes nothing")
        else:
            self._open.pop()

    def handle_data(self, data):
        for _, texts in self._open:
            texts.append(data)

    def of(self, *tags: str) -> list[str]:
        """The whole texts of all elements with these names."""
        return ["".join(texts) for tag, _, texts in self.elements if tag in tags]

    def attributes(self, tag: str, name: str) -> list[str]:
        return [attributes[name] or "" for other, attributes, _ in self.elements if other == tag and name in attributes]

    def table(self, caption: str) -> dict[str, dict[str, str]]:
        """The table whose caption begins so: row's name -> column's name -> cell."""
        rows: list[list[str]] = []
        inside = False
        for tag, _, texts in self.elements:
            if tag == "caption":
                inside = "".join(texts).startswith(caption) and not rows
            elif inside and tag == "tr":
                rows.append([])
            elif inside and tag in ("td", "th"):
                rows[-1].append("".join(texts))
        return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}

    def missing(self) -> dict[str, str]:
        """What each run lacks."""
        tags = [(tag, "".join(texts)) for tag, _, texts in self.elements if tag in ("h3", "dt", "dd")]
        names = [text for tag, text in tags]
        section = tags[names.index("What is missing") + 1 :]
        end = next((i for i, (tag, _) in enumerate(section) if tag == "h3"), len(section))
        texts = [text for _, text in section[:end]]
        return dict(zip(texts[::2], texts[1::2], strict=True))


def read(folder: Path, per_kind: int = 1, costs: Path | None = None) -> Reader:
    return Reader(make_report(folder, "x", per_kind, "", costs).html)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ten_runs(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def html(folder: Path) -> str:
    report = make_report(folder, "Runs <of> mine", 2, "2026-01-02")
    assert (report.runs, report.incomplete) == (10, 3)
    return report.html


@pytest.fixture(scope="module")
def page(html: str) -> Reader:
    return Reader(html)


def test_every_run_is_there_and_what_it_lacks(page: Reader) -> None:
    overview = page.table("The methods")
    methods = "base lora soft_moa sparse_moa adamole prompt molora hydralora unipeft"
    assert sorted(overview) == sorted(methods.split())
    incomplete = {name for name, row in overview.items() if row["state"] == "1 of 1 incomplete"}
    assert incomplete == {"prompt", "molora", "hydralora"}
    assert {row["state"] for row in overview.values()} == {"1 of 1 incomplete", "complete", "complete, see notes"}
    assert overview["prompt"]["steps"] == "7 of 20" and overview["lora"]["steps"] == "20"
    assert overview["base"]["final loss"] == overview["molora"]["AddSub (3 of 395), robust %"] == "–"
    missing = page.missing()
    for name, sentences in {
        "prompt s0": ("7 of 20 steps", "no adapter file", "no scores.json", "no test"),
        "molora s0": ("no scores.json",),
        "hydralora s0": ("answers to MultiArith are not complete",),
        "unipeft s0": ("answers to SVAMP are not in scores.json",),
        "seed 1": ("no folder for", "soft_moa"),
    }.items():
        assert all(words in missing[name] for words in sentences), (name, missing[name])
    assert set(missing) == {f"{name} s0" for name in (*incomplete, "unipeft")} | {"seed 1"}
    assert "Empty folders: topk_moelora/s0." in "".join(page.of("p"))


def test_means_spreads_and_intervals_are_those_of_the_files(folder: Path, page: Reader) -> None:
    scores = [score_file(folder / "lora" / f"s{seed}" / "AddSub.jsonl").robust for seed in (0, 1)]
    percents, widths = [s.percent for s in scores], [s.half_width for s in scores]
    assert len(set(percents)) == 2, "seeds that do not differ show no spread"
    cell = page.table("Scores of each test")["lora"]["AddSub (3 of 395), robust %"]
    mean = f"{statistics.fmean(percents):.1f} ± {statistics.fmean(widths):.1f}"
    assert cell == f"{mean}seeds {percents[0]:.1f}, {percents[1]:.1f}; sd {statistics.stdev(percents):.1f}"
    row = page.table("The methods")["lora"]
    last = [statistics.fmean(loss(step, seed) for step in (18, 19)) for seed in (0, 1)]
    assert (
        row["final loss"] == f"{statistics.fmean(last):.2f}sd {statistics.stdev(last):.2f}" and row["seeds"] == "0, 1"
    )
    costs = page.table("What training cost")["lora"]
    assert costs["s per step"] == "18.00sd 4.24" and costs["peak memory, GiB"] == "10.00"
    assert costs["trained parameters"] == "1,000,004" and costs["training, min"] == "6.0sd 1.4"


def test_runs_with_other_settings_are_not_averaged(tmp_path: Path) -> None:
    for seed, rank in ((0, 8), (1, 16), (2, 8)):
        write_run(tmp_path / "d" / "lora" / f"s{seed}", adapter={"method": "lora", "lora_rank": rank})
    write_run(tmp_path / "d" / "lora" / "s3", files={"config.json": None, "scores.json": None})
    page = read(tmp_path, 0)
    seeds = {name: row["seeds"] for name, row in page.table("The methods").items()}
    assert seeds == {"lora": "0, 2, 3", "lora (lora_rank 16)": "1"}
    differing = page.table("In what each run differs")
    assert differing["lora (lora_rank 16) s1"]["settings of its own"] == "lora_rank 16"
    assert differing["lora s0"]["settings of its own"] == "as most runs"
    assert page.table("All settings of lora s0")["run: rows_per_step"]["value"] == "32"


def test_answers_with_both_verdicts(tmp_path: Path) -> None:
    texts = ("The answer is 4.", "The answer is 5.", "The answer is 4. It took 2 steps.")
    score(write_run(tmp_path / "d" / "lora" / "s0"), texts)
    page = read(tmp_path)
    kinds = ["right under both rules", "wrong under both rules", "the two rules differ"]
    assert page.of("h4") == [f"AddSub, row {i + 1}: {kind}" for i, kind in enumerate(kinds)]
    assert page.of("dd")[-2:] == ["✗ wrong: took 2", "✓ right: took 4"] and texts[2] in page.of("dd")
    assert not read(tmp_path, 0).of("h4")


def test_scores_that_today_s_rules_do_not_give_are_told(tmp_path: Path) -> None:
    folder = score(write_run(tmp_path / "d" / "lora" / "s0"))
    write_answers(folder / "AddSub.jsonl", ["4", "4", "4"])
    sentence = "scores.json has 33.3 % for AddSub (published), its answers give 100.0 % now"
    assert sentence in read(tmp_path).missing()["lora s0"]


def test_verdicts_on_programs_come_from_a_file(tmp_path: Path) -> None:
    folder = score(write_run(tmp_path / "d" / "lora" / "s0"))
    row = {"task_id": "HumanEval/0", "instruction": "Write f.", "prompt": "", "test": "", "entry_point": "f"}
    write_answers(folder / "humaneval.jsonl", ["def f(): pass"], **row)
    assert "no verdicts of HumanEval: a report runs no programs" in read(tmp_path).missing()["lora s0"]
    verdict = {"found": "def f(): pass", "right": False, "why": "AssertionError in line 3"}
    line = {
        "suite": "HumanEval",
        "index": 0,
        "generate": "def f(): pass",
        "published": verdict,
        "robust": verdict,
    } | row
    (folder / "verdicts.jsonl").write_text(json.dumps(line) + "\n")
    texts = "".join(read(tmp_path).of("dd"))
    assert "no verdicts" not in texts and "HumanEval/0" in texts and "AssertionError in line 3" in texts


def test_routers_as_figures_and_numbers(page: Reader) -> None:
    gates = page.table("Gates of sparse_moa s0")
    assert list(gates) == [str(layer) for layer in range(LAYERS)] and set(SLOTS) < set(gates["0"])
    assert gates["2"]["p_adapter"] == f"{5 / 6:.3f}sd 0.100, on 75%"
    assert (gates["2"]["adapters used"], gates["2"]["threshold"]) == ("3.000", "0.250")
    assert page.table("Gates of soft_moa s0")["1"]["threshold"] == "–"
    experts = page.table("Experts of adamole s0")["0 lora_Q"]
    assert experts["mean weights"] == "0.10 0.20 0.30 0.40" and experts["balance"] == "0.875"


def test_every_chart_is_an_svg_inside_the_page(page: Reader) -> None:
    words = ["Percent right", "against trained parameters", "Loss:", "Median time", "Experts of adamole"]
    words += ["Mean gates of soft_moa", "Mean gates of sparse_moa"]
    captions = page.attributes("img", "alt")
    assert len(captions) == len(words)
    assert all(any(word in caption for caption in captions) for word in words), captions
    for source in page.attributes("img", "src"):
        svg = base64.b64decode(source.removeprefix("data:image/svg+xml;base64,"))
        assert b"<svg" in svg and b"<script" not in svg and b'href="http' not in svg


def test_damaged_statistics_are_told(tmp_path: Path) -> None:
    for number, change in enumerate((("mean", ["x"] * 4), ("mean", [0.5]), ("used", None), ("active", 3))):
        folder = write_gates(score(write_run(tmp_path / "d" / f"lora-{number}" / "s0")))
        content = json.loads((folder / "gates.json").read_text())
        content["blocks"][1]["parts"]["all"] |= dict([change])
        (folder / "gates.json").write_text(json.dumps(content))
    missing = read(tmp_path).missing()
    assert sorted(missing) == [f"lora-{number} s0" for number in range(4)]
    assert all("gates.json: damaged router statistics" in text for text in missing.values()), missing


def test_costs_that_were_measured(tmp_path: Path) -> None:
    score(write_run(tmp_path / "d" / "lora" / "s0"))
    costs = {"trainable": 5, "seconds_per_step": 1.5, "seconds_per_epoch": 120, "peak_memory_bytes": 2**30}
    content = {"methods": {"lora": costs | {"seconds_per_answer": 0.25}}, "base": costs, "peers": {}, "task": {}}
    file = tmp_path / "costs.json"
    file.write_text(json.dumps(content))
    page = read(tmp_path, 0, file)
    assert page.table("The methods")["lora"]["s per answer"] == "0.250"
    assert page.attributes("img", "alt")[0] == "Costs measured on equal terms"
    file.write_text("[]")
    with pytest.raises(ValueError, match=r"costs\.json: not what"):
        read(tmp_path, 0, file)


def test_no_text_becomes_markup(html: str, page: Reader) -> None:
    assert page.problems == []
    assert not INVISIBLE.search(html.replace("\n", "").replace("\t", "")), "a character that cannot be seen"
    assert not page.of("script", "iframe", "object", "embed", "form", "base")
    assert not [name for _, attributes, _ in page.elements for name in attributes if name.startswith("on")]
    text = "".join(page.of("html"))
    markup, spelt = "</style><script>document.title='taken'", "\\x1b[31m\\u202eevil\\u202c"
    assert all(words in text for words in (markup, spelt, "\\ud83d", "\\x00", "&lt;b&gt;"))
    assert "more characters are not shown" in text and text.count("very long") < 400
    assert page.of("h1") == ["Runs <of> mine"] == page.of("title")


def test_nothing_is_asked_of_the_network(html: str, page: Reader) -> None:
    links = [a[name] for _, a, _ in page.elements for name in ("href", "src") if name in a]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "url(" not in html and "@import" not in html and len(html) < 2_000_000
    assert page.attributes("meta", "content")[0].startswith("default-src 'none'")


def test_hostile_names_of_folders_and_methods(tmp_path: Path) -> None:
    for name in ("<b>&$x_$", "\x1b[31m\u202e", "مرحبا🙂"):
        score(write_run(tmp_path / "d$<i>" / name / "s0", method=name))
    page = read(tmp_path)
    assert page.problems == [] and "b" not in [tag for tag, _, _ in page.elements]
    assert set(page.table("The methods")) == {"\\x1b[31m\\u202e", "<b>&$x_$", "مرحبا🙂"}


DAMAGE = [
    ("config.json", "[]"),
    ("config.json", json.dumps({"settings": 3, "adapter": {"method": ["x"]}, "steps": "many"})),
    ("config.json", json.dumps({"settings": {"seed": 10**300}, "adapter": {}, "steps": 10**400})),
    ("config.json", json.dumps({"settings": {}, "adapter": {}, "trainable_parameters": 10**400, "steps": -1})),
    ("log.jsonl", '{"step": 1, "loss": 1e308, "seconds": -1}\n{"step": 1, "loss": -1e308, "peak_memory_bytes": "x"}\n'),
    ("log.jsonl", f'{{"step": {10**400}, "loss": {10**400}, "seconds": {10**400}, "tokens": 1}}\n'),
    ("log.jsonl", '{"step": 0, "loss": 0}\nnonsense\n{"step": 0, "loss": null}\n'),
    ("scores.json", json.dumps({"suites": {"AddSub": [], "x": {"published": {"percent": 1e9}}}, "families": 3})),
    ("scores.json", json.dumps({"suites": {"A": {"published": {"percent": 1}, "robust": {"percent": 2}}}})),
    ("scores.json", json.dumps({"families": {"m": {"suites": ["A", "B"], "mean": {"published": {"percent": "9"}}}}})),
    ("AddSub.jsonl", "{"),
    ("AddSub.jsonl.settings.json", "[1]"),
    ("gates.json", '{"format": "moa-router-statistics"}'),
    ("verdicts.jsonl", '{"suite": "HumanEval", "generate": [1], "published": 3}\nnonsense'),
    ("notatest.jsonl", ""),
]


@pytest.mark.parametrize(("name", "content"), DAMAGE)
def test_a_damaged_file_takes_nothing_else_with_it(tmp_path: Path, name: str, content: str) -> None:
    score(write_run(tmp_path / "d" / "lora" / "s0"))
    score(write_run(tmp_path / "d" / "soft_moa" / "s0", files={name: content}))
    (tmp_path / "d" / "soft_moa" / "s0" / name).write_text(content)
    page = read(tmp_path)
    assert page.problems == []
    overview = page.table("The methods")
    assert len(overview) == 2 and overview["lora"]["state"] == "complete"
    assert any(name.startswith("soft_moa") for name in page.missing()), "nobody would know"


def test_a_folder_without_trainings_or_scores(tmp_path: Path) -> None:
    folder = score(write_run(tmp_path / "d" / "base" / "s0"))
    headings = ["Overview", "What is missing", "Scores", "Answers", "Configuration"]
    assert read(tmp_path).of("h3") == headings
    (folder / "scores.json").unlink()
    assert read(tmp_path).of("h3") == [name for name in headings if name != "Scores"]


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "new" / "report.html"

    def run(*words: object) -> tuple[int, str]:
        try:
            command.main(list(map(str, words)), "report")
            return 0, capsys.readouterr().out
        except SystemExit as end:
            return end.code, capsys.readouterr().err

    status, text = run(folder, "--save_path", file)
    assert status == 0 and f"{file}: 10 runs, 3 of them incomplete" in text
    assert [path.name for path in file.parent.iterdir()] == ["report.html"]
    (tmp_path / "empty").mkdir()
    for words, expected, code in (
        ([tmp_path / "empty"], "no run in it", 1),
        ([tmp_path / "none"], "no such folder", 1),
        ([folder, "--save_path", tmp_path], "--save_path", 2),
        ([folder, "--samples", "-1"], "--samples", 2),
    ):
        status, text = run(*words)
        assert status == code and expected in text
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "jinja2", None)
        status, text = run(folder, "--save_path", file)
        assert status == 1 and "jinja2, which is not installed" in text
