"""Every suite by its name: the paper's, in the order of its tables, then the demo's."""

import difflib
from pathlib import Path

from evaluate import (
    addsub,
    aqua,
    arc_c,
    arc_e,
    boolq,
    demo,
    gsm8k,
    hellaswag,
    humaneval,
    mbpp,
    multiarith,
    obqa,
    piqa,
    singleeq,
    siqa,
    svamp,
    winogrande,
)
from evaluate.suite import Suite

_MATH = (addsub, aqua, gsm8k, multiarith, singleeq, svamp)
_COMMONSENSE = (boolq, piqa, siqa, hellaswag, winogrande, arc_c, arc_e, obqa)
_CODE = (humaneval, mbpp)
SUITES: dict[str, Suite] = {module.SUITE.name: module.SUITE for module in (*_MATH, *_COMMONSENSE, *_CODE, demo)}


def _plain(name: str) -> str:
    return "".join(character for character in name.casefold() if character.isalnum())


def suite_named(name: str) -> Suite:
    """The suite of that name, in any case ("addsub" is AddSub, "ARC-Easy" ARC-e). ValueError names the nearest where
    there is none."""
    by_plain_name = {_plain(one): suite for suite in SUITES.values() for one in (suite.name, *suite.aliases)}
    if _plain(name) in by_plain_name:
        return by_plain_name[_plain(name)]
    near = difflib.get_close_matches(_plain(name), by_plain_name, n=1)
    hint = f" (nearest: {by_plain_name[near[0]].name})" if near else ""
    raise ValueError(f"no suite is named {name[:80]!r}{hint}; there are {', '.join(SUITES)}")


def suite_of_file(path: str | Path) -> Suite:
    """The suite that a file's name begins with, up to the first dot: OUT/AddSub.jsonl, gsm8k.seed1.jsonl."""
    try:
        return suite_named(Path(path).name.split(".")[0])
    except ValueError as error:
        raise ValueError(f"{path}: cannot tell the suite from the file's name: {error}") from None
