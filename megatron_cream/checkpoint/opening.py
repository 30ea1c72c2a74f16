"""Check that a saved step is complete and contains only plain data, and open it.

Reads the metadata and the common state, a few MB of a 7B checkpoint, never a tensor. The trainer, the
converter and the evaluation use it; errors are one line that begins with the flag.
"""

import contextlib
import io
import json
import re
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from megatron_cream.checkpoint.output import TRACKER, check_files
from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.common.files import is_file_name
from megatron_cream.common.safe_pickle import NameChecker, check_pickled_names, load_metadata, load_plain

_FORMAT, _METADATA = "metadata.json", ".metadata"
_COMMON_KEY, _COMMON_FILE = "common_state/shard_0_1", "common.pt"  # the file is from megatron-core before 0.16
_CLASSIC_FILE = "model_optim_rng.pt"
_MAX_BYTES = 1 << 30
"""Largest size of a metadata file or a common state; those of a thousand ranks are far smaller."""


@dataclass(frozen=True)
class Step:
    """A complete `torch_dist` step.

    folder: folder of the step, `iter_0000100` or `release`.
    metadata: torch's metadata, with the location of each tensor.
    common: Megatron's state beside the tensors; `args` are the flags that it was saved with.
    """

    folder: Path
    metadata: Metadata
    common: dict[str, Any]

    @property
    def args(self) -> Namespace:
        return self.common["args"]

    def pickled_keys(self) -> list[str]:
        """Return the keys of pickled entries: random states, extra states, the common state."""
        entries = self.metadata.state_dict_metadata.items()
        return sorted(key for key, entry in entries if isinstance(entry, BytesStorageMetadata))


def read_newest_step(path: Path, flag: str) -> int | str:
    """Return the iteration, or "release", that the tracker in `path` names.

    Raises:
        UsageError: the folder or its tracker is missing, or the tracker is invalid.
    """
    tracker = path / TRACKER
    if not path.is_dir():
        raise UsageError(f"{flag} {path}: no such folder")
    if not tracker.is_file():
        raise UsageError(f"{flag} {path}: not a Megatron checkpoint: it has no {TRACKER}")
    with open(tracker, "rb") as file:
        text = file.read(64).strip()
    if text != b"release" and not re.fullmatch(rb"[0-9]{1,15}", text):
        found = text.decode(errors="replace")
        raise UsageError(f"{flag} {path}: {TRACKER} contains {found!r}; must be a number or release")
    return "release" if text == b"release" else int(text)


def find_step_folder(path: Path, step: int | str, flag: str) -> Path:
    """Return the folder of a step in `path`, which the user gave with `flag`.

    Raises:
        UsageError: the folder does not exist.
    """
    name = step if step == "release" else f"iter_{step:07d}"
    if not (path / name).is_dir():
        raise UsageError(f"{flag} {path}: has no {name}")
    return path / name


def is_classic(folder: Path) -> bool:
    """Tell whether a step has `mp_rank_XX` files instead of `torch_dist` files."""
    return not (folder / _FORMAT).is_file() and any(folder.glob("mp_rank_*"))


def open_step(folder: Path, flag: str, *, checksums: bool = True) -> Step:
    """Open the step in `folder`.

    Args:
        folder: folder of the step.
        flag: the flag that gave the folder's parent, for messages.
        checksums: compare each file with its checksum in the manifest, if there is one, before unpickling it.

    Raises:
        UsageError: a file is missing, truncated or damaged, or a pickle would run code.
    """
    where = f"{flag} {folder.parent}"
    for name in (_METADATA, _FORMAT):
        if not (folder / name).is_file():
            raise UsageError(f"{where}: {folder.name} is not a complete torch_dist checkpoint: it has no {name}")
    with _as_usage_error(f"{where}: {folder.name}/{_FORMAT} cannot be read: "):
        _check_format(folder / _FORMAT)
    if checksums:
        check_files(folder, [_METADATA], flag)
    with _as_usage_error(f"{where}: {folder.name}/{_METADATA} cannot be read: "):
        metadata = _read_metadata(folder)
    with _as_usage_error(f"{where}: {folder.name} cannot be read: "):
        _check_shards(folder, metadata)
        file = _find_common_file(folder, metadata)
    if checksums:
        check_files(folder, [file], flag)
    with _as_usage_error(f"{where}: {folder.name}/{file} cannot be read: "):
        common = _read_common_state(folder, metadata)
    saved = common.get("iteration")
    if folder.name != "release" and saved != int(folder.name.removeprefix("iter_")):
        raise UsageError(f"{where}: contains step {saved}, but the folder is named {folder.name}")
    return Step(folder, metadata, common)


def check_pickles(step: Step, flag: str, *, keys: list[str]) -> None:
    """Check that the pickled entries `keys` are plain data, without running code from them.

    Raises:
        UsageError: an entry is damaged, or is not plain data.
    """
    import megatron.core  # noqa: F401  (declares its classes)

    places = _find_entries(step.metadata)
    for key in keys:
        file = f"{step.folder.name}/{places[key].relative_path}"
        with _as_usage_error(f"{flag} {step.folder.parent}: {file} cannot be read: its {key}: "):
            entry = io.BytesIO(_read_entry(step.folder, places[key]))
            check_pickled_names(entry)
            entry.seek(0)
            state = torch.load(entry, weights_only=True)
            if "_extra_state" in key:
                _check_extra_state(state)


def open_classic(folder: Path, flag: str, layout: tuple[int, int], *, checksums: bool = True) -> Namespace:
    """Check the `mp_rank_XX` files of a step and return the saved flags.

    No tensor data is read.

    Args:
        folder: folder of the step.
        flag: the flag that gave the folder's parent, for messages.
        layout: numbers of tensor- and pipeline-parallel ranks, each of which loads one file.
        checksums: as in `open_step`.

    Raises:
        UsageError: a file is missing, truncated or damaged, or is not plain data.
    """
    import megatron.core  # noqa: F401  (declares its classes)

    tensor, pipeline = layout
    for pp in range(pipeline):
        for tp in range(tensor):
            name = f"mp_rank_{tp:02d}" + (f"_{pp:03d}" if pipeline > 1 else "")
            if not (folder / name / _CLASSIC_FILE).is_file():
                raise UsageError(
                    f"{flag} {folder.parent}: {folder.name} has no {name}/{_CLASSIC_FILE}, which this layout needs: "
                    f"--tensor-model-parallel-size {tensor}, --pipeline-model-parallel-size {pipeline}"
                )
    saved = None
    files = sorted(folder.glob("mp_rank_*/*.pt"))
    if checksums:
        check_files(folder, [str(file.relative_to(folder)) for file in files], flag)
    for file in files:
        with _as_usage_error(f"{flag} {folder.parent}: {file.relative_to(folder.parent)} cannot be read: "):
            check_pickled_names(file)
            if file.name == _CLASSIC_FILE and saved is None:
                with FakeTensorMode():  # without tensor data
                    saved = torch.load(file, weights_only=True)["args"]
    return saved


@contextlib.contextmanager
def _as_usage_error(beginning: str) -> Iterator[None]:
    """Turn any error in the block into a UsageError that starts with `beginning`."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # damaged files raise errors of many types
        raise UsageError(beginning + (one_line(error) or type(error).__name__)) from error


def _check_format(file: Path) -> None:
    found = json.loads(_read(file))
    if not isinstance(found, dict) or found.get("sharded_backend") != "torch_dist":
        raise UsageError(f"{file}: not from a torch_dist checkpoint: sharded_backend must be torch_dist")


def _read_metadata(folder: Path) -> Metadata:
    metadata = load_metadata(_read(folder / _METADATA))
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError(f"{_METADATA} is not a torch metadata file")
    return metadata


def _check_shards(folder: Path, metadata: Metadata) -> None:
    """Check that every file in the metadata exists in the folder and is long enough.

    Raises:
        UsageError: the metadata names a file outside the folder.
        ValueError: a file is missing or truncated, or an offset is invalid.
    """
    ends: dict[str, int] = {}
    for info in metadata.storage_data.values():
        name = info.relative_path
        if not is_file_name(name):
            raise UsageError(f"{folder}: {_METADATA} names {repr(name)[:100]}: must be the name of a file beside it")
        if info.offset < 0 or info.length < 0:
            raise ValueError(f"{_METADATA} places data before the start of {name}")
        ends[name] = max(ends.get(name, 0), info.offset + info.length)
    for name, end in ends.items():
        if not (folder / name).is_file():
            raise ValueError(f"{name} is missing")
        if (folder / name).stat().st_size < end:
            raise ValueError(f"{name} is truncated: it has {(folder / name).stat().st_size} of {end} bytes")


def _find_common_file(folder: Path, metadata: Metadata) -> str:
    """Return the name of the file with the common state."""
    if (folder / _COMMON_FILE).is_file():
        return _COMMON_FILE
    places = _find_entries(metadata)
    if _COMMON_KEY not in places:
        raise ValueError("its common state with the saved flags is missing")
    return places[_COMMON_KEY].relative_path


def _read_common_state(folder: Path, metadata: Metadata) -> dict[str, Any]:
    if (folder / _COMMON_FILE).is_file():
        found = load_plain(io.BytesIO(_read(folder / _COMMON_FILE)))
    else:
        found = load_plain(io.BytesIO(_read_entry(folder, _find_entries(metadata)[_COMMON_KEY])))[0]
    if not isinstance(found, dict) or not isinstance(found.get("args"), Namespace):
        raise ValueError("its common state does not contain the saved flags")
    return found


def _find_entries(metadata: Metadata) -> dict[str, Any]:
    """Return the storage location of each pickled entry, by key."""
    return {
        index.fqn: info
        for index, info in metadata.storage_data.items()
        if isinstance(index, MetadataIndex)
        and isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata)
    }


def _read_entry(folder: Path, info: Any) -> bytes:
    if info.length > _MAX_BYTES:
        raise ValueError(f"an entry of {info.length} bytes is too large for a common or random state")
    with open(folder / info.relative_path, "rb") as stream:
        stream.seek(info.offset)
        return stream.read(info.length)


def _read(file: Path) -> bytes:
    if file.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{file.name} has {file.stat().st_size} bytes, which is too large for such a file")
    return file.read_bytes()


def _check_extra_state(state: Any) -> None:
    """Check the pickle that Transformer Engine stores inside a tensor and loads unchecked.

    Args:
        state: a layer's `_extra_state`, as returned by `torch.load`.

    Raises:
        pickle.UnpicklingError: it has other classes than the scales and recipes that Megatron allows.
    """
    from megatron.core.safe_globals import SafeUnpickler

    allowed: dict[str, set[str]] = {}
    for module, name in SafeUnpickler._SAFE_CLASSES:
        allowed.setdefault(module, set()).add(name)
    for item in state if isinstance(state, list | tuple) else [state]:
        if isinstance(item, torch.Tensor) and item.dtype is torch.uint8 and item.numel():
            NameChecker(item.numpy().tobytes(), allowed).load()
        elif isinstance(item, io.BytesIO):
            load_plain(io.BytesIO(item.getvalue()))
