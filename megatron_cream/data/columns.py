"""Rows of Parquet files and of Hugging Face dataset folders, streamed with pyarrow.

Text comes out as UTF-8 bytes; a chat as one JSON object, as a line of a JSON-lines file
would hold it. Memory takes some hundred rows of one column, whatever the size of a file.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cream.common.errors import one_line

COLUMN_SUFFIXES = (".parquet", ".arrow")

_ROWS = 256
"""Rows decoded at a time."""


def dataset_files(folder: Path) -> list[Path] | None:
    """The Arrow files of a folder that `datasets.save_to_disk` wrote, in order; None for another folder.

    Raises:
        ValueError: a DatasetDict of several splits, or a file is missing.
    """
    splits = _listed(folder / "dataset_dict.json", "splits")
    if splits is not None:
        if len(splits) != 1:
            parts = ", ".join(str(folder / split) for split in splits)
            raise ValueError(f"{folder}: a dataset of {len(splits)} splits; give those you mean: {parts}")
        folder = folder / splits[0]
    names = _listed(folder / "state.json", "_data_files")
    if names is None:
        return None
    files = [folder / name["filename"] for name in names]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{folder}: its state.json names {file.name}, which is not there")
    return files


def check_column(path: Path, keys: tuple[str, ...], chats: bool) -> None:
    """Raise ValueError unless `path` has the column to read, by its schema alone.

    Args:
        path: a file that pyarrow reads.
        keys: names of the column; the one that is there is meant.
        chats: the column holds lists of turns, not text.

    Raises:
        ValueError: pyarrow is not installed; not such a file; no such column, several, or of another type.
    """
    with _opened(path) as table:
        _column_name(path, table.schema, keys, chats)


def read_rows(path: Path, keys: tuple[str, ...], chats: bool, first: int) -> Iterator[tuple[int, bytes | None, int]]:
    """(number, content, bytes) of each row but the first `first` ones: its number, from 1; what it
    holds, None for null; and how many bytes of the file the rows up to it take, about.

    Raises:
        ValueError: as `check_column`, or the file is damaged. One line, with the path.
    """
    with _opened(path) as table:
        key = _column_name(path, table.schema, keys, chats)
        number, batches = first, table.batches(key, first)
        while (batch := _next(path, number, batches, key if chats else None)) is not None:
            values, disk_bytes = batch
            for value in values:
                number += 1
                yield number, value, disk_bytes


def _next(path: Path, number: int, batches: Iterator, chats_key: str | None) -> tuple[list[bytes | None], int] | None:
    """The next rows, decoded; None after the last."""
    import pyarrow

    try:
        batch = next(batches, None)
        if batch is None:
            return None
        column, disk_bytes = batch
        return list(_chats(column, chats_key)) if chats_key else _texts(column), disk_bytes
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: damaged after row {number} ({one_line(error, 200)})") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator["_Parquet | _Arrow"]:
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f"{path}: reading it needs a package that is not installed: pip install pyarrow") from None
    try:
        table = _Parquet(path) if path.suffix == ".parquet" else _Arrow(path)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        kind = "a Parquet" if path.suffix == ".parquet" else "an Arrow"
        raise ValueError(f"{path}: not {kind} file ({one_line(error, 200)})") from error
    with contextlib.closing(table):
        try:
            yield table
        except UnicodeDecodeError as error:  # texts are not decoded here, but names of columns are
            raise ValueError(f"{path}: damaged (the name of a column is not UTF-8)") from error


class _Parquet:
    def __init__(self, path: Path):
        import pyarrow.parquet

        # Read page by page: a row group, whose size is the writer's choice, may not fit into memory.
        self._file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        self._bytes = path.stat().st_size
        self.schema = self._file.schema_arrow

    def close(self) -> None:
        self._file.close()

    def batches(self, key: str, first: int) -> Iterator[tuple[Any, int]]:
        metadata = self._file.metadata
        group = row = 0
        while group < metadata.num_row_groups and row + metadata.row_group(group).num_rows <= first:
            row += metadata.row_group(group).num_rows
            group += 1
        groups = list(range(group, metadata.num_row_groups))
        for batch in self._file.iter_batches(_ROWS, row_groups=groups, columns=[key], use_threads=False):
            row += len(batch)
            if row > first:
                fresh = min(row - first, len(batch))
                yield batch.column(0)[len(batch) - fresh :], self._bytes * row // metadata.num_rows


class _Arrow:
    """A stream or file of record batches, mapped into memory."""

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

    def batches(self, key: str, first: int) -> Iterator[tuple[Any, int]]:
        row = 0
        for batch in self._batches:
            column = batch.column(batch.schema.get_field_index(key))
            column = column[max(0, first - row) :]
            row += len(batch)
            for begin in range(0, len(column), _ROWS):
                yield column[begin : begin + _ROWS], self._source.tell()


def _column_name(path: Path, schema: Any, keys: tuple[str, ...], chats: bool) -> str:
    from pyarrow import types

    found = [key for key in keys if key in schema.names]
    if len(found) > 1:
        raise ValueError(
            f"{path}: has the columns {' and '.join(map(repr, found))}: --json-key names the one that is meant"
        )
    key = next(iter(found), None)
    if key is None:
        wanted, there = " or ".join(map(repr, keys)), one_line(", ".join(schema.names), 200)
        raise ValueError(f"{path}: no column {wanted}; it has {there} (--json-key names one)")
    if schema.names.count(key) > 1:
        raise ValueError(f"{path}: {schema.names.count(key)} columns are named {key!r}; one is needed")
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
    """UTF-8, or what stands there for it: Arrow does not say, and one text that is not would stop the others."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        return _of_dictionary(column)
    kind = pyarrow.large_binary() if pyarrow.types.is_large_string(column.type) else pyarrow.binary()
    column = column.cast(kind)
    column.validate(full=True)  # Arrow trusts what it reads: offsets beyond the data would end the process
    return column.to_pylist()


def _of_dictionary(column: Any) -> list[bytes | None]:
    """The same of dictionary-encoded texts. All rows decoded at once may have more bytes than one Arrow array can."""
    import pyarrow

    column.indices.validate(full=True)
    places = column.indices.to_pylist()
    used = sorted({place for place in places if place is not None})
    if used and not 0 <= used[0] <= used[-1] < len(column.dictionary):
        raise pyarrow.ArrowInvalid(f"place {used[-1]} is beyond the dictionary's {len(column.dictionary)} texts")
    texts = {place: _texts(column.dictionary[place : place + 1])[0] for place in used}
    return [None if place is None else texts[place] for place in places]


def _chats(column: Any, key: str) -> Iterator[bytes]:
    for row in range(len(column)):
        try:
            column[row : row + 1].validate(full=True)
            turns = column[row].as_py()
        except ValueError:  # ArrowInvalid and UnicodeDecodeError are such
            yield b"\xff"  # is told apart where lines are, as not UTF-8
        else:
            yield json.dumps({key: turns}, default=str).encode()


def _listed(path: Path, key: str) -> list | None:
    try:
        return json.loads(path.read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
