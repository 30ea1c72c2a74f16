"""Write a folder atomically, and write and check the checksums of its files."""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from megatron_cream.common.errors import UsageError
from megatron_cream.common.files import (
    check_can_create,
    check_new_path,
    check_regular,
    is_file_name,
    read_json,
    write_json,
)

# Megatron's name for its manifest, so that its --verify-integrity reads it too.
MANIFEST = "integrity.json"
TRACKER = "latest_checkpointed_iteration.txt"  # Megatron's; training changes it, so no manifest lists it
_READ_BYTES = 16 << 20
_HASH_THREADS = 4
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux: fcntl.h, linux/fs.h
_CARDS = (".md",)
_EDITABLE = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".md")


@contextlib.contextmanager
def new_folder(path: Path, *, flag: str, overwrite: bool, needs_bytes: int) -> Iterator[Path]:
    """Yield an empty folder beside `path` that is renamed to `path` if the block succeeds.

    Until then `path` is unchanged. A killed process leaves `.NAME.partial`, which the next one with the same `path`
    removes. If the file system cannot exchange two folders, it may also leave `.NAME.replaced`, which the next one
    renames back.

    Args:
        path: the folder to write.
        flag: the flag that gave `path`, for messages.
        overwrite: allow `path` to be the output of an earlier conversion.
        needs_bytes: free space that is required.

    Raises:
        UsageError: `path` must not be written, or has too little space; nothing was written.
    """
    path = path.absolute()
    check_target(path, flag=flag, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_space(path, flag=flag, needs_bytes=needs_bytes)
    partial = path.with_name(f".{path.name}.partial")
    with _lock(path.with_name(f".{path.name}.lock"), f"{flag} {path}"):
        _restore_replaced(path)
        check_target(path, flag=flag, overwrite=overwrite)
        if partial.exists():
            shutil.rmtree(partial)
        try:
            partial.mkdir()
            yield partial
            check_target(path, flag=flag, overwrite=overwrite)  # another process may have written to it
            _replace(path, partial)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def check_target(path: Path, *, flag: str, overwrite: bool) -> None:
    """Raise UsageError if `path` contains anything that must not be replaced."""
    check_new_path(path, flag)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"{flag} {path}: exists and is not a folder. Give a new one.")
    check_can_create(path, flag)
    entries = {entry.name for entry in path.iterdir()} if path.exists() else set()
    if not entries:
        return
    if not overwrite:
        if flag == "--save-hf":  # the trainer has no --overwrite
            raise UsageError(f"{flag} {path}: is not empty. Give a new folder.")
        raise UsageError(f"{flag} {path}: is not empty. Give a new folder, or --overwrite.")
    foreign = sorted(entries - _read_written_names(path))
    if foreign:
        raise UsageError(
            f"{flag} {path}: --overwrite replaces only files of a conversion, and {foreign[0]} is not one; "
            "give a new folder"
        )


def check_space(path: Path, *, flag: str, needs_bytes: int) -> None:
    """Raise UsageError if the file system of `path` has less than `needs_bytes` of free space."""
    free = shutil.disk_usage(path.parent).free
    if free < needs_bytes:
        raise UsageError(
            f"{flag} {path}: needs {needs_bytes / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free there"
        )


def _read_written_names(path: Path) -> set[str]:
    """Return the names directly in `path` that a conversion wrote, according to its manifest."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        names = json.loads((path / MANIFEST).read_text())["files"]
        return {MANIFEST, TRACKER} | {Path(name).parts[0] for name in names}
    return set()


def _replace(path: Path, new: Path) -> None:
    """Rename `new` to `path`; an existing `path` is removed, or gets the name of `new`."""
    _sync(new)
    if not path.exists():
        new.rename(path)
    elif not _exchange(path, new):
        old = _replaced_path(path)
        try:
            path.rename(old)
            new.rename(path)
        except BaseException:
            _restore_replaced(path)
            raise
        shutil.rmtree(old)
    _sync(path.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange the names of two folders atomically; return False if the system cannot."""
    with contextlib.suppress(OSError, AttributeError):  # the C library is missing, or lacks the function
        renameat2 = ctypes.CDLL(None).renameat2
        return renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)) == 0
    return False


def _replaced_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced")


def _restore_replaced(path: Path) -> None:
    """Restore or remove the `.NAME.replaced` folder of a process killed between two renames."""
    old = _replaced_path(path)
    if old.is_symlink() or not old.is_dir():
        return
    if not path.exists():
        old.rename(path)
    else:
        shutil.rmtree(old)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _lock(file: Path, what: str) -> Iterator[None]:
    """Hold a lock against other writers of a folder; the kernel frees it if the process dies."""
    check_regular(file, what)
    with open(file, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{what}: another conversion is writing there now") from None
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


class HashingFile:
    """A binary file for writing that computes the SHA-256 and reports the bytes written."""

    def __init__(self, file: BinaryIO, progress=None):
        self._file, self._hash, self._progress = file, hashlib.sha256(), progress

    def write(self, data) -> int:
        self._file.write(data)
        self._hash.update(data)
        size = memoryview(data).nbytes
        if self._progress:
            self._progress(size)
        return size

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def __getattr__(self, name):  # tell, flush, fileno, close
        return getattr(self._file, name)


def hash_file(path: Path, progress=None) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
            if progress:
                progress(len(block))
    return digest.hexdigest()


def write_manifest(folder: Path, hashes: dict[str, str]) -> None:
    """Write `integrity.json`: the SHA-256 of every file under `folder`.

    Args:
        folder: folder of a step or an exported model; the manifest is written into it.
        hashes: SHA-256 of the files that were hashed while they were written, by path in `folder`; the
            other files are read.
    """
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and file.name not in (MANIFEST, TRACKER) and name not in hashes:
            hashes[name] = hash_file(file)
    write_json(folder / MANIFEST, {"algorithm": "sha256", "files": dict(sorted(hashes.items()))})


def read_manifest(folder: Path) -> dict[str, str]:
    """Return {path in `folder`: SHA-256} from the manifest; empty if there is no manifest.

    Raises:
        UsageError: the manifest is unreadable, or names a file outside the folder.
    """
    manifest = folder / MANIFEST
    if not os.path.lexists(manifest):  # a broken link is an error, because a manifest was lost
        return {}
    found = read_json(manifest, "a readable manifest")
    files = found.get("files") if isinstance(found, dict) else None
    if not isinstance(files, dict) or found.get("algorithm", "sha256") != "sha256":
        raise UsageError(f"{manifest}: not a readable manifest: must give the sha256 of each file")
    for name in files:
        if not all(is_file_name(part) for part in Path(name).parts):
            raise UsageError(f"{manifest}: names {repr(name)[:100]}: must be the path of a file below it")
    return files


def check_manifest(
    folder: Path, progress=None, *, share: tuple[int, int] = (0, 1), include_texts: bool = False
) -> list[str]:
    """Compare every data file in the manifest of `folder` with its checksum.

    Args:
        folder: folder with the manifest.
        progress: called with the number of bytes read; None for no report.
        share: (i, n) for reader i of n readers, which reads every n-th file.
        include_texts: check the files that users edit too: configuration, tokenizer, chat template.
            Model cards (.md) are never compared.

    Returns: a line for each file that is missing or differs; empty if there is no manifest.

    Raises:
        UsageError: the manifest is unreadable.
    """

    ignored = _CARDS if include_texts else _EDITABLE
    files = {n: digest for n, digest in read_manifest(folder).items() if Path(n).suffix not in ignored}
    # Largest first, so that readers and threads finish at about the same time.
    by_size = sorted(files, key=lambda name: (-_file_size(folder / name), name))[share[0] :: share[1]]
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        faults = pool.map(lambda name: _find_fault(folder / name, files[name], progress), by_size)
        return [line for line in faults if line]


def check_files(folder: Path, names: Iterable[str], flag: str) -> None:
    """Raise UsageError if one of these files is missing or differs from the manifest.

    Args:
        folder: folder with the manifest.
        names: paths of the files in `folder`; no other file is read.
        flag: the flag that gave the folder, for messages.
    """
    sums = read_manifest(folder)
    for name in names:
        if name in sums and (fault := _find_fault(folder / name, sums[name])):
            raise UsageError(f"{flag} {fault}")


_verified: set[tuple[Path, int, int, str]] = set()
"""Path, size, modification time and SHA-256 of files that this process has verified, to hash each only once."""


def _find_fault(file: Path, digest: str, progress: Callable[[int], None] | None = None) -> str | None:
    if not file.is_file():
        return f"{file}: missing"
    status = file.stat()
    known = (file.absolute(), status.st_size, status.st_mtime_ns, digest)
    if known in _verified:
        if progress:
            progress(status.st_size)
    elif hash_file(file, progress) != digest:
        return f"{file}: damaged or changed since it was written (SHA-256 differs)"
    _verified.add(known)
    return None


def check_unchanged(folder: Path, progress=None, *, include_texts: bool = False) -> None:
    """Raise UsageError if a file in the manifest of `folder` is missing or changed."""
    if faults := check_manifest(folder, progress, include_texts=include_texts):
        raise UsageError(faults[0])


def _file_size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0
