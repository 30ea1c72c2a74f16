"""Stream rows of Parquet files and of Hugging Face dataset folders with pyarrow.

A text is returned as UTF-8 bytes; a chat as one JSON object, like a line of a JSON-lines file.
Only a few hundred rows of the needed columns are in memory at a time, for any size of file.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_cream.common.errors import one_line

COLUMN_SUFFIXES = (".parquet", ".arrow")

CHAT_EXTRAS = ("system", "tools")
"""Other columns that are part of a chat, if they are there."""

_ROWS = 256
"""Rows decoded at a time."""


def find_dataset_files(folder: Path) -> list[Path] | None:
    """Return the Arrow files of a folder that `datasets.save_to_disk` wrote; None for others.

    Raises:
        ValueError: the folder has a DatasetDict of several splits, or a file is missing.
    """
    splits = _read_key(folder / "dataset_dict.json", "splits")
    if splits is not None:
        if len(splits) != 1:
            parts = ", ".join(str(folder / split) for split in splits)
            raise ValueError(f"{folder}: a dataset of {len(splits)} splits; give the ones to read: {parts}")
        folder = folder / splits[0]
    names = _read_key(folder / "state.json", "_data_files")
    if names is None:
        return None
    files = [folder / name["filename"] for name in names]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder}: its state.json names {file.name}, which does not exist")
    return files


def check_column(path: Path, keys: tuple[str, ...], chats: bool) -> None:
    """Check by the schema alone that `path` has the column to read.

    Args:
        path: a file that pyarrow reads.
        keys: possible names of the column; the file must have exactly one of them.
        chats: the column contains lists of turns, not text.

    Raises:
        ValueError: pyarrow is not installed; another file format; no such column, several, or one of another type.
    """
    with _open_table(path) as table:
        _column_name(path, table.schema, keys, chats)


def read_rows(path: Path, keys: tuple[str, ...], chats: bool, first: int) -> Iterator[tuple[int, bytes | None, int]]:
    """Yield (number, content, bytes) of each row after the first `first` ones.

    The number counts from 1; the content is None for null; bytes is the approximate size in the file
    of the rows up to this one.

    Raises:
        ValueError: as `check_column`, or the file is damaged. The message is one line with the path.
    """
    with _open_table(path) as table:
        key = _column_name(path, table.schema, keys, chats)
        names = [key, *(name for name in CHAT_EXTRAS if chats and table.schema.names.count(name) == 1)]
        number, batches = first, table.batches(names, first)
        while (batch := _read_batch(path, number, batches, names if chats else None)) is not None:
            values, disk_bytes = batch
            for value in values:
                number += 1
                yield number, value, disk_bytes


def _read_batch(
    path: Path, number: int, batches: Iterator, chat_names: list[str] | None
) -> tuple[list[bytes | None], int] | None:
    """Return the next rows, decoded, and the bytes read so far; None after the last."""
    import pyarrow

    try:
        batch = next(batches, None)
        if batch is None:
            return None
        columns, disk_bytes = batch
        return list(_chats(columns, chat_names)) if chat_names else _texts(columns[0]), disk_bytes
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged after row {number} ({one_line(error, 200)})") from error


@contextlib.contextmanager
def _open_table(path: Path) -> Iterator["_Parquet | _Arrow"]:
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{path}: reading it needs a package that is not installed: pip install pyarrow") from None
    try:
        table = _Parquet(path) if path.suffix.lower() == ".parquet" else _Arrow(path)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = "a Parquet" if path.suffix.lower() == ".parquet" else "an Arrow"
        raise ValueError(f"{path}: not {kind} file ({one_line(error, 200)})") from error
    with contextlib.closing(table):
        try:
            yield table
        except UnicodeDecodeError as error:  # of a column's name; texts stay bytes here
            raise ValueError(f"{path}: damaged (a column's name is not UTF-8)") from error


class _Parquet:
    """A Parquet file, read in small batches."""

    def __init__(self, path: Path):
        import pyarrow.parquet

        # Read page by page: a row group of unknown size may not fit into memory.
        self._file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        self._bytes = path.stat().st_size
        self.schema = self._file.schema_arrow

    def close(self) -> None:
        self._file.close()

    def batches(self, names: list[str], first: int) -> Iterator[tuple[list[Any], int]]:
        metadata = self._file.metadata
        group = row = 0
        while group < metadata.num_row_groups and row + metadata.row_group(group).num_rows <= first:
            row += metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, metadata.num_row_groups))
        for batch in self._file.iter_batches(_ROWS, row_groups=groups, columns=names, use_threads=False):
            row += len(batch)
            if row > first:
                fresh = min(row - first, len(batch))
                columns = [batch.column(name)[len(batch) - fresh :] for name in names]
                yield columns, self._bytes * row // metadata.num_rows


class _Arrow:
    """A memory-mapped Arrow stream or file of record batches."""

    def __init__(self, path: Path):
        import pyarrow

        self._source = pyarrow.memory_map(str(path))
        if self._source.read(6) == b"ARROW1":
            reader = pyarrow.ipc.open_file(self._source)
            self._batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            self._source.seek(0)
            self._batches = reader = pyarrow.ipc.open_stream(self._source)
        self.schema = reader.schema

    def close(self) -> None:
        self._batches = None
        self._source.close()

    def batches(self, names: list[str], first: int) -> Iterator[tuple[list[Any], int]]:
        row = 0
        for batch in self._batches:
            columns = [batch.column(batch.schema.get_field_index(name))[max(0, first - row) :] for name in names]
            row += len(batch)
            for begin in range(0, len(columns[0]), _ROWS):
                yield [column[begin : begin + _ROWS] for column in columns], self._source.tell()


def choose_column(source: object, names: Sequence[str], keys: tuple[str, ...]) -> str:
    """Return the only one of `keys` among the columns `names`.

    Raises:
        ValueError: none or several are there. The message is one line with the source.
    """
    found = [key for key in keys if key in names]
    if len(found) > 1:
        raise ValueError(f"{source}: has the columns {' and '.join(map(repr, found))}; choose one with --json-key")
    if not found:
        wanted, columns = " or ".join(map(repr, keys)), one_line(", ".join(names), 200)
        raise ValueError(f"{source}: no column {wanted}; its columns are {columns}; choose one with --json-key")
    return found[0]


def _column_name(path: Path, schema: Any, keys: tuple[str, ...], chats: bool) -> str:
    from pyarrow import types

    key = choose_column(path, schema.names, keys)
    if schema.names.count(key) > 1:
        raise ValueError(f"{path}: {schema.names.count(key)} columns are named {key!r}; there must be only one")
    kind = schema.field(key).type
    if chats:
        is_list = types.is_list(kind) or types.is_large_list(kind)
        fits, expected = is_list and types.is_struct(kind.value_type), "a list of turns"
    else:
        value = kind.value_type if types.is_dictionary(kind) else kind
        fits, expected = types.is_string(value) or types.is_large_string(value), "text"
    if not fits:
        raise ValueError(f"{path}: column {key!r} is {one_line(kind, 200)}, expected {expected}")
    return key


def _texts(column: Any) -> list[bytes | None]:
    """Return a column's texts as bytes.

    They are not decoded: Arrow does not check UTF-8, and one invalid text would fail the batch.
    """
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        return _dictionary_texts(column)
    kind = pyarrow.large_binary() if pyarrow.types.is_large_string(column.type) else pyarrow.binary()
    column = column.cast(kind)
    column.validate(full=True)  # otherwise offsets beyond the data would crash the process
    return column.to_pylist()


def _dictionary_texts(column: Any) -> list[bytes | None]:
    """Return dictionary-encoded texts as bytes.

    Converted at once, they may exceed the size limit of an Arrow array.
    """
    import pyarrow

    column.indices.validate(full=True)
    indices = column.indices.to_pylist()
    used = sorted({index for index in indices if index is not None})
    if used and not 0 <= used[0] <= used[-1] < len(column.dictionary):
        raise pyarrow.ArrowInvalid(f"index {used[-1]} is beyond the dictionary's {len(column.dictionary)} texts")
    texts = {index: _texts(column.dictionary[index : index + 1])[0] for index in used}
    return [None if index is None else texts[index] for index in indices]


def _chats(columns: list[Any], names: list[str]) -> Iterator[bytes]:
    for row in range(len(columns[0])):
        try:
            for column in columns:
                column[row : row + 1].validate(full=True)
            record = {name: column[row].as_py() for name, column in zip(names, columns, strict=True)}
        except ValueError:  # includes ArrowInvalid and UnicodeDecodeError
            yield b"\xff"  # reported later as a line that is not UTF-8
        else:
            yield json.dumps(record, default=str).encode()


def _read_key(path: Path, key: str) -> list | None:
    try:
        return json.loads(path.read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
