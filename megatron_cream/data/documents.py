"""Read training text from files into batches of raw documents.

The order of documents depends on the inputs alone: inputs as given, the files of a folder
sorted by path, lines or rows in file order. A batch is one worker's unit of work; it records
where the next one begins, so that reading can resume there. The division into batches does
not depend on the workers.
"""

import codecs
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_cream.data.columns import check_column, read_rows
from megatron_cream.data.compressed import (
    LONGEST_LINE,
    DamagedFile,
    LongLine,
    bounded_lines,
    is_compressed,
    open_decompressed,
    suffix,
)
from megatron_cream.data.csv_rows import DamagedCsv, read_csv_column
from megatron_cream.data.hub import HubDataset, check_datasets_package, read_hub_rows
from megatron_cream.data.input_files import Source, disk_size, kind_of
from megatron_cream.data.json_array import DamagedArray, read_elements, starts_array

BATCH_BYTES = 1 << 20
"""A batch ends once its text reaches this size; a document is never split."""


class BadDocument(ValueError):
    """A document cannot be read. The message has the reason but not the place.

    Args:
        reason: the message; equal reasons are counted together.
        detail: what is particular to this document.
    """

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason)
        self.detail = detail


@dataclass(frozen=True)
class Position:
    """Where reading resumes."""

    file: int = 0
    """Index among the files of `find_files`."""

    record: int = 0
    """Lines, rows or elements of that file already read."""

    offset: int = 0
    """Bytes of these lines in the (decompressed) file."""

    disk_bytes: int = 0
    """Bytes read on disk so far, including earlier files; for the progress bar."""


@dataclass(frozen=True)
class Batch:
    """Consecutive raw documents of one input."""

    path: Source
    """The file of the items; unused if the items are files."""

    form: Literal["json", "text", "file"]
    """The kind of item: a JSON object, text, or a text file."""

    items: list[tuple[int, bytes | str | None]] | list[Source]
    """(number from 1, content) of lines, rows or elements; or one file per document. A str is not the
    content but the reason why it cannot be read."""

    end: Position
    """Where the next batch begins."""


def check_files(files: list[Source], keys: tuple[str, ...], chats: bool) -> None:
    """Check before reading that columns exist and required packages are installed.

    Args:
        files: the files to read, from `find_files`.
        keys: possible keys of a record's text or turns.
        chats: the documents are chats.

    Raises:
        ValueError: one of them cannot be read so. The message is one line with the path.
    """
    for file in files:
        if isinstance(file, HubDataset):
            check_datasets_package(file)
        elif kind_of(file) == "columns":
            check_column(file, keys, chats)
        elif chats and kind_of(file) != "lines":
            raise ValueError(f"{file}: a chat is a JSON object or a row, not a text file or CSV")
        elif kind_of(file) == "csv":
            next(_rows_of_csv(file, keys[0], Position()), None)
        elif is_compressed(file):
            with file.open("rb") as raw:
                open_decompressed(file, raw)


def read_batches(
    files: list[Source], keys: tuple[str, ...] = ("text",), chats: bool = False, start: Position = Position()
) -> Iterator[Batch]:
    """Yield the documents of `files` from `start` on, in batches of about BATCH_BYTES of text.

    Raises:
        ValueError: a file is damaged. The message is one line with the path.
    """
    texts: list[Source] = []
    size = 0
    before = sum(map(disk_size, files[: start.file]))
    for number in range(start.file, len(files)):
        file, kind, disk_bytes = files[number], kind_of(files[number]), disk_size(files[number])
        if kind in ("lines", "columns", "csv", "hub"):
            if texts:
                yield Batch(texts[0].parent, "file", texts, Position(number, disk_bytes=before))
                texts, size = [], 0
            begin = start if number == start.file else Position(number)
            form: Literal["json", "text"] = "json" if chats or kind == "lines" else "text"
            records = _read_records(file, keys, chats, begin)
            yield from _group_records(file, form, records, number, before, disk_bytes)
        else:
            texts.append(file)
            size += disk_bytes
            if size >= BATCH_BYTES:
                yield Batch(texts[0].parent, "file", texts, Position(number + 1, disk_bytes=before + disk_bytes))
                texts, size = [], 0
        before += disk_bytes
    if texts:
        yield Batch(texts[0].parent, "file", texts, Position(len(files), disk_bytes=before))


def read_documents(batch: Batch, extract: Callable[[dict], Any]) -> Iterator[tuple[str, Any]]:
    """Yield (place, document) of each item; place is `file` or `file:number`.

    If a document cannot be read, a BadDocument is yielded instead of it.

    Args:
        batch: from `read_batches`.
        extract: returns the document in a JSON object; raises BadDocument if there is none.
    """
    for item in batch.items:
        where = f"{batch.path}:{item[0]}" if isinstance(item, tuple) else str(item)
        try:
            if isinstance(item, tuple) and isinstance(item[1], str):
                raise BadDocument(item[1])
            if batch.form == "json":
                document = extract(_parse(item[1]))
            else:
                document = _check_text(_read_text(item) if batch.form == "file" else item[1])
            yield where, document
        except UnicodeError:
            yield where, BadDocument("not UTF-8")
        except BadDocument as error:
            yield where, error


def extract_text(record: dict, key: str) -> str:
    """Return the text under `key`.

    Raises:
        BadDocument: there is no text.
        UnicodeError: it contains lone surrogates, which JSON can encode but no tokenizer accepts.
    """
    if key not in record:
        raise BadDocument(f"no key {key!r}")
    if not isinstance(record[key], str):
        raise BadDocument(f"key {key!r} is not a string")
    return _check_text(record[key])


_Record = tuple[int, bytes | str | None, int, int]
"""Number, content, and its end in bytes of the decompressed file and of the file on disk."""


def _group_records(
    path: Source, form: Literal["json", "text"], records: Iterator[_Record], file: int, before: int, disk_bytes: int
) -> Iterator[Batch]:
    items: list[tuple[int, bytes | str | None]] = []
    size = 0
    for number, data, offset, disk_offset in records:
        if form == "text" or data is None or not data.isspace():  # a blank line is not a document; a blank row is
            items.append((number, data))
            size += len(data or b"")
        if size >= BATCH_BYTES:
            yield Batch(path, form, items, Position(file, number, offset, before + disk_offset))
            items, size = [], 0
    if items:
        yield Batch(path, form, items, Position(file + 1, disk_bytes=before + disk_bytes))


def _read_records(file: Source, keys: tuple[str, ...], chats: bool, begin: Position) -> Iterator[_Record]:
    if isinstance(file, HubDataset):
        return ((number, data, 0, 0) for number, data in read_hub_rows(file, keys, chats, begin.record))
    if kind_of(file) == "columns":
        return _rows(file, keys, chats, begin)
    return _rows_of_csv(file, keys[0], begin) if kind_of(file) == "csv" else _read_json(file, begin)


def _rows(path: Source, keys: tuple[str, ...], chats: bool, begin: Position) -> Iterator[_Record]:
    for number, data, disk_offset in read_rows(path, keys, chats, begin.record):
        yield number, data, 0, disk_offset


def _rows_of_csv(path: Source, key: str, begin: Position) -> Iterator[_Record]:
    with path.open("rb") as raw:
        try:
            for number, text in read_csv_column(open_decompressed(path, raw), key):
                if number > begin.record:
                    yield number, text, 0, raw.tell()
        except (DamagedFile, DamagedCsv, LongLine) as error:
            raise ValueError(f"{path}: {error}") from error


def _read_json(path: Source, begin: Position) -> Iterator[_Record]:
    """Yield the lines or array elements after `begin`."""
    with path.open("rb") as raw:
        try:
            stream = open_decompressed(path, raw)
            if suffix(path) == ".json" and starts_array(stream):
                for number, element in enumerate(read_elements(stream), 1):
                    if number > begin.record:
                        yield number, element, 0, raw.tell()
                return
            stream.seek(begin.offset)
            offset = begin.offset
            for number, line in enumerate(bounded_lines(stream, begin.record + 1), begin.record + 1):
                offset += len(line)
                yield number, line, offset, raw.tell()
        except (DamagedFile, DamagedArray, LongLine) as error:
            raise ValueError(f"{path}: {error}") from error


def _parse(line: bytes) -> dict:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise
    except (ValueError, RecursionError):
        raise BadDocument("malformed JSON") from None
    if not isinstance(record, dict):
        raise BadDocument("not a JSON object")
    return record


def _read_text(path: Source) -> bytes:
    with path.open("rb") as raw:
        try:
            text = open_decompressed(path, raw).read(LONGEST_LINE + 1)
            if len(text) > LONGEST_LINE:
                raise BadDocument(f"text file larger than {LONGEST_LINE >> 20} MiB")
            return text.removeprefix(codecs.BOM_UTF8)
        except DamagedFile as error:
            raise BadDocument(str(error)) from None


def _check_text(text: str | bytes | None) -> str:
    if not text:
        raise BadDocument("empty text")
    if isinstance(text, bytes):
        return text.decode()
    text.isascii() or text.encode()  # raises UnicodeError at a lone surrogate
    return text
