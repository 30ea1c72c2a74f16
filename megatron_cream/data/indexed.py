"""Write and check Megatron's indexed datasets: PREFIX.bin and PREFIX.idx.

The .bin contains the token ids of all documents in order. The .idx, little-endian: a header,
int32 [n] lengths in tokens, int64 [n] offsets in bytes, int64 [d] ends of documents, counted in
sequences. `megatron.core.datasets.indexed_dataset` reads them without checks; here truncated or
swapped files are found before a run begins. Imports neither torch nor Megatron.

Chats have a second pair, PREFIX_loss_mask, of one byte per token: 1 for tokens with loss.
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
"""Megatron's `DType` codes of integer types; 6 and 7 are floating-point types."""

_CHUNK = 1 << 20
"""Sequences checked at a time."""


@dataclass(frozen=True)
class Index:
    """The content of an .idx about its .bin."""

    dtype: type
    """numpy type of a token."""

    lengths: np.ndarray
    """int32 [n]: tokens of each sequence; memory-mapped."""

    tokens: int
    """Total number of tokens."""


def token_type(vocab_size: int) -> type:
    """Return the numpy type in which Megatron stores tokens of this vocabulary."""
    return np.uint16 if vocab_size < 65500 else np.int32


def paths(prefix: str | Path) -> tuple[Path, Path]:
    """Return PREFIX.bin and PREFIX.idx, as Megatron names them (dots in the prefix stay)."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx")


def loss_mask_prefix(prefix: str | Path) -> str:
    """Return the prefix of the loss mask that belongs to the data at `prefix`."""
    return f"{prefix}_loss_mask"


def has_loss_mask(prefix: str | Path) -> bool:
    return any(path.exists() for path in paths(loss_mask_prefix(prefix)))


def write_index(path: Path, lengths: np.ndarray, dtype: type) -> None:
    """Write and fsync the .idx of one-sequence documents that are contiguous in a .bin.

    Args:
        path: the .idx.
        lengths: int32 [n], in tokens.
        dtype: numpy type of a token.
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
    """Return the index of PREFIX.bin/.idx after checking every offset, length and size.

    Reads the .idx (20 bytes per document) but not the .bin.

    Raises:
        ValueError: a file is missing, truncated, of another format, or belongs to another pair. One line.
        OSError: a file cannot be read.
    """
    check_index(prefix)
    return open_index(prefix)


def open_index(prefix: str | Path) -> Index:
    """Return the index after checking the header, some entries and the files' sizes.

    Takes the same short time for any length.

    Raises:
        ValueError, OSError: as `read_index`.
    """
    bin_path, idx_path = paths(prefix)
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise ValueError(f"there is no {path}; give the path without its suffix")
    dtype, lengths, places, ends = _map(idx_path)
    if not len(ends) or ends[0] != 0 or ends[-1] != len(lengths):
        raise _index_error(f"{idx_path} is damaged: its documents are not contiguous")
    itemsize = np.dtype(dtype).itemsize
    if places[0] != 0 or lengths[-1] < 0 or (len(places) > 1 and places[1] != int(lengths[0]) * itemsize):
        raise _index_error(f"{idx_path} is damaged: its sequences are not contiguous")
    bytes_, found = int(places[-1]) + int(lengths[-1]) * itemsize, bin_path.stat().st_size
    if found != bytes_:
        name = np.dtype(dtype).name
        raise _index_error(
            f"{bin_path} has {found} bytes, but its index says {bytes_ // itemsize} tokens of {name}, {bytes_} bytes"
        )
    if not bytes_:
        raise ValueError(f"{bin_path} contains no tokens: the data is empty")
    return Index(dtype, lengths, bytes_ // itemsize)


def check_index(prefix: str | Path, share: tuple[int, int] = (0, 1)) -> None:
    """Check that sequences and documents are contiguous.

    Args:
        prefix: path of the data, PREFIX.bin and PREFIX.idx.
        share: (i, n): check only part i of n, where several ranks share the work.

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
            raise _index_error(f"{idx_path} is damaged: its sequences are not contiguous")
    for begin in range(share[0] * _CHUNK, len(ends), share[1] * _CHUNK):
        part = ends[begin : begin + _CHUNK + 1]
        if (part[1:] < part[:-1]).any():
            raise _index_error(f"{idx_path} is damaged: its documents are not contiguous")
    open_index(prefix)


def check_loss_mask(prefix: str | Path, share: tuple[int, int] = (0, 1)) -> None:
    """Check that the loss mask of PREFIX.bin, if any, has documents of the same lengths.

    Args:
        prefix: path of the data, PREFIX.bin and PREFIX.idx.
        share: as in `check_index`.

    Raises:
        ValueError, OSError: as `read_index`, or the mask has other documents.
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


def has_long_document(lengths: np.ndarray, minimum: int) -> bool:
    """Return whether any document has `minimum` tokens or more; stops reading at the first."""
    return any((lengths[at : at + _CHUNK] >= minimum).any() for at in range(0, len(lengths), _CHUNK))


def token_range(prefix: str | Path, index: Index, max_bytes: int) -> tuple[int, int]:
    """Return the lowest and the highest token id of PREFIX.bin.

    Of a file larger than `max_bytes`, reads that many bytes in evenly spread parts.
    """
    itemsize = np.dtype(index.dtype).itemsize
    spans = 1 if index.tokens * itemsize <= max_bytes else 64
    count = min(index.tokens, max_bytes // itemsize) // spans
    lowest, highest = [], []
    with paths(prefix)[0].open("rb") as file:
        for begin in np.linspace(0, index.tokens - count, spans, dtype=np.int64):
            file.seek(int(begin) * itemsize)
            tokens = np.fromfile(file, index.dtype, count)
            lowest.append(int(tokens.min()))
            highest.append(int(tokens.max()))
    return min(lowest), max(highest)


def _map(idx_path: Path) -> tuple[type, np.ndarray, np.ndarray, np.ndarray]:
    """Map an .idx; return its token type, lengths, offsets and document ends.

    Checks the header and the file's size.
    """
    with idx_path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise _index_error(f"{idx_path} does not have the header of an index")
    _, version, code, sequences, ends = _HEADER.unpack(header)
    if version != 1:
        raise _index_error(f"{idx_path} has version {version}, expected 1")
    if code not in _TYPES:
        kinds = {6: "float64", 7: "float32"}
        raise _index_error(f"{idx_path} has token type {kinds.get(code, code)}, which is not an integer type")
    # An index of several modalities has one more byte per sequence.
    size, need = idx_path.stat().st_size, _HEADER.size + 12 * sequences + 8 * ends
    if size not in (need, need + sequences):
        raise _index_error(
            f"{idx_path} has {size} bytes, but {sequences} sequences need {need}: it is truncated or damaged"
        )
    if not sequences:
        raise ValueError(f"{idx_path} contains no documents: the data is empty")
    content = np.memmap(idx_path, mode="r", dtype=np.uint8)
    offsets = (_HEADER.size, _HEADER.size + 4 * sequences, _HEADER.size + 12 * sequences)
    lengths = np.frombuffer(content, "<i4", sequences, offsets[0])
    places = np.frombuffer(content, "<i8", sequences, offsets[1])
    return _TYPES[code], lengths, places, np.frombuffer(content, "<i8", ends, offsets[2])


def _index_error(reason: str) -> ValueError:
    return ValueError(f"not a .bin/.idx pair that can be read: {reason}")
