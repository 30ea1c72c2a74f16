"""Find the documents that are long enough, once per job, and share the result in a file.

The numbers of 100 million documents take 400 MB, which otherwise each rank would keep. If all documents are long
enough, or few are, no file is written. The file is a .npy array followed by its CRC-32, which each rank checks.
"""

import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_cream.common.errors import one_line

IN_MEMORY = 1 << 20
"""Maximum count of document numbers that a rank holds in its own memory: 4 MiB."""

_CHUNK = 1 << 20
"""Documents processed at a time."""

_CRC_BYTES = 4

_DTYPE = np.dtype("<i4")
"""Megatron numbers the documents of one data set in 32 bits."""


def find_long_documents(
    lengths: np.ndarray, begin: int, end: int, minimum: int, file: Path, warn: Callable[[str], None]
) -> Sequence[int]:
    """Return, in order, the numbers of the documents that have `minimum` tokens or more.

    The first process writes `file` under a temporary name and renames it. So several processes may write at once, and
    a killed one leaves no partial file. A damaged or foreign file is replaced.

    Args:
        lengths: int32 [n], in tokens; may be mapped from a file.
        begin: number of the first document to look at.
        end: number after the last document to look at.
        minimum: minimum length of a long document, in tokens.
        file: the file with the result, see `cache_file`.
        warn: called with the reason if `file` cannot be written and the numbers stay in memory.

    Returns: a range if all are long enough; else int32 [m], mapped from `file` if m is above IN_MEMORY.
    """
    kept = _open(file, lengths, begin, end, minimum)
    if kept is not None:
        return kept
    count = sum(len(part) for part in iterate_long_documents(lengths, begin, end, minimum))
    if count == end - begin:
        return range(begin, end)
    if count > IN_MEMORY:
        try:
            _write(file, count, iterate_long_documents(lengths, begin, end, minimum))
            if (kept := _open(file, lengths, begin, end, minimum)) is not None:
                return kept
            reason = "the written file cannot be read back"
        except OSError as error:
            reason = error.strerror or one_line(error)
        warn(f"{file.parent}: {reason}: each rank keeps the numbers of {count} documents in memory, {count >> 18} MiB")
    found = np.empty(count, dtype=_DTYPE)
    at = 0
    for part in iterate_long_documents(lengths, begin, end, minimum):
        found[at : at + len(part)] = part
        at += len(part)
    return found


def iterate_long_documents(lengths: np.ndarray, begin: int, end: int, minimum: int) -> Iterator[np.ndarray]:
    """Yield the same numbers in parts, int32 [any] each."""
    for at in range(begin, end, _CHUNK):
        yield (np.flatnonzero(lengths[at : min(at + _CHUNK, end)] >= minimum) + at).astype(_DTYPE)


def cache_file(prefix: str, begin: int, end: int, minimum: int, folder: str | None) -> Path:
    """Return the path of the file with the long documents' numbers for PREFIX.idx.

    A changed .idx gets another path.

    Args:
        prefix: path of the data, PREFIX.bin and PREFIX.idx.
        begin: as in `find_long_documents`.
        end: as in `find_long_documents`.
        minimum: as in `find_long_documents`.
        folder: --data-cache-path; None is a folder beside the data, as in Megatron.

    Raises:
        OSError: there is no PREFIX.idx.
    """
    index = os.stat(f"{prefix}.idx")
    key = json.dumps([os.path.realpath(prefix), index.st_size, index.st_mtime_ns, begin, end, minimum])
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    return Path(folder or Path(prefix, "cache", "LongDocumentDataset_indices")) / f"{name}-long_documents.npy"


def _write(file: Path, count: int, parts: Iterator[np.ndarray]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, beside = tempfile.mkstemp(prefix=f".{file.name}.", suffix=".partial", dir=file.parent)
    try:
        with open(descriptor, "wb") as out:
            os.fchmod(descriptor, 0o644)  # another user's job may share the cache
            header = {"descr": _DTYPE.str, "fortran_order": False, "shape": (count,)}
            np.lib.format.write_array_header_1_0(out, header)
            crc = 0
            for part in parts:
                out.write(part.data)  # a memory map would crash the process on a full disk
                crc = zlib.crc32(part.data, crc)
            out.write(crc.to_bytes(_CRC_BYTES, "little"))
            out.flush()
            os.fsync(descriptor)
        os.replace(beside, file)
    except FileNotFoundError:
        if not file.exists():  # otherwise another process finished first and removed this one's file
            raise
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    for leftover in file.parent.glob(f".{file.name}.*.partial"):  # of a killed process
        leftover.unlink(missing_ok=True)


def _open(file: Path, lengths: np.ndarray, begin: int, end: int, minimum: int) -> np.ndarray | None:
    """Map the file if it is intact and fits these documents; else return None.

    Its CRC-32 is checked in full, its numbers in a few places.
    """
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # missing, truncated or another format
        return None
    if not isinstance(found, np.memmap) or found.ndim != 1 or found.dtype != _DTYPE or not len(found):
        return None
    if not _is_intact(file, found):
        return None
    sample = np.asarray(found[np.linspace(0, len(found) - 1, min(len(found), 64), dtype=np.int64)])
    if sample[0] < begin or sample[-1] >= end or (np.diff(sample) <= 0).any() or (lengths[sample] < minimum).any():
        return None
    return found


def _is_intact(file: Path, found: np.memmap) -> bool:
    """Return whether the array matches the CRC-32 at the end of the file."""
    end = found.offset + found.nbytes
    try:
        with open(file, "rb") as stream:
            stream.seek(end)
            kept = stream.read(_CRC_BYTES + 1)
    except OSError:
        return False
    crc = 0
    for at in range(0, len(found), _CHUNK):
        crc = zlib.crc32(found[at : at + _CHUNK].data, crc)
    return kept == crc.to_bytes(_CRC_BYTES, "little")
