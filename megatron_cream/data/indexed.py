"""Megatron's indexed datasets on disk: PREFIX.bin and PREFIX.idx, written and checked.

The .bin holds token ids, one document after the other. The .idx, little-endian: a header,
int32 [n] lengths in tokens, int64 [n] places in bytes, int64 [d] where documents end, in
sequences. `megatron.core.datasets.indexed_dataset` reads them, and trusts them; a file that was
cut or swapped shows here, before a run begins. Neither torch nor Megatron is imported.

A chat has a second pair beside it, PREFIX_loss_mask, of one byte a token: 1 where the loss counts.
"""

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, type, sequences, document ends."""

_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""Megatron's `DType` codes of whole numbers; 6 and 7 are floating-point numbers."""

_CHUNK = 1 << 20
"""Sequences checked at a time."""


@dataclass(frozen=True)
class Index:
    """What an .idx says of its .bin."""

    dtype: type
    """numpy type of a token."""

    lengths: np.ndarray
    """int32 [n]: tokens of each sequence; mapped from the file."""

    tokens: int
    """Tokens in all."""


def token_type(vocab_size: int) -> type:
    """The type that Megatron stores tokens of this vocabulary in."""
    return np.uint16 if vocab_size < 65500 else np.int32


def paths(prefix: str | Path) -> tuple[Path, Path]:
    """PREFIX.bin and PREFIX.idx, as Megatron derives them (dots in the prefix stay)."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def loss_mask_prefix(prefix: str | Path) -> str:
    """Where the loss mask of the data at `prefix` lies, if it has one."""
    return f"{prefix}_loss_mask"


def has_loss_mask(prefix: str | Path) -> bool:
    return any(path.exists() for path in paths(loss_mask_prefix(prefix)))


def write_index(path: Path, lengths: np.ndarray, dtype: type) -> None:
    """Write the .idx of one-sequence documents that follow one another in a .bin.

    It is on the disk at return.

    Args:
        path: of the .idx.
        lengths: int32 [n], in tokens.
        dtype: of a token.
    """
    code = next(code for code, kind in _TYPES.items() if kind is dtype)
    places = np.zeros(len(lengths), dtype=np.int64)
    np.cumsum(lengths[:-1], out=places[1:])
    places *= np.dtype(dtype).itemsize
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, code, len(lengths), len(lengths) + 1))
        for array in (lengths.astype("<i4", copy=False), places, np.arange(len(lengths) + 1, dtype="<i8")):
            array.tofile(file)
        file.flush()
        os.fsync(file.fileno())


def read_index(prefix: str | Path) -> Index:
    """The index of PREFIX.bin/.idx, when the two agree: every place, length and size.

    Reads the .idx (20 bytes a document) but not the .bin.

    Raises:
        ValueError: a file is missing, cut, of another kind, or not the other's. One line.
        OSError: the system cannot read it.
    """
    check_index(prefix)
    return open_index(prefix)


def open_index(prefix: str | Path) -> Index:
    """The same by the header, the first and last entries and the files' sizes alone: no time, whatever its length.

    Raises:
        ValueError, OSError: as `read_index`.
    """
    bin_path, idx_path = paths(prefix)
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise ValueError(f"there is no {path}; give the path without its suffix")
    dtype, lengths, places, ends = _map(idx_path)
    if not len(ends) or ends[0] != 0 or ends[-1] != len(lengths):
        raise _bad(f"{idx_path} is damaged: its documents do not follow one another")
    itemsize = np.dtype(dtype).itemsize
    if places[0] != 0 or lengths[-1] < 0 or (len(places) > 1 and places[1] != int(lengths[0]) * itemsize):
        raise _bad(f"{idx_path} is damaged: its sequences do not follow one another")
    bytes_, found = int(places[-1]) + int(lengths[-1]) * itemsize, bin_path.stat().st_size
    if found != bytes_:
        name = np.dtype(dtype).name
        raise _bad(
            f"{bin_path} has {found} bytes, and its index says {bytes_ // itemsize} tokens of {name}, {bytes_} bytes"
        )
    if not bytes_:
        raise ValueError(f"{bin_path} holds no token: the data is empty")
    return Index(dtype, lengths, bytes_ // itemsize)


def check_index(prefix: str | Path, share: tuple[int, int] = (0, 1)) -> None:
    """Check that each sequence begins where the previous one ends; documents likewise.

    Args:
        prefix: of the data: PREFIX.bin and PREFIX.idx.
        share: (i, n): of n readers, this is the one at place i, and reads an n-th.

    Raises:
        ValueError, OSError: as `read_index`.
    """
    idx_path = paths(prefix)[1]
    dtype, lengths, places, ends = _map(idx_path)
    itemsize = np.dtype(dtype).itemsize
    for begin in range(share[0] * _CHUNK, len(lengths), share[1] * _CHUNK):
        part = lengths[begin : begin + _CHUNK].astype(np.int64)
        follow = places[begin + 1 : begin + _CHUNK + 1]
        meet = places[begin : begin + _CHUNK][: len(follow)] + itemsize * part[: len(follow)]
        if (part < 0).any() or (follow != meet).any():
            raise _bad(f"{idx_path} is damaged: its sequences do not follow one another")
    for begin in range(share[0] * _CHUNK, len(ends), share[1] * _CHUNK):
        part = ends[begin : begin + _CHUNK + 1]
        if (part[1:] < part[:-1]).any():
            raise _bad(f"{idx_path} is damaged: its documents do not follow one another")
    open_index(prefix)


def check_loss_mask(prefix: str | Path, share: tuple[int, int] = (0, 1)) -> None:
    """Check that a loss mask beside PREFIX.bin, if any, is of the same documents.

    Args:
        prefix: of the data: PREFIX.bin and PREFIX.idx.
        share: as in `check_index`.

    Raises:
        ValueError, OSError: as `read_index`, or it is of other documents.
    """
    if not has_loss_mask(prefix):
        return
    mask, index = open_index(loss_mask_prefix(prefix)), open_index(prefix)
    same = mask.dtype is np.uint8 and len(mask.lengths) == len(index.lengths)
    for begin in range(share[0] * _CHUNK, len(index.lengths) if same else 0, share[1] * _CHUNK):
        part = slice(begin, begin + _CHUNK)
        same = same and np.array_equal(mask.lengths[part], index.lengths[part])
    if not same:
        raise ValueError(
            f"{loss_mask_prefix(prefix)}.bin is not the loss mask of {prefix}.bin: their documents differ; "
            "preprocess the chats again, or move the mask away"
        )
    check_index(loss_mask_prefix(prefix), share)


def any_as_long(lengths: np.ndarray, minimum: int) -> bool:
    """Whether a document has `minimum` tokens; reads no further than the first that has."""
    return any((lengths[at : at + _CHUNK] >= minimum).any() for at in range(0, len(lengths), _CHUNK))


def token_range(prefix: str | Path, index: Index, most_bytes: int) -> tuple[int, int]:
    """The least and the greatest token id of PREFIX.bin; of a larger file, in as many bytes of it, spread evenly."""
    itemsize = np.dtype(index.dtype).itemsize
    spans = 1 if index.tokens * itemsize <= most_bytes else 64
    count = min(index.tokens, most_bytes // itemsize) // spans
    least, greatest = [], []
    with paths(prefix)[0].open("rb") as file:
        for begin in np.linspace(0, index.tokens - count, spans, dtype=np.int64):
            file.seek(int(begin) * itemsize)
            tokens = np.fromfile(file, index.dtype, count)
            least.append(int(tokens.min()))
            greatest.append(int(tokens.max()))
    return min(least), max(greatest)


def _map(idx_path: Path) -> tuple[type, np.ndarray, np.ndarray, np.ndarray]:
    """A token's type; lengths, places and ends, mapped from a file that is as long as its header says."""
    with idx_path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise _bad(f"{idx_path} does not begin as an index")
    _, version, code, sequences, ends = _HEADER.unpack(header)
    if version != 1:
        raise _bad(f"{idx_path} is of version {version}, not 1")
    if code not in _TYPES:
        kinds = {6: "float64", 7: "float32"}
        raise _bad(f"{idx_path} says that a token is of type {kinds.get(code, code)}, not a whole number")
    # Modes, one byte a sequence, follow in an index of several modalities.
    size, need = idx_path.stat().st_size, _HEADER.size + 12 * sequences + 8 * ends
    if size not in (need, need + sequences):
        raise _bad(f"{idx_path} has {size} bytes, and {sequences} sequences take {need}: it is cut or damaged")
    if not sequences:
        raise ValueError(f"{idx_path} holds no document: the data is empty")
    content = np.memmap(idx_path, mode="r", dtype=np.uint8)
    offsets = (_HEADER.size, _HEADER.size + 4 * sequences, _HEADER.size + 12 * sequences)
    lengths = np.frombuffer(content, "<i4", sequences, offsets[0])
    places = np.frombuffer(content, "<i8", sequences, offsets[1])
    return _TYPES[code], lengths, places, np.frombuffer(content, "<i8", ends, offsets[2])


def _bad(reason: str) -> ValueError:
    return ValueError(f"not a .bin/.idx pair that can be read: {reason}")
