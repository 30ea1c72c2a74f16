"""Output that is whole or absent, and work that outlives its process.

A run writes into PREFIX.partial/, and says every few seconds, in a file that is replaced
whole, how far it came and how much of what it wrote that covers. A run that was killed goes on
from there: what lies beyond is cut off. The state has a CRC-32 of each file, as it was when it was written; a file that
differs is never gone on with and never takes its name. When all is written the files take their names, the
.idx last, so that no reader finds an .idx that belongs to another .bin.
"""

import contextlib
import fcntl
import json
import os
import stat
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cream.common.files import crc32_of
from megatron_cream.data.documents import Position
from megatron_cream.data.encode import Encoded
from megatron_cream.data.indexed import loss_mask_prefix, paths, read_index, write_index

CHECKPOINT_SECONDS = 5.0
"""How much work a killed run loses, at most, in seconds."""

_TOKENS, _MASK, _LENGTHS, _STATE, _LOCK = "tokens.bin", "loss_mask.bin", "lengths", "state.json", "lock"
_INDICES = ("tokens.idx", "loss_mask.idx")
_NEW = ".new"
_FILES = (_TOKENS, _MASK, _LENGTHS, *_INDICES, _STATE + _NEW, _STATE)


@dataclass
class State:
    """How far a run came."""

    position: Position = Position()  # noqa: RUF009  (frozen)
    """Where reading goes on."""

    documents: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    """Written so far; of chats, also how many of the tokens are the assistant's."""

    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> how many documents were left out for it."""

    first_dropped: dict[str, str] = field(default_factory=dict)
    """Reason -> place of the first of them, in input order."""

    sums: dict[str, int] = field(default_factory=dict)
    """File -> CRC-32 of what was written so far."""

    complete: bool = False
    """All is written, and only the names are to be taken."""


def check_output(prefix: Path, overwrite: bool) -> None:
    """Before any work: whether the output can have its names.

    Raises:
        FileExistsError: there is output at `prefix` that may not be replaced.
        ValueError: a folder or the like has one of the names.
        OSError: the names are too long.
    """
    targets = (*paths(prefix), *paths(loss_mask_prefix(prefix)))
    for path in (*targets, _folder(prefix)):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            fits, what = (stat.S_ISREG, "file") if path in targets else (stat.S_ISDIR, "folder")
            if not fits(os.stat(path).st_mode):
                raise ValueError(f"{path} exists and is not a {what}")
    if overwrite or _read_state(_folder(prefix))[1].complete:  # a run killed while its files took their names
        return
    for path in targets:
        if path.exists():
            raise FileExistsError(f"{path} already exists")


class PartialOutput:
    """The files of one run, from its first document to their names. Made by `open_partial`."""

    def __init__(self, prefix: Path, settings: dict[str, Any], dtype: type, masked: bool, overwrite: bool, keep: bool):
        self._prefix, self._settings, self._dtype = prefix, settings, dtype
        self._overwrite, self._keep = overwrite, keep
        self._folder = _folder(prefix)
        names = {_LENGTHS: np.int32, _TOKENS: dtype} | ({_MASK: np.uint8} if masked else {})
        self._itemsizes = {name: np.dtype(kind).itemsize for name, kind in names.items()}
        self.state = self._resumable()
        if self.state is None:
            _remove_files(self._folder)
            self.state = State()
        self._files = {}
        if not self.state.complete:
            self._files = {name: open(self._folder / name, "ab") for name in names}  # noqa: SIM115
            for name, file in self._files.items():
                file.truncate(self._size(name, self.state))
            self._save()

    def append(self, encoded: Encoded) -> None:
        """Take over what became of a batch."""
        state = self.state
        state.documents += len(encoded.documents)
        state.tokens += sum(map(len, encoded.documents))
        state.loss_tokens += sum(int(mask.sum()) for mask in encoded.masks)
        for reason, where in encoded.dropped:
            state.dropped[reason] = state.dropped.get(reason, 0) + 1
            state.first_dropped.setdefault(reason, where)
        state.position = encoded.end
        lengths = np.array([len(ids) for ids in encoded.documents], dtype=np.int32)
        for name, arrays in ((_LENGTHS, [lengths]), (_TOKENS, encoded.documents), (_MASK, encoded.masks)):
            for array in arrays:
                data = array.tobytes()
                self._files[name].write(data)
                state.sums[name] = zlib.crc32(data, state.sums.get(name, 0))
        if time.monotonic() - self._saved >= CHECKPOINT_SECONDS:
            self._save()

    def finish(self) -> np.ndarray:
        """Give the files their names. Returns the lengths of all documents, int32 [n].

        Raises:
            FileExistsError: meanwhile there is output that may not be replaced.
        """
        if not self.state.complete:
            self._save()
            for file in self._files.values():
                file.flush()
            if damaged := self._damaged():
                raise ValueError(
                    f"{damaged}: not what was written (its CRC-32 differs); the disk or its memory is faulty. Start "
                    "again, with another --output-prefix if it happens again"
                )
            lengths = np.fromfile(self._folder / _LENGTHS, dtype=np.int32)
            for name, dtype in ((_TOKENS, self._dtype), (_MASK, np.uint8)):
                if name in self._files:
                    write_index((self._folder / name).with_suffix(".idx"), lengths, dtype)
            check_output(self._prefix, self._overwrite)
            self.state.complete = True
            self._save()
        self._take_names()
        return np.array(read_index(self._prefix).lengths)

    def _take_names(self) -> None:
        moves = self._moves()
        if moves[-1][0].exists():  # at no time does an .idx belong to another .bin
            moves[-1][1].unlink(missing_ok=True)
        if _MASK not in self._itemsizes:
            for path in paths(loss_mask_prefix(self._prefix)):
                path.unlink(missing_ok=True)
        for source, target in moves:
            if source.exists():
                os.replace(source, target)
        self.discard()

    def _moves(self) -> list[tuple[Path, Path]]:
        """(partial file, name) of all that is output; the .idx that makes it readable last."""
        moves = []
        for name, prefix in ((_MASK, loss_mask_prefix(self._prefix)), (_TOKENS, self._prefix)):
            if name in self._itemsizes:
                bin_path, idx_path = paths(prefix)
                source = self._folder / name
                moves += [(source, bin_path), (source.with_suffix(".idx"), idx_path)]
        return moves

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def discard(self) -> None:
        """Close and delete what is partial; nothing that has its name."""
        self.close()
        _remove_files(self._folder)

    def _save(self) -> None:
        """Say how far this came, once what was written is on the disk."""
        self._saved = time.monotonic()
        if not self._keep and not self.state.complete:
            return
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        new = self._folder / (_STATE + _NEW)
        with new.open("w") as file:
            json.dump({"settings": self._settings, "state": asdict(self.state)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._folder / _STATE)

    def _size(self, name: str, state: State) -> int:
        return self._itemsizes[name] * (state.documents if name == _LENGTHS else state.tokens)

    def _resumable(self) -> State | None:
        """The state to go on from; None where there is none.

        Raises:
            ValueError: there is one, of a run with other settings, and `overwrite` is not set.
        """
        settings, state = _read_state(self._folder)
        if state.position == Position():
            return None
        # As they come out of JSON: tuples are lists there.
        other = [key for key, value in json.loads(json.dumps(self._settings)).items() if settings.get(key) != value]
        if other and not self._overwrite:
            raise ValueError(
                f"{self._folder} holds an unfinished run of another {' and '.join(other)}: go on with that one, "
                "give another prefix, or --overwrite to start anew"
            )
        if other:
            return None
        if state.complete:
            whole = all(source.exists() or target.exists() for source, target in self._moves())
            return state if whole else None
        if damaged := self._damaged(state):
            print(f"preprocess: {damaged} is damaged (its CRC-32 differs): starting anew", file=sys.stderr)
            return None
        return state

    def _damaged(self, state: State | None = None) -> Path | None:
        """The first file that lacks something, or is not as it was written, up to where `state` came."""
        state = state or self.state
        for name in self._itemsizes:
            path, size = self._folder / name, self._size(name, state)
            if not path.is_file() or path.stat().st_size < size or crc32_of(path, size) != state.sums.get(name, 0):
                return path
        return None


@contextlib.contextmanager
def open_partial(
    prefix: Path, settings: dict[str, Any], dtype: type, masked: bool, overwrite: bool, keep: bool
) -> Iterator[PartialOutput]:
    """Open the partial output at `prefix`: a killed run's of equal settings, or new.

    Args:
        prefix: of the output: PREFIX.bin and PREFIX.idx.
        settings: plain values that all of the output follows from.
        dtype: of a token.
        masked: a loss mask is written too.
        overwrite: what is there may be replaced; an unfinished run of other settings too.
        keep: leave the work to the next run if this one ends early; unless by a ValueError, as
            another run of the same inputs would end so too.

    Raises:
        ValueError: an unfinished run of other settings is there, and `overwrite` is not set.
        BlockingIOError: another process is writing this output.
    """
    folder = _folder(prefix)
    folder.mkdir(parents=True, exist_ok=True)
    # A lock of this process, that its forks do not hold: they may outlive it for a moment.
    with (folder / _LOCK).open("a") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{folder}: another process is writing this output") from None
        except OSError:
            pass  # some network file systems have no locks
        partial = PartialOutput(prefix, settings, dtype, masked, overwrite, keep)
        try:
            yield partial
        except BaseException as error:
            if keep and not isinstance(error, ValueError):
                partial.close()
            else:
                partial.discard()
            raise
        finally:
            if not any((folder / name).exists() for name in _FILES):
                (folder / _LOCK).unlink()
                with contextlib.suppress(OSError):  # something else lies in it
                    folder.rmdir()


def _folder(prefix: Path) -> Path:
    return Path(f"{prefix}.partial")


def _read_state(folder: Path) -> tuple[dict[str, Any], State]:
    """The settings and the state of a partial run; empty where there is none."""
    try:
        saved = json.loads((folder / _STATE).read_bytes())
        state = State(**saved["state"] | {"position": Position(**saved["state"]["position"])})
        if not isinstance(state.sums, dict):
            raise TypeError
        return dict(saved["settings"]), state
    except (OSError, ValueError, KeyError, TypeError):
        return {}, State()


def _remove_files(folder: Path) -> None:
    """Delete what a partial run writes. The state goes last: it says whose the rest is."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
