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
    """The .idx of documents of one sequence each that follow one another in a .bin; on the disk at return.

    Args:
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
    bin_path, idx_path = paths(prefix)
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise ValueError(f"there is no {path}; give the path without its suffix")
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
    _check_documents(idx_path, np.frombuffer(content, "<i8", ends, offsets[2]), sequences)
    itemsize = np.dtype(_TYPES[code]).itemsize
    bytes_ = _check_places(idx_path, lengths, places, itemsize)
    found = bin_path.stat().st_size
    if found != bytes_:
        name = np.dtype(_TYPES[code]).name
        raise _bad(
            f"{bin_path} has {found} bytes, and its index says {bytes_ // itemsize} tokens of {name}, {bytes_} bytes"
        )
    if not bytes_:
        raise ValueError(f"{bin_path} holds no token: the data is empty")
    return Index(_TYPES[code], lengths, bytes_ // itemsize)


def open_index(prefix: str | Path) -> Index:
    """The same of data that `read_index` found whole, without reading it again."""
    bin_path, idx_path = paths(prefix)
    with idx_path.open("rb") as file:
        _, _, code, sequences, _ = _HEADER.unpack(file.read(_HEADER.size))
    lengths = np.memmap(idx_path, "<i4", "r", _HEADER.size, sequences)
    return Index(_TYPES[code], lengths, bin_path.stat().st_size // np.dtype(_TYPES[code]).itemsize)


def check_loss_mask(prefix: str | Path, index: Index) -> None:
    """Whether the loss mask beside PREFIX.bin is its own; nothing where there is none.

    Raises:
        ValueError, OSError: as `read_index`, or it is of other documents.
    """
    if not has_loss_mask(prefix):
        return
    mask = read_index(loss_mask_prefix(prefix))
    if mask.dtype is not np.uint8 or not np.array_equal(mask.lengths, index.lengths):
        raise ValueError(
            f"{loss_mask_prefix(prefix)}.bin is not the loss mask of {prefix}.bin: their documents differ; "
            "preprocess the chats again, or move the mask away"
        )


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


def _check_documents(path: Path, ends: np.ndarray, sequences: int) -> None:
    if not len(ends) or ends[0] != 0 or ends[-1] != sequences or (ends[1:] < ends[:-1]).any():
        raise _bad(f"{path} is damaged: its documents do not follow one another")


def _check_places(path: Path, lengths: np.ndarray, places: np.ndarray, itemsize: int) -> int:
    """The bytes of all sequences, when each begins where the one before it ends."""
    at = 0
    for begin in range(0, len(lengths), _CHUNK):
        part = lengths[begin : begin + _CHUNK].astype(np.int64)
        ends = at + np.cumsum(part) * itemsize
        if (part < 0).any() or (places[begin : begin + _CHUNK] != ends - part * itemsize).any():
            raise _bad(f"{path} is damaged: its sequences do not follow one another")
        at = int(ends[-1])
    return at


def _bad(reason: str) -> ValueError:
    return ValueError(f"not a .bin/.idx pair that can be read: {reason}")
