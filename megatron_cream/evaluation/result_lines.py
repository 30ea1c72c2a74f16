"""The lines of results.jsonl: one JSON object an example, each with a checksum of its own.

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
    """The line of a record, with its checksum and a line feed."""
    text = to_json(record, ensure_ascii=False)
    return f'{{"{_KEY}": "{zlib.crc32(text.encode()):08x}", {text[1:]}\n'


def read_records(path: Path, *, need_checksums: bool) -> dict[str, dict[str, Any]]:
    """Read the records by name. Cut off a last line that a killed run left unfinished.

    Args:
        path: of results.jsonl.
        need_checksums: every line must have a checksum; files of older versions have none.

    Raises:
        UsageError: a line is damaged, no result, or disagrees with another. Names the line's number.
    """
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    records: dict[str, dict[str, Any]] = {}
    found: dict[str, int] = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            record = _parse_line(line, need_checksums)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"--output: {path}, line {number}: not a result ({one_line(error)}); delete that line and its example "
                "is done again, or give another folder, or --overwrite"
            ) from error
        name = record["name"]
        if record != records.setdefault(name, record):
            raise UsageError(
                f"--output: {path}, lines {found[name]} and {number}: different results of {name}; delete one of "
                "them, or give another folder, or --overwrite"
            )
        found.setdefault(name, number)
    return records


def _parse_line(line: bytes, need_checksums: bool) -> dict[str, Any]:
    """
    Raises:
        ValueError: damaged, or no result.
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
        raise ValueError("a name or a score is missing, or is none")
    return record


def is_record(record: Any) -> bool:
    """Whether it has what `report.summarise` or `runner.summarise_perplexity` reads."""
    if not isinstance(record, dict) or not isinstance(record.get("name"), str):
        return False
    if "lengths" in record:  # of perplexity
        rows = record["lengths"].items() if isinstance(record["lengths"], dict) else [("", None)]
        return all(
            length.isdecimal()
            and isinstance(row, dict)
            and {"nll", "tokens"} <= row.keys()
            and all(map(_is_number, row.values()))
            for length, row in rows
        )
    score, depth = record.get("score"), record.get("depth")
    right = _is_number(score) and 0 <= score <= 1 and _is_number(record.get("rouge_l", 0))
    right = right and isinstance(record.get("part"), str) and type(record.get("length")) is int
    return right and (depth is None or _is_number(depth))


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))
