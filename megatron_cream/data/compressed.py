"""Read plain or compressed (.gz, .zst) files as one stream of bytes.

A truncated or damaged compressed file raises an error instead of ending early.
"""

import gzip
import io
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

COMPRESSED_SUFFIXES = (".gz", ".zst")

_CHUNK = 1 << 12
"""Compressed bytes of .zst read at a time. Small, as their whole text, up to 128 MiB for zeros, is held in memory."""


LONGEST_LINE = 1 << 28
"""Maximum bytes of a line or of a text file. A few MB of .gz or .zst can expand to lines of gigabytes."""


class LongLine(ValueError):
    """A line is longer than LONGEST_LINE. The message is one line without the path."""


class DamagedFile(ValueError):
    """A compressed file is truncated or not in the format of its suffix."""


def suffix(path: Path) -> str:
    """Return the suffix that names the content's format, in lower case and without `.gz` or `.zst`."""
    return (Path(path.stem) if is_compressed(path) else path).suffix.lower()


def is_compressed(path: Path) -> bool:
    """Return whether the suffix is one of COMPRESSED_SUFFIXES, in any case."""
    return path.suffix.lower() in COMPRESSED_SUFFIXES


def open_decompressed(path: Path, raw: BinaryIO) -> io.BufferedReader:
    """Return a decompressed stream of `raw`, the file `path` opened for reading.

    Its read and forward seek raise DamagedFile, whose message is one line without the path.

    Raises:
        ValueError: `path` is a .zst file and the package zstandard is not installed.
    """
    packed = path.suffix.lower()
    if packed == ".gz":
        return io.BufferedReader(_Gzip(raw), 1 << 17)
    if packed == ".zst":
        return io.BufferedReader(_Zstandard(raw), 1 << 17)
    return raw


def bounded_lines(stream: BinaryIO, first: int = 1) -> Iterator[bytes]:
    """Yield the lines of a stream.

    Args:
        stream: of decompressed bytes.
        first: number of the first line, for the message.

    Raises:
        LongLine: a line is too long.
    """
    number = first
    while line := stream.readline(LONGEST_LINE + 1):
        if len(line) > LONGEST_LINE:
            raise LongLine(
                f"line {number} is longer than {LONGEST_LINE >> 20} MiB. Put one JSON object on each line, or split "
                "the document"
            )
        yield line
        number += 1


class _ForwardStream(io.RawIOBase):
    """A stream that can seek forward, by reading."""

    def __init__(self):
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < self._position:
            raise io.UnsupportedOperation("can only seek forward, from the start")
        while self._position < offset and self.read(min(offset - self._position, 1 << 20)):
            pass
        return self._position

    def readinto(self, buffer) -> int:
        data = self._read_some(len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    @abstractmethod
    def _read_some(self, size: int) -> bytes: ...


class _Gzip(_ForwardStream):
    def __init__(self, raw: BinaryIO):
        super().__init__()
        self._raw = raw
        self._file = gzip.GzipFile(fileobj=raw)

    def _read_some(self, size: int) -> bytes:
        try:
            data = self._file.read1(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DamagedFile(f"not a complete gzip file ({error})") from error
        if not data and not self._raw.tell():  # gzip of nothing still has a header
            raise DamagedFile("not a complete gzip file (it is empty)")
        return data


class _Zstandard(_ForwardStream):
    """A file of zstd frames. zstandard's own reader does not report a truncated file."""

    def __init__(self, raw: BinaryIO):
        super().__init__()
        try:
            import zstandard
        except ImportError:
            raise ValueError("reading .zst needs a package that is not installed: pip install zstandard") from None
        self._raw = raw
        self._error = zstandard.ZstdError
        # Accept the large windows that `zstd --long` writes.
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame = None
        self._compressed = self._text = b""
        self._offset = 0

    def _read_some(self, size: int) -> bytes:
        while self._offset == len(self._text):
            self._offset, self._text = 0, b""
            self._compressed = self._compressed or self._raw.read(_CHUNK)
            if not self._compressed:
                if self._frame is not None:
                    raise DamagedFile("not a complete zstd file (it ends within a frame)")
                if not self._raw.tell():
                    raise DamagedFile("not a complete zstd file (it is empty)")
                return b""
            self._frame = self._frame or self._new_frame()
            try:
                self._text = self._frame.decompress(self._compressed)
            except self._error as error:
                raise DamagedFile(f"not a zstd file ({error})") from error
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        data = self._text[self._offset : self._offset + size]
        self._offset += len(data)
        return data
