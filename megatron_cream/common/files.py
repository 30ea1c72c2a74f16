"""Small files: written whole or left as they were, and read with one line for whatever is wrong with them."""

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

_MOST_BYTES, _MOST_YAML_BYTES = 1 << 28, 1 << 20
_READ_BYTES = 16 << 20
HOLD_SECONDS = 30.0
_held: dict[Path, TextIO] = {}


@contextlib.contextmanager
def replacing(path: Path, *, binary: bool = False) -> Iterator[IO]:
    """A file to write, UTF-8 or binary, that takes the name `path` when the block ends without an error.

    A symbolic link stays one; what it leads to is replaced.

    Raises:
        UsageError: what is there is no regular file.
    """
    path = _regular(path)
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
    """Of matplotlib's, as what the path ends in says."""
    with replacing(path, binary=True) as file:
        figure.savefig(file, dpi=dpi, format=path.suffix[1:] or "png")


def _regular(path: Path, flag: str = "") -> Path:
    """`path` without symbolic links. A device, pipe or folder there is refused: a rename would take its place."""
    real = Path(os.path.realpath(path))
    if os.path.lexists(real) and not real.is_file():
        raise UsageError(f"{flag and flag + ' '}{path}: exists and is not a regular file")
    return real


def check_path(path: str | Path, flag: str) -> None:
    """Raise UsageError if `path`, which the user gave with `flag`, cannot be the path of a file.

    Check the text that the user gave: Path("") is the current folder.
    """
    text = os.fspath(path)
    if not text:
        raise UsageError(f"{flag} '': must not be empty. Is a shell variable unset?")
    try:
        if b"\0" in os.fsencode(text):
            raise UsageError(f"{flag} {text!r}: no path holds a NUL character")
        os.lstat(text)
    except UnicodeEncodeError as error:
        raise UsageError(f"{flag} {text!r}: no path holds the character {text[error.start]!r}") from error
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        shown = text if len(text) <= 200 else f"{text[:60]}.."
        raise UsageError(f"{flag} {shown}: {error.strerror}") from error


def check_new_path(path: Path, flag: str) -> None:
    """Do as `check_path`, also for what is made beside `path` while it is written."""
    check_path(path, flag)
    check_path(path.parent / f".{path.name}.replaced", flag)


def check_picture(path: Path, flag: str) -> None:
    """Raise UsageError unless a picture can be written to `path`, which the user gave with `flag`."""
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"{flag} {path}: must end in .png, .svg or .pdf")
    check_new_path(path, flag)
    folder = _regular(path, flag).parent
    if not folder.is_dir():
        raise UsageError(f"{flag} {path}: No such file or directory: there is no folder {path.parent}")
    check_can_be_made(folder, f"{flag} {path}:")


def missing_folders(folder: Path) -> list[Path]:
    """`folder` and its parents that do not exist yet, innermost first."""
    return [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove these folders, innermost first, up to the first that holds something or cannot be removed."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


@contextlib.contextmanager
def writing(path: Path, flag: str, kept: str = "") -> Iterator[None]:
    """Raise UsageError if the block finds `path` full or read-only.

    Args:
        path: what the block writes.
        flag: what the user gave `path` with, for the message.
        kept: what is there all the same, for the message.

    Raises:
        UsageError: there is no room, a limit on files' sizes is met, or the file system is read-only.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        raise UsageError(f"{flag} {path}: {error.strerror}{kept and '; ' + kept}") from error


def hold(folder: Path, flag: str) -> None:
    """Keep `folder`, which the user gave with `flag`, to this process until it ends, however it ends.

    What is left of a run whose launcher was killed saves once more, and goes: HOLD_SECONDS are waited for it. A file
    system without locks is taken as it is.

    Raises:
        UsageError: another process has it.
    """
    path, deadline = folder / ".lock", time.monotonic() + HOLD_SECONDS
    if path not in _held:
        check_regular(path, f"{flag} {folder}")
        _held[path] = open(path, "w")  # noqa: SIM115  (closed by the process's end)
    while True:
        try:
            # The kind of lock that forked processes do not share, and that NFS knows.
            return fcntl.lockf(_held[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return None
        if time.monotonic() >= deadline:
            raise UsageError(f"{flag} {folder}: another run is writing there now; give another folder, or wait")
        time.sleep(0.5)


def is_still_held(folder: Path) -> bool:
    """Tell whether `folder` is the one that `hold` was called on; it may be unmounted, moved or deleted since."""
    path = folder / ".lock"
    try:
        return os.path.samestat(os.fstat(_held[path].fileno()), os.stat(path))
    except (OSError, KeyError):
        return False


def check_regular(path: Path, what: str) -> None:
    """Raise UsageError if something else than a file has the place of one: to open a pipe would wait for ever."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{what}: {path} is not a file")


def check_can_be_made(folder: Path, flag: str) -> None:
    """Raise UsageError unless `folder`, which the user gave with `flag`, is there or can be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise UsageError(f"{flag} {folder}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"{flag} {folder}: {there} must not be written into")


def is_name(name: Any) -> bool:
    """Whether what a file of others calls a file can be one in its own folder: no path, nor what no file is called."""
    plain = isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")
    return plain and name.isprintable() and len(name.encode()) < 256


def append_line(path: Path, text: str) -> None:
    """A line more in a record that a run can do without: a full disk costs the line, and one of warning."""
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        print(f"warning: {path}: a line is missing: {error.strerror or error}", file=sys.stderr, flush=True)


def crc32_of(path: Path, size: int | None = None) -> int:
    """CRC-32 of a file's bytes, or of its first `size`."""
    crc, left = 0, path.stat().st_size if size is None else size
    with open(path, "rb") as file:
        while left and (block := file.read(min(left, _READ_BYTES))):
            crc = zlib.crc32(block, crc)
            left -= len(block)
    return crc


def read_text(path: Path, what: str, most_bytes: int = _MOST_BYTES) -> str:
    """Return the text of a file, UTF-8.

    Args:
        path: of the file.
        what: it should have been, for the message: "a YAML file that can be read".
        most_bytes: a file of this size or more is rejected.

    Raises:
        UsageError: no file, one of `most_bytes` or more, or not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path}: not a file")  # a folder, or a pipe that would never end
        with open(path, "rb") as file:
            data = file.read(most_bytes)
        if len(data) == most_bytes:
            raise UsageError(f"{path}: not {what}: it has {most_bytes >> 20} MB or more")
        return data.decode()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path}: not {what}: {one_line(error)}") from error


def read_json(path: Path, what: str) -> Any:
    """What a JSON file holds.

    Raises:
        UsageError: as `read_text`, or no JSON.
    """
    try:
        return json.loads(read_text(path, what))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not {what}: {one_line(error)}") from error


def to_json(value: Any, **options: Any) -> str:
    """Dump a value as JSON that every reader takes: null for NaN and infinite numbers.

    Args:
        value: of dicts, lists, strings, numbers, booleans and None.
        options: of `json.dumps`.
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
    """Write `value` as JSON, whole or not at all."""
    with replacing(path) as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def read_yaml(path: Path, what: str, loader: type[yaml.SafeLoader] = yaml.SafeLoader) -> Any:
    """A YAML file's value, by a loader that makes plain values only.

    Raises:
        UsageError: as `read_text`, or no YAML.
    """
    text = read_text(path, what, _MOST_YAML_BYTES)
    try:
        return yaml.load(text, loader)
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:  # a date that is none, too many digits
        raise UsageError(f"{path}: not a YAML file that can be read: {one_line(error)}") from error
