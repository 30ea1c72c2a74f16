"""Readers of training text: paths in, batches of raw documents out.

Documents come in an order that depends on the inputs alone: inputs as given, the files
of a folder sorted by path, the lines of a file as they stand. A batch is what one worker
takes at a time; how documents fall into batches does not depend on the workers either.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
"""One JSON object a line. `.json` too, as Megatron's own recipes name such files."""

TEXT_SUFFIXES = (".txt", ".text")
"""Files taken as one document when named themselves; in folders the glob decides."""

BATCH_BYTES = 1 << 20
"""A batch is closed once its text reaches this; one document is never split."""

GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
"""What reading a cut or damaged .gz raises."""


class BadDocument(ValueError):
    """A document that cannot be read. The message says why, without its place."""


@dataclass(frozen=True)
class Batch:
    """Consecutive raw documents of one input."""

    path: Path
    """The JSON-lines file; unused for text files, which are their own place."""

    items: list[tuple[int, bytes]] | list[Path]
    """Line number (from 1) and line, or one text file for each document."""

    disk_bytes: int
    """What this batch takes on disk (compressed, for .gz), for progress by bytes."""


def find_files(inputs: Iterable[Path], glob: str = "*.txt") -> list[Path]:
    """The files behind `inputs`, in reading order: files as named, folders recursively.

    Raises:
        ValueError: an input that does not exist, a folder without a matching file, or a
            file of a kind that is not read. The message is one line and names the path.
    """
    files: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            try:
                found = sorted(file for file in path.rglob(glob) if file.is_file())
            except (ValueError, NotImplementedError) as error:
                raise ValueError(f"--glob {glob!r}: expected a pattern such as '*.txt' ({error})") from error
            if not found:
                raise ValueError(f"{path}: no file in this folder matches {glob!r}; give another --glob")
            files += found
        elif not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        elif _suffix(path) not in JSON_LINES_SUFFIXES + TEXT_SUFFIXES:
            known = ", ".join(JSON_LINES_SUFFIXES + TEXT_SUFFIXES)
            raise ValueError(f"{path}: expected a file that ends in {known} (or these with .gz), or a folder")
        else:
            files.append(path)
    return files


def read_batches(files: list[Path]) -> Iterator[Batch]:
    """All documents of `files` in order, about BATCH_BYTES of text to a batch."""
    texts: list[Path] = []
    size = 0
    for file in files:
        is_lines = _suffix(file) in JSON_LINES_SUFFIXES
        if not is_lines:
            texts.append(file)
            size += file.stat().st_size
        if texts and (is_lines or size >= BATCH_BYTES):
            yield Batch(texts[0].parent, texts, size)
            texts, size = [], 0
        if is_lines:
            yield from _read_lines(file)
    if texts:
        yield Batch(texts[0].parent, texts, size)


def read_documents(batch: Batch, json_key: str) -> Iterator[tuple[str, str | BadDocument]]:
    """(place, text) of each document; place is `file` or `file:line`.

    Where a document cannot be read, a BadDocument stands in place of its text. Blank
    lines are no documents.
    """
    for item in batch.items:
        where = str(item) if isinstance(item, Path) else f"{batch.path}:{item[0]}"
        try:
            text = _read_text(item) if isinstance(item, Path) else _parse_line(item[1], json_key)
            if not text:
                raise BadDocument("empty text")
            # JSON can spell lone surrogates, which no tokenizer takes.
            text.isascii() or text.encode("utf-8")
            yield where, text
        except UnicodeError:
            yield where, BadDocument("not UTF-8")
        except BadDocument as error:
            yield where, error


def _parse_line(line: bytes, json_key: str) -> str:
    text = line.decode("utf-8-sig")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        raise BadDocument("malformed JSON") from None
    if not isinstance(record, dict) or json_key not in record:
        raise BadDocument(f"no key {json_key!r}")
    if not isinstance(record[json_key], str):
        raise BadDocument(f"key {json_key!r} is not a string")
    return record[json_key]


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as raw:
            return _decompressed(path, raw).read().decode("utf-8-sig")
    except GZIP_ERRORS:
        raise BadDocument("not a whole gzip file") from None


def _read_lines(path: Path) -> Iterator[Batch]:
    with path.open("rb") as raw:
        lines: list[tuple[int, bytes]] = []
        size, told = 0, 0
        try:
            for number, line in enumerate(_decompressed(path, raw), 1):
                if line.isspace():
                    continue
                lines.append((number, line))
                size += len(line)
                if size >= BATCH_BYTES:
                    yield Batch(path, lines, raw.tell() - told)
                    lines, size, told = [], 0, raw.tell()
        except GZIP_ERRORS as error:
            raise ValueError(f"{path}: not a whole gzip file ({error})") from error
        if lines:
            yield Batch(path, lines, raw.tell() - told)


def _decompressed(path: Path, raw: BinaryIO) -> BinaryIO:
    return gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw


def _suffix(path: Path) -> str:
    """The suffix that tells the kind of file: that under `.gz`, where it is compressed."""
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
