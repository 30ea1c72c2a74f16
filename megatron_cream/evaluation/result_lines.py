"""The lines of results.jsonl: one JSON object per example, each with its own checksum.

A line reads `{"crc32": "0123abcd", "name": ...}`: the CRC-32 of the line's bytes without that first entry.
"""

import json
import math
import os
import zlib
from pathlib import Path
from typing import Any

from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.common.files import to_json

_KEY = "crc32"
_BEGIN = b'{"crc32": "'
_SUM_END = len(_BEGIN) + 8


def format_line(record: dict[str, Any]) -> str:
    """Return a record as a line of results.jsonl, with checksum and line feed."""
    text = to_json(record, ensure_ascii=False)
    return f'{{"{_KEY}": "{zlib.crc32(text.encode()):08x}", {text[1:]}\n'


def read_records(path: Path, *, need_checksums: bool) -> dict[str, dict[str, Any]]:
    """Return the records by name, and cut off a last line that a killed run left unfinished.

    Args:
        path: the results.jsonl file.
        need_checksums: whether to reject lines without a checksum; older versions wrote none.

    Raises:
        UsageError: a line is damaged, is not a result, or contradicts another; names the line number.
    """
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    records: dict[str, dict[str, Any]] = {}
    found: dict[str, int] = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            record = parse_line(line, need_checksums)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"--output: {path}, line {number}: not a result ({one_line(error)}). Delete that line to evaluate its "
                "example again, or give another folder, or --overwrite."
            ) from error
        name = record["name"]
        if record != records.setdefault(name, record):
            raise UsageError(
                f"--output: {path}, lines {found[name]} and {number}: different results of {name}. Delete one of "
                "them, or give another folder, or --overwrite."
            )
        found.setdefault(name, number)
    return records


def parse_line(line: bytes, need_checksums: bool) -> dict[str, Any]:
    """Parse a line and check its checksum.

    Raises:
        ValueError: the line is damaged or is not a result.
    """
    if line.startswith(_BEGIN) and line[_SUM_END : _SUM_END + 3] == b'", ':
        content = b"{" + line[_SUM_END + 3 :]
        if line[len(_BEGIN) : _SUM_END] != b"%08x" % zlib.crc32(content):
            raise ValueError("damaged or edited: its checksum differs")
    elif need_checksums:
        raise ValueError("damaged or edited: it has no checksum")
    else:
        content = line
    record = json.loads(content)
    if not is_record(record):
        raise ValueError("a name or a score is missing or invalid")
    return record


def is_record(record: Any) -> bool:
    """Return whether `record` has the fields that the summaries of tasks read."""
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        return False
    if "lengths" in record:  # a record of the perplexity task
        rows = record["lengths"].items() if isinstance(record["lengths"], dict) else [("", None)]
        return all(
            length.isdecimal()
            and isinstance(row, dict)
            and {"nll", "tokens"} <= row.keys()
            and all(map(_is_number, row.values()))
            for length, row in rows
        )
    score, depth = record.get("score"), record.get("depth")
    valid = _is_number(score) and 0 <= score <= 1 and _is_number(record.get("rouge_l", 0))
    valid = valid and isinstance(record.get("part"), str) and type(record.get("length")) is int
    return valid and (depth is None or _is_number(depth))


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))
