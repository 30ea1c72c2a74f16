"""Files as they are or compressed (.gz, .zst), read as one stream of bytes.

A compressed file that is cut or damaged is an error, never a shorter file.
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
"""Compressed bytes of .zst taken at a time. Few: the text that they become, of zeros 128 MiB, is held in memory."""


LONGEST_LINE = 1 << 28
"""Bytes of a line, or of a text file: more is no document. A few MB of .gz or .zst may hold lines of gigabytes."""


class LongLine(ValueError):
    """A line beyond LONGEST_LINE. The message is one line without the path."""


class DamagedFile(ValueError):
    """A compressed file that ends early or does not hold what its suffix says."""


def suffix(path: Path) -> str:
    """The suffix that tells the kind of file: that under `.gz` or `.zst`, where it is compressed."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED_SUFFIXES else path.suffix


def decompressed(path: Path, raw: BinaryIO) -> io.BufferedReader:
    """The content of `raw`, the file `path` opened for reading.

    Reading and seeking forward raise DamagedFile, whose message is one line without the path.

    Raises:
        ValueError: a .zst file, and the package that reads it is not installed.
    """
    if path.suffix == ".gz":
        return io.BufferedReader(_Gzip(raw), 1 << 17)
    if path.suffix == ".zst":
        return io.BufferedReader(_Zstandard(raw), 1 << 17)
    return raw


def bounded_lines(stream: BinaryIO, first: int = 1) -> Iterator[bytes]:
    """Yield the lines of a stream.

    Args:
        stream: of decompressed bytes.
        first: number of the first line, for the message.

    Raises:
        LongLine: the first that is too long.
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


class _Forward(io.RawIOBase):
    """A stream that can be sought forward, by reading."""

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
            raise io.UnsupportedOperation("only forward, from the start")
        while self._position < offset and self.read(min(offset - self._position, 1 << 20)):
            pass
        return self._position

    def readinto(self, buffer) -> int:
        data = self._some(len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    @abstractmethod
    def _some(self, most: int) -> bytes: ...


class _Gzip(_Forward):
    def __init__(self, raw: BinaryIO):
        super().__init__()
        self._raw = raw
        self._file = gzip.GzipFile(fileobj=raw)

    def _some(self, most: int) -> bytes:
        try:
            data = self._file.read1(most)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DamagedFile(f"not a whole gzip file ({error})") from error
        if not data and not self._raw.tell():  # even of nothing there is a header
            raise DamagedFile("not a whole gzip file (it is empty)")
        return data


class _Zstandard(_Forward):
    """Frames one after the other. zstandard's own reader takes a cut file for a shorter one."""

    def __init__(self, raw: BinaryIO):
        super().__init__()
        try:
            import zstandard
        except ImportError:
            raise ValueError("reading .zst needs a package that is not installed: pip install zstandard") from None
        self._raw = raw
        self._error = zstandard.ZstdError
        # Large windows, as `zstd --long` writes them.
        self._new = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame = None
        self._compressed = self._text = b""
        self._taken = 0

    def _some(self, most: int) -> bytes:
        while self._taken == len(self._text):
            self._taken, self._text = 0, b""
            self._compressed = self._compressed or self._raw.read(_CHUNK)
            if not self._compressed:
                if self._frame is not None:
                    raise DamagedFile("not a whole zstd file (it ends within a frame)")
                if not self._raw.tell():
                    raise DamagedFile("not a whole zstd file (it is empty)")
                return b""
            self._frame = self._frame or self._new()
            try:
                self._text = self._frame.decompress(self._compressed)
            except self._error as error:
                raise DamagedFile(f"not a zstd file ({error})") from error
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        data = self._text[self._taken : self._taken + most]
        self._taken += len(data)
        return data
