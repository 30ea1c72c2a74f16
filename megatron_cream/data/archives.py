"""Read the members of a .zip archive as files, without unpacking it on disk."""

import functools
import io
import os
import stat
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megatron_cream.common.errors import one_line
from megatron_cream.data.compressed import DamagedFile, ForwardStream

ARCHIVE_SUFFIX = ".zip"

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Compression that zipfile reads in bounded memory. A .bz2 member of 500 bytes would become 500 MB at once."""

_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError)


@dataclass(frozen=True)
class ZipMember:
    """A file in an archive, with what reading needs of a Path."""

    archive: Path
    name: str
    size: int
    """Bytes when decompressed, as the archive says."""

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def parent(self) -> Path:
        return self.archive

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def open(self, _mode: str = "rb") -> io.BufferedReader:
        """Return a stream of the bytes; its read and forward seek raise DamagedFile."""
        return io.BufferedReader(_MemberStream(self), 1 << 17)


def list_members(archive: Path) -> list[zipfile.ZipInfo]:
    """Return the files of an archive, sorted by name.

    Raises:
        ValueError: not a .zip archive, or a file in it is encrypted or of another compression. One line with the path.
        OSError: the archive cannot be read.
    """
    try:
        members = _open(archive).infolist()
    except (*_ERRORS, ValueError) as error:
        raise ValueError(f"{archive}: not a complete zip archive ({one_line(error, 200)})") from error
    files = {member.filename: member for member in members if not member.is_dir()}
    for name, member in files.items():
        if member.flag_bits & 1:
            raise ValueError(f"{archive}/{name}: encrypted. Unpack the archive first")
        if member.compress_type not in _METHODS:
            method = zipfile.compressor_names.get(member.compress_type, member.compress_type)
            raise ValueError(f"{archive}/{name}: compressed by {method}, not by deflate. Unpack the archive first")
    return [files[name] for name in sorted(files)]


def is_link(member: zipfile.ZipInfo) -> bool:
    """Return whether the member is a symlink, whose content is only the path of its target."""
    return stat.S_ISLNK(member.external_attr >> 16)


def _open(archive: Path) -> zipfile.ZipFile:
    """Open an archive, or return it if it is the last one opened: its table of contents may be long.

    Forked processes must not share an open file's position, so each opens its own.
    """
    status = os.stat(archive)
    return _open_last(archive, os.getpid(), status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _open_last(archive: Path, *_key: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(archive)


class _MemberStream(ForwardStream):
    def __init__(self, member: ZipMember):
        super().__init__()
        self._member = member
        self._file: io.BufferedIOBase | None = None

    def _read_some(self, size: int) -> bytes:
        try:
            self._file = self._file or _open(self._member.archive).open(self._member.name)
            return self._file.read1(size)
        except _ERRORS as error:
            problem = one_line(error, 200).split(" for file")[0]  # the message has the name already
            raise DamagedFile(f"a damaged file in a zip archive ({problem})") from error

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()
