"""Pickles of a checkpoint, read without running what they name.

A pickle can call any function by its name. Here each is read with the names that belong in it, and no
other; nothing else is imported. Neither Megatron nor a GPU is needed.
"""

import dataclasses
import enum
import io
import pickle
import signal
from argparse import Namespace
from pathlib import Path, PosixPath
from typing import Any

import numpy as np
import torch

_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}  # fmt: skip
"""What torch.distributed.checkpoint's .metadata is made of: module -> names in it."""

# pathlib's classes are pickled under the first name up to Python 3.12, and under the second in 3.13.
_PATHS = {f"{module}.PosixPath": PosixPath for module in ("pathlib", "pathlib._local")}
_PLAIN = {"argparse.Namespace": Namespace, "signal.Signals": signal.Signals, "builtins.NoneType": type(None)} | _PATHS

_REFUSED = "it asks for {}, which has no place there; nothing of it was run"


class NotNeeded:
    """Stands for objects of Megatron's own classes (enums, recipes), of which nothing here asks anything."""

    def __init__(self, *_):
        pass


class _Unpickler(pickle._Unpickler):  # in C it would take 64 GB for a damaged memo index
    def __init__(self, data: bytes, names: dict[str, set[str]]):
        super().__init__(io.BytesIO(data))
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        if name not in self._names.get(module, ()):
            raise pickle.UnpicklingError(_REFUSED.format(f"{module}.{name}"))
        return self.found(module, name)

    def found(self, module: str, name: str) -> Any:
        return _PATHS.get(f"{module}.{name}") or super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(_REFUSED.format("a persistent object"))


class NamesOnly(_Unpickler):
    def found(self, module: str, name: str) -> Any:
        return NotNeeded


def to_plain(value: Any) -> Any:
    """Return a copy that any process can read: containers of numbers, strings, None and torch's dtypes.

    What is saved as an object of a class can be read only where that class has the same name, which Python's own
    library does not promise: pathlib's moved in 3.13. Paths become strings, enums their names, other objects their
    `str`.
    """
    if value is None or type(value) in (bool, int, float, complex, str, bytes, torch.dtype):
        return value
    if isinstance(value, dict):
        return {to_plain(key): to_plain(item) for key, item in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(to_plain(item) for item in value)
    if isinstance(value, Namespace):
        return Namespace(**to_plain(vars(value)))
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, np.generic):
        return to_plain(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return str(value)


def declare_names_of_other_versions() -> None:
    """Let torch read what Megatron declares safe under the names that other versions of Python and numpy give it."""
    from numpy._core.multiarray import _reconstruct

    others = [(cls, name) for name, cls in _PATHS.items()]
    others += [(_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    torch.serialization.add_safe_globals(others)


def refuse_code(file: Path | io.BytesIO) -> None:
    """Look at what the pickle in a file of torch.save's names; no tensor is read.

    Raises:
        pickle.UnpicklingError: something that neither torch nor Megatron, if that is imported, declares safe.
        Exception: of many kinds, if the file is damaged.
    """
    if names := torch.serialization.get_unsafe_globals_in_checkpoint(file):
        raise pickle.UnpicklingError(_REFUSED.format(sorted(names)[0]))


def load_metadata(data: bytes) -> Any:
    """The .metadata of a checkpoint folder.

    Raises:
        pickle.UnpicklingError: it asks for something that metadata is not made of.
        Exception: of many kinds, if it is damaged.
    """
    return _Unpickler(data, _METADATA).load()


def load_plain(file: Path | io.BytesIO) -> Any:
    """What torch.save wrote, if it is made of plain values; no code that it names is imported or run.

    Raises:
        pickle.UnpicklingError: it is more than plain values, flags and objects of Megatron's.
        Exception: of many kinds, if it is damaged.
    """
    missing = []
    for name in sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file)):
        if name in _PLAIN:
            missing.append(_PLAIN[name])
        elif name.startswith(("megatron.", "megatron_cream.")):
            missing.append((NotNeeded, name))
        else:
            raise pickle.UnpicklingError(_REFUSED.format(name))
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with torch.serialization.safe_globals(missing):  # forgets them all at its end, so none that others declared
        return torch.load(file, weights_only=True)
