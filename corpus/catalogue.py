"""The public data sets of the paper's runs: where each lies, how many rows it has, how its answers look.

Places and licences are written from what is known of the repositories: the addresses have not been tried. What is
fetched from them is checked before it is put in place, and `--source` names another place.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SOURCE = "https://raw.githubusercontent.com"  # `origin` is below it, as it is below a mirror or a folder
ADAPTERS = "AGI-Edgerunners/LLM-Adapters/main"

NUMBER = r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)(?:\.\d*)?"
LETTER = "[A-E]"
TRUTH = "true|false"


@dataclass(frozen=True)
class DataSet:
    """One file of rows, DATA/`name`/`kind`.json.

    kind: "train" or "test". rows: how many there are; slack: the share by which a file may differ from that. suite: its
    name in `evaluate`, for tests. answer: pattern of a test row's "answer", "" where it has none. form: how the origin
    is written, one of `corpus.forms.FORMS`. fields: text fields beside instruction, input and output. licence: "" where
    it is not known for certain.
    """

    name: str
    kind: str
    family: str
    rows: int
    origin: str
    suite: str = ""
    answer: str = ""
    form: str = "rows"
    fields: tuple[str, ...] = ()
    slack: float = 0.0
    licence: str = ""

    @property
    def label(self) -> str:
        return f"{self.name}/{self.kind}"

    def file(self, folder: str | Path) -> Path:
        """Where it lies below the folder of all data."""
        return Path(folder) / self.name / f"{self.kind}.json"


def _adapters_test(name: str, family: str, rows: int, suite: str, answer: str, licence: str = "") -> DataSet:
    """A test file of LLM-Adapters."""
    return DataSet(name, "test", family, rows, f"{ADAPTERS}/dataset/{name}/test.json", suite, answer, licence=licence)


CATALOGUE: tuple[DataSet, ...] = (
    # The number of rows of math_14k could not be looked up, that of commonsense_15k is from memory: hence the slack.
    DataSet("math_14k", "train", "math", 14_000, f"{ADAPTERS}/ft-training_set/math_14k.json", slack=0.05),
    DataSet(
        "gsm8k",
        "train",
        "math",
        7473,
        "openai/grade-school-math/master/grade_school_math/data/train.jsonl",
        form="gsm8k",
        licence="MIT",
    ),
    _adapters_test("AddSub", "math", 395, "AddSub", NUMBER),
    _adapters_test("AQuA", "math", 254, "AQuA", LETTER, "Apache-2.0"),
    _adapters_test("gsm8k", "math", 1319, "GSM8K", NUMBER, "MIT"),
    _adapters_test("MultiArith", "math", 600, "MultiArith", NUMBER),
    _adapters_test("SingleEq", "math", 508, "SingleEq", NUMBER),
    _adapters_test("SVAMP", "math", 1000, "SVAMP", NUMBER, "MIT"),
    DataSet(
        "commonsense_15k",
        "train",
        "commonsense",
        15_119,
        f"{ADAPTERS}/ft-training_set/commonsense_15k.json",
        slack=0.02,
    ),
    _adapters_test("boolq", "commonsense", 3270, "BoolQ", TRUTH, "CC-BY-SA-3.0"),
    _adapters_test("piqa", "commonsense", 1838, "PIQA", "solution[12]"),
    _adapters_test("social_i_qa", "commonsense", 1954, "SIQA", "answer[1-3]"),
    _adapters_test("hellaswag", "commonsense", 10_042, "HellaSwag", "ending[1-4]", "MIT"),
    _adapters_test("winogrande", "commonsense", 1267, "WinoGrande", "option[12]"),
    _adapters_test("ARC-Challenge", "commonsense", 1172, "ARC-c", "answer[1-5]", "CC-BY-SA-4.0"),
    _adapters_test("ARC-Easy", "commonsense", 2376, "ARC-e", "answer[1-5]", "CC-BY-SA-4.0"),
    _adapters_test("openbookqa", "commonsense", 500, "OBQA", "answer[1-4]"),
    DataSet(
        "codealpaca", "train", "code", 20_022, "sahil280114/codealpaca/master/data/code_alpaca_20k.json", slack=0.01
    ),
    DataSet(
        "humaneval",
        "test",
        "code",
        164,
        "openai/human-eval/master/data/HumanEval.jsonl.gz",
        "HumanEval",
        form="humaneval",
        fields=("task_id", "prompt", "canonical_solution", "test", "entry_point"),
        licence="MIT",
    ),
    DataSet(
        "mbpp",
        "test",
        "code",
        500,
        "google-research/google-research/master/mbpp/mbpp.jsonl",
        "MBPP",
        form="mbpp",
        fields=("text", "code"),
        licence="CC-BY-4.0",
    ),
)


def choose(names: Sequence[str]) -> list[DataSet]:
    """The data sets of these names, in the catalogue's order; all where none is given.

    A name is a folder's (gsm8k), one file's (gsm8k/train), a suite's (SIQA) or a family's (math), in any case.
    ValueError gives the nearest where there is none.
    """
    known: dict[str, set[DataSet]] = {}
    for one in CATALOGUE:
        for name in filter(None, (one.name, one.label, one.suite, one.family)):
            known.setdefault(_plain(name), set()).add(one)
    chosen: set[DataSet] = set()
    for name in names:
        if _plain(name) not in known:
            near = difflib.get_close_matches(_plain(name), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"no data set is named {name!r} (nearest: {near}); `python -m corpus list` shows them")
        chosen |= known[_plain(name)]
    return [one for one in CATALOGUE if one in chosen or not names]


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum() or character == "/")
