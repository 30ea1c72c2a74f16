"""Write small files atomically, lock folders, and read small files with one-line errors."""

import contextlib
import errno
import fcntl
import json
import math
import os
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TextIO

import yaml

from megatron_cream.common.errors import UsageError, one_line

_MAX_BYTES, _MAX_YAML_BYTES = 1 << 28, 1 << 20
_READ_BYTES = 16 << 20
LOCK_WAIT_SECONDS = 30.0
_locks: dict[Path, TextIO] = {}


@contextlib.contextmanager
def atomic_write(path: Path, *, binary: bool = False) -> Iterator[IO]:
    """Yield a file that replaces `path` when the block ends without an error.

    The file is UTF-8 text or binary.

    A symbolic link stays; its target is replaced.

    Raises:
        UsageError: `path` exists and is not a regular file.
    """
    path = _resolve_regular(path)
    beside = path.with_name(f".{path.name}.partial")
    try:
        with open(beside, "wb") if binary else open(beside, "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def save_picture(figure, path: Path, dpi: int = 150) -> None:
    """Save a matplotlib figure in the format that the path's suffix names."""
    with atomic_write(path, binary=True) as file:
        figure.savefig(file, dpi=dpi, format=path.suffix[1:] or "png")


def _resolve_regular(path: Path, flag: str = "") -> Path:
    """Resolve symbolic links of `path`; reject a device, pipe or folder.

    A rename would replace it.
    """
    real = Path(os.path.realpath(path))
    if os.path.lexists(real) and not real.is_file():
        raise UsageError(f"{flag and flag + ' '}{path}: exists and is not a regular file")
    return real


def check_path(path: str | Path, flag: str) -> None:
    """Raise UsageError if `path`, given with `flag`, cannot be the path of a file.

    Check the text that the user gave: Path("") is the current folder.
    """
    text = os.fspath(path)
    if not text:
        raise UsageError(f"{flag} '': must not be empty. Is a shell variable unset?")
    try:
        if b"\0" in os.fsencode(text):
            raise UsageError(f"{flag} {text!r}: a path cannot contain a NUL character")
        os.lstat(text)
    except UnicodeEncodeError as error:
        raise UsageError(f"{flag} {text!r}: a path cannot contain the character {text[error.start]!r}") from error
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        shown = text if len(text) <= 200 else f"{text[:60]}.."
        raise UsageError(f"{flag} {shown}: {error.strerror}") from error


def check_new_path(path: Path, flag: str) -> None:
    """Check `path` as `check_path` does, and the temporary name beside it that writing uses."""
    check_path(path, flag)
    check_path(path.parent / f".{path.name}.replaced", flag)


def check_picture(path: Path, flag: str) -> None:
    """Raise UsageError unless a picture can be written to `path`, given with `flag`."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{flag} {path}: must end in .png, .svg or .pdf")
    check_new_path(path, flag)
    folder = _resolve_regular(path, flag).parent
    if not folder.is_dir():
        raise UsageError(f"{flag} {path}: the folder {path.parent} does not exist")
    check_can_create(folder, f"{flag} {path}:")


def missing_folders(folder: Path) -> list[Path]:
    """Return those of `folder` and its parents that do not exist yet, innermost first."""
    return [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove these folders in order; stop at the first that is not empty or cannot be removed."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextlib.contextmanager
def convert_disk_errors(path: Path, flag: str, kept: str = "") -> Iterator[None]:
    """Raise the block's error as a UsageError if the disk of `path` is full or read-only.

    Args:
        path: the file or folder that the block writes.
        flag: the flag that gave `path`, for the message.
        kept: a remark on work that is not lost, for the message.

    Raises:
        UsageError: no space left, quota or file size limit exceeded, or read-only file system.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise UsageError(f"{flag} {path}: {error.strerror}{kept and '; ' + kept}") from error


def lock_folder(folder: Path, flag: str) -> None:
    """Lock `folder`, given with `flag`, until this process ends in any way.

    Ranks of a run whose launcher was killed save once more before they exit, so this waits LOCK_WAIT_SECONDS for the
    lock. On a file system without locks it does nothing.

    Raises:
        UsageError: another process has the lock.
    """
    path, deadline = folder / ".lock", time.monotonic() + LOCK_WAIT_SECONDS
    if path not in _locks:
        check_regular(path, f"{flag} {folder}")
        _locks[path] = open(path, "w")  # noqa: SIM115  (closed when the process ends)
    while True:
        try:
            # A POSIX lock: forked processes do not inherit it, and NFS supports it.
            return fcntl.lockf(_locks[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return None
        if time.monotonic() >= deadline:
            raise UsageError(f"{flag} {folder}: another run is writing there now. Wait, or give another folder.")
        time.sleep(0.5)


def is_locked_folder(folder: Path) -> bool:
    """Return whether `folder` is still the one that `lock_folder` locked.

    It may have been unmounted, moved or deleted.
    """
    path = folder / ".lock"
    try:
        return os.path.samestat(os.fstat(_locks[path].fileno()), os.stat(path))
    except (OSError, KeyError):
        return False


def check_regular(path: Path, what: str) -> None:
    """Raise UsageError if `path` exists and is not a file: opening a pipe would hang."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{what}: {path} is not a file")


def check_can_create(folder: Path, flag: str, given: Path | None = None) -> None:
    """Raise UsageError unless `folder` exists or can be created.

    Args:
        folder: the folder.
        flag: the flag that names it.
        given: the value of the flag, if it is not `folder` itself.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise UsageError(f"{flag} {given or folder}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{flag} {given or folder}: {existing} is not writable")


def is_file_name(name: Any) -> bool:
    """Return whether `name`, read from a user's file, is a plain file name and not a path."""
    plain = isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")
    return plain and name.isprintable() and len(name.encode()) < 256


def append_line(path: Path, text: str) -> None:
    """Append a line to an optional record; on a full disk, print a warning instead."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        print(f"warning: {path}: a line is missing: {error.strerror or error}", file=sys.stderr, flush=True)


def crc32_of(path: Path, size: int | None = None) -> int:
    """Return the CRC-32 of a file, or of its first `size` bytes."""
    crc, left = 0, path.stat().st_size if size is None else size
    with open(path, "rb") as file:
        while left and (block := file.read(min(left, _READ_BYTES))):
            crc = zlib.crc32(block, crc)
            left -= len(block)
    return crc


def read_text(path: Path, what: str, max_bytes: int = _MAX_BYTES) -> str:
    """Return the text of a UTF-8 file.

    Args:
        path: the file.
        what: the expected content, for the message: "a YAML file that can be read".
        max_bytes: a file of this size or more is rejected.

    Raises:
        UsageError: no file, one of `max_bytes` or more, or not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path}: not a file")  # a folder, or a pipe, which may never end
        with open(path, "rb") as file:
            data = file.read(max_bytes)
        if len(data) == max_bytes:
            raise UsageError(f"{path}: not {what}: it has {max_bytes >> 20} MB or more")
        return data.decode()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not {what}: {one_line(error)}") from error


def read_json(path: Path, what: str) -> Any:
    """Return the content of a JSON file.

    Raises:
        UsageError: as `read_text`, or not JSON.
    """
    try:
        return json.loads(read_text(path, what))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not {what}: {one_line(error)}") from error


def to_json(value: Any, **options: Any) -> str:
    """Return a value as strict JSON, with null for NaN and infinite numbers.

    Args:
        value: made of dicts, lists, strings, numbers, booleans and None.
        options: passed to `json.dumps`.
    """
    return json.dumps(_without_nan(value), allow_nan=False, **options)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """Write `value` to a JSON file atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def read_yaml(path: Path, what: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """Return the content of a YAML file; the loader creates plain values only.

    Raises:
        UsageError: as `read_text`, or not YAML.
    """
    text = read_text(path, what, _MAX_YAML_BYTES)
    try:
        return yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # an impossible date, too many digits
        raise UsageError(f"{path}: not a YAML file that can be read: {one_line(error)}") from error
