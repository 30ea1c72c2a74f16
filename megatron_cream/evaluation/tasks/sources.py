"""Readers of users' data files, and imports of Python packages that only some tasks need."""

import gzip
import json
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_cream.common.errors import NotAvailable, UsageError, one_line
from megatron_cream.data.compressed import bounded_lines


def import_package(module: str) -> ModuleType:
    """Import and return a module whose package has the same name on PyPI.

    Raises:
        UsageError: the package is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        name = module.split(".")[0]
        raise NotAvailable(f"this task needs the package {name}, which is not installed: pip install {name}") from error


@cache
def load_words() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the adjectives, nouns and verbs of `wonderwords` in lower-case letters.

    LongChat and RULER use the same source.
    """
    source = import_package("wonderwords").RandomWord(enhanced_prefixes=False)
    return tuple(
        tuple(source.filter(include_categories=[kind], regex="[a-z]+")) for kind in ("adjective", "noun", "verb")
    )


def check_distinct_names(flag: str, files: Iterable[Path], name: Callable[[Path], str]) -> None:
    """Raise UsageError if two files have one `name`, which identifies their examples."""
    seen: dict[str, Path] = {}
    for file in files:
        if (other := seen.get(name(file))) is not None:
            raise UsageError(f"{flag} {other} {file}: two files with one name. Rename one, or give each file once.")
        seen[name(file)] = file


def read_json_lines(path: Path, fields: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("FILE, line N", object) for each line of a .jsonl or .jsonl.gz file.

    Args:
        path: the file.
        fields: keys that every object must have.

    Raises:
        UsageError: the file is missing or has no lines, or a line has no such object; names the first bad line.
    """
    with report_read_errors(path), gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
        yield from parse_lines(bounded_lines(lines), str(path), fields)


def parse_lines(lines: Iterable[bytes], where: str, fields: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Parse lines of UTF-8 as `read_json_lines` does; `where` names the file in messages."""
    empty = True
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = _parse_json(line)
        except (ValueError, RecursionError) as error:  # not UTF-8, or not JSON
            raise UsageError(f"{where}, line {number}: not a JSON object ({one_line(error)})") from error
        missing = set(fields) - set(value) if isinstance(value, dict) else set(fields)
        if missing:
            raise UsageError(f"{where}, line {number}: expected an object with {', '.join(sorted(missing))}")
        empty = False
        yield f"{where}, line {number}", value
    if empty:
        raise UsageError(f"{where}: there are no records in it")


def read_json_file(path: Path) -> Any:
    """Return the value of a .json file.

    Raises:
        UsageError: the file is missing or is not JSON.
    """
    with report_read_errors(path):
        return _parse_json(path.read_bytes())


def _parse_json(data: bytes) -> Any:
    """Parse JSON; raise ValueError also for lone surrogates, which no tokenizer accepts."""
    value = json.loads(data)
    json.dumps(value, ensure_ascii=False).encode()
    return value


@contextmanager
def report_read_errors(path: Path) -> Iterator[None]:
    """Turn every error in reading `path` into a UsageError that names it."""
    try:
        yield
    # zipfile raises RuntimeError for encrypted archives and for unknown compression methods.
    except (
        OSError,
        EOFError,
        zlib.error,
        lzma.LZMAError,
        zipfile.BadZipFile,
        ValueError,
        RecursionError,
        RuntimeError,
    ) as error:
        raise UsageError(f"{path}: cannot be read ({one_line(error)})") from error
