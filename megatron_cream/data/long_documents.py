"""Which documents are long enough: found once in a job, and mapped by every rank and worker from one file.

Of 100 million documents the numbers alone take 400 MB, and each rank would hold its own. Where all are long enough,
or few, no file is needed. The file is a .npy array with a CRC-32 of its bytes after it, which each rank checks.
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
"""Numbers of documents that a rank may hold by itself: 4 MiB."""

_CHUNK = 1 << 20
"""Documents looked at at a time."""

_CRC_BYTES = 4

_DTYPE = np.dtype("<i4")
"""Megatron numbers the documents of one data set in 32 bits."""


def long_documents(
    lengths: np.ndarray, begin: int, end: int, minimum: int, file: Path, say: Callable[[str], None]
) -> Sequence[int]:
    """Return, in order, the numbers of the documents that have `minimum` tokens or more.

    Whatever process comes to it first writes `file`, beside its name and then under it, so that several may at once,
    and one that is killed leaves nothing that is read. A file that is none of ours is written anew.

    Args:
        lengths: int32 [n], in tokens; may be mapped from a file.
        begin: number of the first document to look at.
        end: number after the last document to look at.
        minimum: tokens of a long document.
        file: see `cache_file`.
        say: is told why, where `file` cannot be written and each process holds the numbers itself.

    Returns: a range where all are long enough; else int32 [m], mapped from `file` where m is above IN_MEMORY.
    """
    kept = _open(file, lengths, begin, end, minimum)
    if kept is not None:
        return kept
    count = sum(len(part) for part in long_in_parts(lengths, begin, end, minimum))
    if count == end - begin:
        return range(begin, end)
    if count > IN_MEMORY:
        try:
            _write(file, count, long_in_parts(lengths, begin, end, minimum))
            if (kept := _open(file, lengths, begin, end, minimum)) is not None:
                return kept
            reason = "what was written there does not read back"
        except OSError as error:
            reason = error.strerror or one_line(error)
        say(f"{file.parent}: {reason}: each rank holds the numbers of {count} documents, {count >> 18} MiB, by itself")
    found = np.empty(count, dtype=_DTYPE)
    at = 0
    for part in long_in_parts(lengths, begin, end, minimum):
        found[at : at + len(part)] = part
        at += len(part)
    return found


def long_in_parts(lengths: np.ndarray, begin: int, end: int, minimum: int) -> Iterator[np.ndarray]:
    """The same numbers, int32 [any], of some documents at a time."""
    for at in range(begin, end, _CHUNK):
        yield (np.flatnonzero(lengths[at : min(at + _CHUNK, end)] >= minimum) + at).astype(_DTYPE)


def cache_file(prefix: str, begin: int, end: int, minimum: int, folder: str | None) -> Path:
    """Return the file that keeps the numbers of these long documents of PREFIX.idx.

    Another .idx of that name has another file.

    Args:
        prefix: of the data: PREFIX.bin and PREFIX.idx.
        begin: as in `long_documents`.
        end: as in `long_documents`.
        minimum: as in `long_documents`.
        folder: --data-cache-path; without one, beside the data, as Megatron has it.

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
                out.write(part.data)  # not into a map of the file: a full disk would end the process
                crc = zlib.crc32(part.data, crc)
            out.write(crc.to_bytes(_CRC_BYTES, "little"))
            out.flush()
            os.fsync(descriptor)
        os.replace(beside, file)
    except FileNotFoundError:
        if not file.exists():  # else another process was first, and swept up
            raise
    except BaseException:
        Path(beside).unlink(missing_ok=True)
        raise
    for left in file.parent.glob(f".{file.name}.*.partial"):  # by a process that was killed
        left.unlink(missing_ok=True)


def _open(file: Path, lengths: np.ndarray, begin: int, end: int, minimum: int) -> np.ndarray | None:
    """What is kept there, if it is whole by its checksum and, in a few places, of these documents."""
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # none there; cut; of another kind
        return None
    if not isinstance(found, np.memmap) or found.ndim != 1 or found.dtype != _DTYPE or not len(found):
        return None
    if not _is_whole(file, found):
        return None
    looked = np.asarray(found[np.linspace(0, len(found) - 1, min(len(found), 64), dtype=np.int64)])
    if looked[0] < begin or looked[-1] >= end or (np.diff(looked) <= 0).any() or (lengths[looked] < minimum).any():
        return None
    return found


def _is_whole(file: Path, found: np.memmap) -> bool:
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
