"""Read the pickles of a checkpoint without running code that they name.

A pickle can call any function by its name. Here each kind of pickle has a list of allowed names; any other
name is rejected and not imported. Needs neither Megatron nor a GPU.
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
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch": {"Size"} | {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
}
"""The classes in torch.distributed.checkpoint's .metadata: module -> names in it."""

# Python up to 3.12 pickles pathlib's classes under the first name, Python 3.13 under the second.
_PATHS = {f"{module}.PosixPath": PosixPath for module in ("pathlib", "pathlib._local")}
_PLAIN = {"argparse.Namespace": Namespace, "signal.Signals": signal.Signals, "builtins.NoneType": type(None)} | _PATHS

_REJECTED = "it names {}, which is not allowed there; none of it was run"


class Placeholder:
    """Replacement for objects of Megatron's classes, such as enums, whose content is not used."""

    def __init__(self, *_):
        pass


class _Unpickler(pickle._Unpickler):  # the C version allocates 64 GB for a damaged memo index
    def __init__(self, data: bytes, names: dict[str, set[str]]):
        super().__init__(io.BytesIO(data))
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        if name not in self._names.get(module, ()):
            raise pickle.UnpicklingError(_REJECTED.format(f"{module}.{name}"))
        return self.load_class(module, name)

    def load_class(self, module: str, name: str) -> Any:
        return _PATHS.get(f"{module}.{name}") or super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(_REJECTED.format("a persistent object"))


class NameChecker(_Unpickler):
    """An unpickler that only checks names; every object becomes a `Placeholder`."""

    def load_class(self, module: str, name: str) -> Any:
        return Placeholder


def to_plain(value: Any) -> Any:
    """Return a copy made of containers, numbers, strings, None and torch's dtypes.

    An object of a class can be read only where that class has the same name. Even the standard library's names change:
    pathlib's classes moved in Python 3.13. Paths become strings, enums their names, other objects their `str`.
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
    """Let torch load safe classes under their names in other Python and numpy versions.

    These are classes that Megatron declares safe under their current names.
    """
    from numpy._core.multiarray import _reconstruct

    others = [(cls, name) for name, cls in _PATHS.items()]
    others += [(_reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    torch.serialization.add_safe_globals(others)


def check_pickled_names(file: Path | io.BytesIO) -> None:
    """Reject a file of torch.save that names unsafe classes or functions; no tensor is read.

    Raises:
        pickle.UnpicklingError: it names something that neither torch nor, if imported, Megatron declares safe.
        Exception: of many kinds, if the file is damaged.
    """
    if names := torch.serialization.get_unsafe_globals_in_checkpoint(file):
        raise pickle.UnpicklingError(_REJECTED.format(sorted(names)[0]))


def load_metadata(data: bytes) -> Any:
    """Return the content of a checkpoint folder's .metadata file.

    Raises:
        pickle.UnpicklingError: it names something that does not belong in metadata.
        Exception: of many kinds, if it is damaged.
    """
    return _Unpickler(data, _METADATA).load()


def load_plain(file: Path | io.BytesIO) -> Any:
    """Load plain values that torch.save wrote; no code that the file names is imported or run.

    Objects of Megatron's classes become a `Placeholder`.

    Raises:
        pickle.UnpicklingError: it contains more than plain values, flags and objects of Megatron's.
        Exception: of many kinds, if it is damaged.
    """
    missing = []
    for name in sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file)):
        if name in _PLAIN:
            missing.append(_PLAIN[name])
        elif name.startswith(("megatron.", "megatron_cream.")):
            missing.append((Placeholder, name))
        else:
            raise pickle.UnpicklingError(_REJECTED.format(name))
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with torch.serialization.safe_globals(
        missing
    ):  # removes all of these at its end, so `missing` has none declared elsewhere
        return torch.load(file, weights_only=True)
