"""Pickles of a checkpoint, read without running what they name.

A pickle can call any function by its name. Here each is read with the names that belong in it, and no
other; nothing else is imported. Neither Megatron nor a GPU is needed.
"""

import io
import pickle
import signal
from argparse import Namespace
from pathlib import Path
from typing import Any

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

_PLAIN = {"argparse.Namespace": Namespace, "signal.Signals": signal.Signals, "builtins.NoneType": type(None)}

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
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(_REFUSED.format("a persistent object"))


class _NamesOnly(_Unpickler):
    def found(self, module: str, name: str) -> Any:
        return NotNeeded


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


def check_extra_state(state: Any) -> None:
    """Transformer Engine keeps a pickle of its own inside a tensor, and opens it without looking.

    Args:
        state: a layer's `_extra_state`, as `torch.load` gave it.

    Raises:
        pickle.UnpicklingError: it is more than the scales and recipes that Megatron lets in there.
    """
    from megatron.core.safe_globals import SafeUnpickler

    allowed: dict[str, set[str]] = {}
    for module, name in SafeUnpickler._SAFE_CLASSES:
        allowed.setdefault(module, set()).add(name)
    for item in state if isinstance(state, list | tuple) else [state]:
        if isinstance(item, torch.Tensor) and item.dtype is torch.uint8 and item.numel():
            _NamesOnly(item.numpy().tobytes(), allowed).load()
        elif isinstance(item, io.BytesIO):
            load_plain(io.BytesIO(item.getvalue()))
