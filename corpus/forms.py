"""From the files that the data sets' authors publish to our rows: instruction, input, output and, for tests, answer."""

import gzip
import io
import re
import zlib
from collections.abc import Callable
from typing import Any

from corpus.rows import parse_rows

Row = dict[str, Any]
LARGEST = 64 * 2**20  # bytes of one file, unpacked as well


def _plain(data: bytes) -> list[Row]:
    """LLM-Adapters and CodeAlpaca: rows of our kind already."""
    return parse_rows(data)


_MARK = re.compile(r"<<[^<>]*>>")  # what a calculator would be asked: 48/2 = <<48/2=24>>24


def _gsm8k(data: bytes) -> list[Row]:
    """GSM8K's question and answer; the calculator's marks go, "#### 72" becomes "The answer is 72."."""

    def convert(row: Row) -> Row:
        worked, found, final = row["answer"].rpartition("####")
        number = final.strip().replace(",", "")
        if not found:
            raise ValueError("the answer has no line '#### N'")
        solution = _MARK.sub("", worked).strip().replace("\n", " ")
        return {
            "instruction": row["question"],
            "input": "",
            "output": f"{solution} The answer is {number}.",
            "answer": str(float(number)),
        }

    return _each(parse_rows(data), convert)


def _humaneval(data: bytes) -> list[Row]:
    def convert(row: Row) -> Row:
        instruction = f"Complete the following Python function. Write all of it.\n\n{row['prompt']}"
        return {"instruction": instruction, "input": "", "output": row["prompt"] + row["canonical_solution"], **row}

    return _each(parse_rows(_unpacked(data)), convert)


MBPP_TEST = range(11, 511)  # task ids of the published test problems; the rest is for prompts and training


def _mbpp(data: bytes) -> list[Row]:
    def convert(row: Row) -> Row:
        tests = "\n".join([*filter(None, [row.get("test_setup_code")]), *row["test_list"]])
        instruction = f"{row['text']}\nAnswer with a Python function that passes these tests:\n\n{tests}"
        return {"instruction": instruction, "input": "", "output": row["code"], **row}

    return _each([row for row in parse_rows(data) if row.get("task_id") in MBPP_TEST], convert)


FORMS: dict[str, Callable[[bytes], list[Row]]] = {
    "rows": _plain,
    "gsm8k": _gsm8k,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
}


def without_empty(rows: list[Row]) -> list[Row]:
    """The training rows that have an instruction and an output: nothing is to be learned from the others."""
    return [
        row for row in rows if all(not isinstance(row.get(n), str) or row[n].strip() for n in ("instruction", "output"))
    ]


def _each(rows: list[Row], convert: Callable[[Row], Row]) -> list[Row]:
    """Convert every row. ValueError names the row that is not of the expected form."""
    converted = []
    for number, row in enumerate(rows, 1):
        try:
            converted.append(convert(row))
        except KeyError as error:
            raise ValueError(f"row {number}: field {error} is missing") from None
        except (AttributeError, TypeError):
            raise ValueError(f"row {number}: a field is not of the expected type") from None
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
    return converted


def _unpacked(data: bytes) -> bytes:
    """The content of a .gz file, at most LARGEST bytes; as it is where it is none (a mirror may have unpacked it)."""
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        content = gzip.GzipFile(fileobj=io.BytesIO(data)).read(LARGEST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"damaged .gz file ({error})") from None
    if len(content) > LARGEST:
        raise ValueError(f"unpacks to more than {LARGEST // 2**20} MiB")
    return content
