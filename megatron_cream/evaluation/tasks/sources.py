"""What tasks read: users' data files, and Python packages that only some tasks need."""

import gzip
import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_cream.errors import UsageError


def package(module: str) -> ModuleType:
    """The module, of a package that has its name on PyPI, imported.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        name = module.split(".")[0]
        raise UsageError(f"this task needs the package {name}, which is not there: pip install {name}") from error


@cache
def words() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Adjectives, nouns, verbs of `wonderwords`, which LongChat and RULER take theirs from; plain small letters."""
    source = package("wonderwords").RandomWord(enhanced_prefixes=False)
    return tuple(
        tuple(source.filter(include_categories=[kind], regex="[a-z]+")) for kind in ("adjective", "noun", "verb")
    )


def json_lines(path: Path, fields: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl or .jsonl.gz file, each with `fields` at least.

    Raises:
        UsageError: no such file, or not such lines; it names the first one.
    """
    with reported(path), gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
        yield from parse_lines(lines, str(path), fields)


def parse_lines(lines: Iterable[bytes], where: str, fields: Iterable[str]) -> Iterator[dict[str, Any]]:
    """As `json_lines`, from lines of UTF-8; `where` names the file."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:  # not UTF-8, or not JSON
            raise UsageError(f"{where}, line {number}: not a JSON object ({error})") from error
        missing = set(fields) - set(value) if isinstance(value, dict) else set(fields)
        if missing:
            raise UsageError(f"{where}, line {number}: expected an object with {', '.join(sorted(missing))}")
        yield value


def json_file(path: Path) -> Any:
    """The value of a .json file.

    Raises:
        UsageError: no such file, or not JSON.
    """
    with reported(path):
        return json.loads(path.read_bytes())


@contextmanager
def reported(path: Path) -> Iterator[None]:
    """Whatever fails in reading `path` is a UsageError."""
    try:
        yield
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile, ValueError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
