"""From the files that the data sets' authors publish to rows of instruction, input, output and, for tests, answer."""

import gzip
import re
import zlib
from collections.abc import Callable
from typing import Any

from moa.reading import parse_rows

Row = dict[str, Any]
MBPP_TEST = range(11, 511)  # task ids of the published test problems; the others are for prompts and training
CALCULATOR = re.compile(r"<<[^<>]*>>")  # what GSM8K's solutions ask a calculator: 48/2 = <<48/2=24>>24


def _gsm8k(row: Row) -> Row:
    """Question and solution; the calculator's marks go, "#### 72" becomes "The answer is 72."."""
    solution, mark, answer = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("the answer has no line '#### N'")
    number = answer.strip().replace(",", "")
    output = f"{CALCULATOR.sub('', solution).strip()} The answer is {number}.".replace("\n", " ")
    return {"instruction": row["question"], "input": "", "output": output, "answer": str(float(number))}


def _humaneval(row: Row) -> Row:
    """The published instruction is the raw prompt."""
    return {"instruction": row["prompt"], "input": "", "output": row["prompt"] + row["canonical_solution"], **row}


def _mbpp(row: Row) -> Row | None:
    """The published instruction is the text and all its tests."""
    if row["task_id"] not in MBPP_TEST:
        return None
    instruction = "\n".join([row["text"], "Examples:", *row["test_list"]])
    return {"instruction": instruction, "input": "", "output": row["code"], **row}


CONVERTERS: dict[str, Callable[[Row], Row | None]] = {
    "rows": lambda row: row,  # LLM-Adapters and CodeAlpaca publish such rows
    "gsm8k": _gsm8k,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
}


def convert(content: bytes, format: str, where: str) -> list[Row]:
    """The rows of a published file. ValueError names the file and the row that is not of the expected form."""
    try:
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: neither UTF-8 text nor a whole .gz file of it ({error})") from None
    converted = []
    for number, row in enumerate(parse_rows(text, where), 1):
        try:
            converted.append(CONVERTERS[format](row))
        except (LookupError, AttributeError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"{where}: row {number}: not of the published form ({why})") from None
    return [row for row in converted if row is not None]
