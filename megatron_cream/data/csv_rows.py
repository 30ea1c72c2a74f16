"""Stream one column of a CSV file: RFC 4180's form with a header row, commas and double quotes."""

import codecs
import csv
from collections.abc import Iterator
from typing import BinaryIO

from megatron_cream.common.errors import one_line
from megatron_cream.data import compressed


class DamagedCsv(ValueError):
    """A file is not CSV with the column. The message is one line without the path."""


def read_csv_column(stream: BinaryIO, key: str) -> Iterator[tuple[int, bytes | str]]:
    """Yield (number, text) of each row after the header; the number counts from 1.

    A text is bytes in the file's encoding. It is a str, the reason, where a row cannot be read.

    Raises:
        DamagedCsv: no column of this name, or malformed quotes.
        LongLine: a row is longer than LONGEST_LINE.
    """
    csv.field_size_limit(compressed.LONGEST_LINE + 1)
    lines = _Lines(stream)
    rows = csv.reader(lines, strict=True)  # otherwise an open quote would silently swallow all rows after it
    try:
        header = next(rows, [])
        column = _find_column(header, key)
        number = 0
        for row in rows:
            lines.row_bytes = 0
            if not row:  # a blank line
                continue
            number += 1
            if len(row) == len(header):
                yield number, row[column].encode("utf-8", "surrogateescape")
            else:
                yield number, "row with another number of fields than the header"
    except csv.Error as error:
        raise DamagedCsv(f"not CSV in line {lines.number} ({one_line(error, 200)})") from error


def _find_column(header: list[str], key: str) -> int:
    if header.count(key) > 1:
        raise DamagedCsv(f"{header.count(key)} columns are named {key!r}; there must be only one")
    if key not in header:
        columns = one_line(", ".join(header), 200)
        raise DamagedCsv(f"no column {key!r}; its columns are {columns}; choose one with --json-key")
    return header.index(key)


class _Lines:
    """The lines of a stream. Bytes that are not UTF-8 become lone surrogates, from which they can be restored."""

    def __init__(self, stream: BinaryIO):
        self._lines = compressed.bounded_lines(stream)
        self.number = 0
        self.row_bytes = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.number += 1
        self.row_bytes += len(line)
        if self.row_bytes > compressed.LONGEST_LINE:
            raise compressed.LongLine(
                f"the row that ends in line {self.number} or later is longer than {compressed.LONGEST_LINE >> 20} MiB. "
                "Close its quotes, or split the document"
            )
        if self.number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        return line.decode("utf-8", "surrogateescape")
