"""What tasks read: users' data files, and Python packages that only some tasks need."""

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

from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.data.compressed import bounded_lines


def import_package(module: str) -> ModuleType:
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
def load_words() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Adjectives, nouns, verbs of `wonderwords`, which LongChat and RULER take theirs from; plain small letters."""
    source = import_package("wonderwords").RandomWord(enhanced_prefixes=False)
    return tuple(
        tuple(source.filter(include_categories=[kind], regex="[a-z]+")) for kind in ("adjective", "noun", "verb")
    )


def check_distinct_names(flag: str, files: Iterable[Path], name: Callable[[Path], str]) -> None:
    """Raise UsageError where two of the files have the same `name`: a run knows their examples by it."""
    seen: dict[str, Path] = {}
    for file in files:
        if (other := seen.get(name(file))) is not None:
            raise UsageError(f"{flag} {other} {file}: two files of one name; rename one, or give each once")
        seen[name(file)] = file


def read_json_lines(path: Path, fields: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, for messages; the object there) of a .jsonl or .jsonl.gz file, each with `fields` at least.

    Raises:
        UsageError: no such file, none or not such lines; it names the first one.
    """
    with report_read_errors(path), gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
        yield from parse_lines(bounded_lines(lines), str(path), fields)


def parse_lines(lines: Iterable[bytes], where: str, fields: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `read_json_lines`, from lines of UTF-8; `where` names the file."""
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
    """The value of a .json file.

    Raises:
        UsageError: no such file, or not JSON.
    """
    with report_read_errors(path):
        return _parse_json(path.read_bytes())


def _parse_json(data: bytes) -> Any:
    """Raises ValueError also for lone surrogates, which JSON can spell and no tokenizer takes."""
    value = json.loads(data)
    json.dumps(value, ensure_ascii=False).encode()
    return value


@contextmanager
def report_read_errors(path: Path) -> Iterator[None]:
    """Whatever fails in reading `path` is a UsageError."""
    try:
        yield
    # RuntimeError: of an archive that is encrypted, or compressed in a way that zipfile does not know.
    except (
        OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, ValueError, RecursionError, RuntimeError,
    ) as error:  # fmt: skip
        raise UsageError(f"{path}: cannot be read ({one_line(error)})") from error
