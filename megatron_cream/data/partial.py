"""Output that appears only when complete; a killed run resumes from partial output.

A run writes into PREFIX.partial/. Every few seconds it atomically replaces a state file with the
input position and the size and CRC-32 of the output so far. A killed run resumes from that state and
truncates the files to it. A file whose CRC-32 differs is neither resumed from nor published. When all
is written, the files are renamed, the .idx last, so that no .idx stands beside another run's .bin.
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
"""Seconds between saves of the state: the most work that a killed run loses."""

_TOKENS, _MASK, _LENGTHS, _STATE, _LOCK = "tokens.bin", "loss_mask.bin", "lengths", "state.json", "lock"
_INDICES = ("tokens.idx", "loss_mask.idx")
_NEW = ".new"
_FILES = (_TOKENS, _MASK, _LENGTHS, *_INDICES, _STATE + _NEW, _STATE)


@dataclass
class State:
    """The progress of a run."""

    position: Position = Position()  # noqa: RUF009  (frozen)
    """Where reading resumes."""

    documents: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    """Written so far; `loss_tokens` counts the assistant's tokens in chats."""

    dropped: dict[str, int] = field(default_factory=dict)
    """Reason -> number of documents dropped for it."""

    first_dropped: dict[str, str] = field(default_factory=dict)
    """Reason -> place of the first such document, in input order."""

    cuts: dict[str, int] = field(default_factory=dict)
    """What was left out of chats -> number of chats; see `chat_records.Chat`."""

    first_cut: dict[str, str] = field(default_factory=dict)
    """The same -> place of the first such chat, in input order."""

    sums: dict[str, int] = field(default_factory=dict)
    """File -> CRC-32 of its content so far."""

    complete: bool = False
    """True when all is written and only the renames remain."""


def check_output(prefix: Path, overwrite: bool) -> None:
    """Check before any work that the output files can be created.

    Raises:
        FileExistsError: there is output at `prefix` and `overwrite` is not set.
        ValueError: a folder or a special file has the name of an output file.
        OSError: a name is too long.
    """
    targets = (*paths(prefix), *paths(loss_mask_prefix(prefix)))
    for path in (*targets, _folder(prefix)):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            has_type, name = (stat.S_ISREG, "file") if path in targets else (stat.S_ISDIR, "folder")
            if not has_type(os.stat(path).st_mode):
                raise ValueError(f"{path} exists and is not a {name}")
    if overwrite or _read_state(_folder(prefix))[1].complete:  # a run killed during its renames
        return
    for path in targets:
        if path.exists():
            raise FileExistsError(f"{path} already exists")


class PartialOutput:
    """The output files of one run until their final rename. Created by `open_partial`."""

    def __init__(self, prefix: Path, settings: dict[str, Any], dtype: type, masked: bool, overwrite: bool, keep: bool):
        self._prefix, self._settings, self._dtype = prefix, settings, dtype
        self._overwrite, self._keep = overwrite, keep
        self._folder = _folder(prefix)
        names = {_LENGTHS: np.int32, _TOKENS: dtype} | ({_MASK: np.uint8} if masked else {})
        self._itemsizes = {name: np.dtype(kind).itemsize for name, kind in names.items()}
        self.state = self._load_resumable_state()
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
        """Write the documents of a batch; save the state if it is time."""
        state = self.state
        state.documents += len(encoded.documents)
        state.tokens += sum(map(len, encoded.documents))
        state.loss_tokens += sum(int(mask.sum()) for mask in encoded.masks)
        for reason, where in encoded.dropped:
            state.dropped[reason] = state.dropped.get(reason, 0) + 1
            state.first_dropped.setdefault(reason, where)
        for what, where in encoded.cuts:
            state.cuts[what] = state.cuts.get(what, 0) + 1
            state.first_cut.setdefault(what, where)
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
        """Give the files their final names; return the lengths of all documents, int32 [n].

        Raises:
            FileExistsError: another process wrote output meanwhile and `overwrite` is not set.
            ValueError: a file's content differs from what was written.
        """
        if not self.state.complete:
            self._save()
            for file in self._files.values():
                file.flush()
            if damaged := self._find_damaged_file():
                raise ValueError(
                    f"{damaged}: differs from what was written (CRC-32 mismatch); the disk or the memory is faulty. "
                    "Start again, with another --output-prefix if it happens again"
                )
            lengths = np.fromfile(self._folder / _LENGTHS, dtype=np.int32)
            for name, dtype in ((_TOKENS, self._dtype), (_MASK, np.uint8)):
                if name in self._files:
                    write_index((self._folder / name).with_suffix(".idx"), lengths, dtype)
            check_output(self._prefix, self._overwrite)
            self.state.complete = True
            self._save()
        self._rename_files()
        lengths = np.array(read_index(self._prefix).lengths)
        self.discard()  # last: while there is a state, the next run finishes one that was killed here
        return lengths

    def _rename_files(self) -> None:
        renames = self._list_renames()
        if renames[-1][0].exists():  # remove the old .idx first: it must never stand beside a new .bin
            renames[-1][1].unlink(missing_ok=True)
        if _MASK not in self._itemsizes:
            for path in paths(loss_mask_prefix(self._prefix)):
                path.unlink(missing_ok=True)
        for source, target in renames:
            if source.exists():
                os.replace(source, target)

    def _list_renames(self) -> list[tuple[Path, Path]]:
        """Return (partial file, final path) of all output files, the data's .idx last."""
        renames = []
        for name, prefix in ((_MASK, loss_mask_prefix(self._prefix)), (_TOKENS, self._prefix)):
            if name in self._itemsizes:
                bin_path, idx_path = paths(prefix)
                source = self._folder / name
                renames += [(source, bin_path), (source.with_suffix(".idx"), idx_path)]
        return renames

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def discard(self) -> None:
        """Close and delete the partial files, but no file with its final name."""
        self.close()
        _remove_files(self._folder)

    def _save(self) -> None:
        """Write the state after syncing the output to disk."""
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

    def _load_resumable_state(self) -> State | None:
        """Return the state to resume from; None if there is none.

        Raises:
            ValueError: the state is of a run with other settings, and `overwrite` is not set.
        """
        settings, state = _read_state(self._folder)
        if state.position == Position():
            return None
        # Compare after a round trip through JSON, which turns tuples into lists.
        other = [key for key, value in json.loads(json.dumps(self._settings)).items() if settings.get(key) != value]
        if other and not self._overwrite:
            raise ValueError(
                f"{self._folder} contains an unfinished run with another {' and '.join(other)}; finish that run, "
                "give another prefix, or --overwrite to discard it"
            )
        if other:
            return None
        if state.complete:
            whole = all(source.exists() or target.exists() for source, target in self._list_renames())
            return state if whole else None
        if damaged := self._find_damaged_file(state):
            print(f"preprocess: {damaged} is damaged (CRC-32 mismatch): starting from the beginning", file=sys.stderr)
            return None
        return state

    def _find_damaged_file(self, state: State | None = None) -> Path | None:
        """Return the first file that does not match the size or CRC-32 in `state`, or None."""
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
    """Open the partial output at `prefix` of a killed run with equal settings, or a new one.

    Args:
        prefix: path of the output, PREFIX.bin and PREFIX.idx.
        settings: plain values that determine the output.
        dtype: numpy type of a token.
        masked: also write a loss mask.
        overwrite: replace existing output, and an unfinished run with other settings.
        keep: keep the partial files, if any was written, for the next run if this one ends early. A ValueError deletes
            them, as the next run with the same inputs would fail too.

    Raises:
        ValueError: there is an unfinished run with other settings, and `overwrite` is not set.
        BlockingIOError: another process is writing this output.
    """
    folder = _folder(prefix)
    folder.mkdir(parents=True, exist_ok=True)
    # A lock that forked workers do not inherit: they may outlive this process for a moment.
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
            if keep and partial.state.position != Position() and not isinstance(error, ValueError):
                partial.close()
            else:
                partial.discard()
            raise
        finally:
            if not any((folder / name).exists() for name in _FILES):
                (folder / _LOCK).unlink()
                with contextlib.suppress(OSError):  # it contains other files
                    folder.rmdir()


def _folder(prefix: Path) -> Path:
    return Path(f"{prefix}.partial")


def _read_state(folder: Path) -> tuple[dict[str, Any], State]:
    """Return the settings and the state of a partial run; empty if there is none."""
    try:
        saved = json.loads((folder / _STATE).read_bytes())
        state = State(**saved["state"] | {"position": Position(**saved["state"]["position"])})
        if not isinstance(state.sums, dict):
            raise TypeError
        return dict(saved["settings"]), state
    except (OSError, ValueError, KeyError, TypeError):
        return {}, State()


def _remove_files(folder: Path) -> None:
    """Delete the files of a partial run, the state last: it identifies the others."""
    for name in _FILES:
        (folder / name).unlink(missing_ok=True)
