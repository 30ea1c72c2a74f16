"""Read plain or compressed (.gz, .zst, .bz2, .xz, .lz4) files as one stream of bytes.

A truncated or damaged compressed file raises an error instead of ending early.
"""

import bz2
import gzip
import io
import lzma
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".lz4")

_CHUNK = 1 << 12
"""Compressed bytes of .zst read at a time. Small, as their whole text, up to 128 MiB for zeros, is held in memory."""


LONGEST_LINE = 1 << 28
"""Maximum bytes of a line or of a text file. A few MB of .gz or .zst can expand to lines of gigabytes."""

_XZ_MEMORY = 1 << 31
"""Most bytes of a .xz file's dictionary, which its header states."""


class LongLine(ValueError):
    """A line is longer than LONGEST_LINE. The message is one line without the path."""


class DamagedFile(ValueError):
    """A compressed file is truncated or not in the format of its suffix."""


def suffix(path: Any) -> str:
    """Return the suffix that names the content's format, in lower case and without one of COMPRESSED_SUFFIXES."""
    return (Path(path.stem) if is_compressed(path) else path).suffix.lower()


def is_compressed(path: Any) -> bool:
    """Return whether the suffix is one of COMPRESSED_SUFFIXES, in any case."""
    return path.suffix.lower() in COMPRESSED_SUFFIXES


def open_decompressed(path: Any, raw: BinaryIO) -> io.BufferedReader:
    """Return a decompressed stream of `raw`, the file `path` opened for reading.

    Its read and forward seek raise DamagedFile, whose message is one line without the path.

    Raises:
        ValueError: `path` is a .zst or .lz4 file and the package that reads it is not installed.
    """
    packed = path.suffix.lower()
    if packed == ".gz":
        return io.BufferedReader(_Gzip(raw), 1 << 17)
    if packed == ".zst":
        return io.BufferedReader(_Zstandard(raw), 1 << 17)
    if packed == ".bz2":
        return io.BufferedReader(_Streams(raw, "bzip2", bz2.BZ2Decompressor, OSError), 1 << 17)
    if packed == ".xz":
        new_stream = partial(lzma.LZMADecompressor, lzma.FORMAT_XZ, _XZ_MEMORY)
        return io.BufferedReader(_Streams(raw, "xz", new_stream, lzma.LZMAError, padding=b"\0"), 1 << 17)
    if packed == ".lz4":
        return io.BufferedReader(_Streams(raw, "lz4", _import_lz4().LZ4FrameDecompressor, RuntimeError), 1 << 17)
    return raw


def _import_lz4() -> Any:
    try:
        import lz4.frame
    except ImportError:
        raise ValueError("reading .lz4 needs a package that is not installed: pip install lz4") from None
    return lz4.frame


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


class ForwardStream(io.RawIOBase):
    """A stream that can seek forward, by reading. A subclass defines `_read_some`."""

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


class _Gzip(ForwardStream):
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


class _Zstandard(ForwardStream):
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


class _Streams(ForwardStream):
    """One or more compressed streams, decompressed in bounded steps.

    The standard library's own readers ignore a damaged second stream.

    Args:
        raw: the compressed bytes.
        name: of the format, for messages.
        new_stream: creates a decompressor with the methods of the standard library's.
        error: raised by it where the data is damaged.
        padding: bytes that may follow a stream.
    """

    def __init__(
        self, raw: BinaryIO, name: str, new_stream: Callable[[], Any], error: type[Exception], padding: bytes = b""
    ):
        super().__init__()
        self._raw, self._name, self._new_stream, self._error = raw, name, new_stream, error
        self._padding, self._is_first = padding, True
        self._stream: Any = None
        self._compressed = b""

    def _read_some(self, size: int) -> bytes:
        while True:
            if not self._compressed and (self._stream is None or self._stream.needs_input):
                self._compressed = self._raw.read(_CHUNK)
                if not self._compressed and (self._stream is not None or self._is_first):
                    problem = "it is empty" if self._is_first else "it ends within a stream"
                    raise DamagedFile(f"not a complete {self._name} file ({problem})")
                if not self._compressed:
                    return b""
            if self._stream is None:
                if not self._is_first:
                    self._compressed = self._compressed.lstrip(self._padding)
                    if not self._compressed:
                        continue
                self._stream, self._is_first = self._new_stream(), False
            try:
                data = self._stream.decompress(self._compressed, size)
            except self._error as error:
                raise DamagedFile(f"not a complete {self._name} file ({error})") from error
            self._compressed = b""
            if self._stream.eof:
                self._compressed, self._stream = self._stream.unused_data, None
            if data:
                return data
