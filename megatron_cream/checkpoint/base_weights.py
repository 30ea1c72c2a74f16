"""The frozen weights under LoRA adapters: where they are, whether they are the same, and how to read them.

A checkpoint of adapters has no frozen weights. It records the folder of the base model, and sizes and hashes by which
the same weights are recognised when they are read again.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_cream.checkpoint import hub, opening, output
from megatron_cream.checkpoint.convert import build_reader
from megatron_cream.checkpoint.families import ModelShape
from megatron_cream.checkpoint.hf_folder import CONFIG, HfFolder
from megatron_cream.checkpoint.mapping import Row
from megatron_cream.checkpoint.megatron_folder import MegatronCheckpoint
from megatron_cream.common.errors import UsageError

_BLOCK = 1 << 20


@dataclass(frozen=True)
class BaseWeights:
    """The weights of a base model.

    shape: the base model's shape.
    read: fills a whole Megatron parameter (row, layer, out) and returns it.
    dtype: returns the dtype of a parameter (row, layer).
    """

    shape: ModelShape
    read: Callable[[Row, int | None, Tensor], Tensor]
    dtype: Callable[[Row, int | None], torch.dtype]


def describe(name: str | Path, *, flag: str, step: int | str | None = None) -> dict[str, Any]:
    """Return a plain record of a base model, for checkpoints.

    Args:
        name: a Hugging Face folder, a model's name on the Hub, or a folder of Megatron checkpoints.
        flag: the flag that gave it, for messages.
        step: the step of a checkpoint; None is the newest.

    Raises:
        UsageError: there is no such model.
    """
    path = hub.locate(str(name), flag=flag)
    if (path / output.TRACKER).is_file():
        step = opening.read_newest_step(path, flag) if step is None else step
        folder = opening.find_step_folder(path, step, flag)
        files = [file for file in folder.iterdir() if file.suffix == ".distcp" or file.name == ".metadata"]
    else:
        step, files = None, [path / CONFIG, *set(HfFolder(path).weights.values())]
    return {
        "name": str(name),
        "folder": str(path.absolute()),
        "step": step,
        "files": {file.name: _fingerprint(file) for file in sorted(files)},
    }


def _fingerprint(file: Path) -> list[Any]:
    """Return the size of a file, and the SHA-256 of its start, middle and end."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with open(file, "rb") as opened:
        for start in sorted({0, max(size // 2, 0), max(size - _BLOCK, 0)}):
            opened.seek(start)
            digest.update(opened.read(_BLOCK))
    return [size, digest.hexdigest()]


def find_again(saved: dict[str, Any], given: str | None, *, where: str, flag: str) -> dict[str, Any]:
    """Return the record of the same base model as it is now.

    Args:
        saved: the record in a checkpoint.
        given: where the user says that it is; None means where it was.
        where: flag and folder of the checkpoint, for messages.
        flag: the flag that gives another place.

    Raises:
        UsageError: it is missing, or has other weights.
    """
    try:
        found = describe(given or _last_place(saved), flag=flag, step=saved["step"])
    except UsageError as error:
        if given is not None:
            raise
        raise UsageError(
            f"{where}: has adapters for the model in {saved['folder']}, which cannot be read. Give it with {flag}."
        ) from error
    for file in sorted(saved["files"].keys() | found["files"].keys()):
        if saved["files"].get(file) != found["files"].get(file):
            raise UsageError(f"{where}: has adapters for another model than {found['folder']}: {file} differs")
    return found


def folder_of(record: dict[str, Any] | None) -> str | None:
    """Return where the base model of a record is; None if a run has no adapters."""
    return None if record is None else record["folder"]


def _last_place(saved: dict[str, Any]) -> str:
    return saved["folder"] if Path(saved["folder"]).is_dir() else saved["name"]


def open_base(record: dict[str, Any], *, flag: str) -> BaseWeights:
    """Open the base model of a record."""
    path = Path(record["folder"])
    if record["step"] is not None:
        checkpoint = MegatronCheckpoint(path, record["step"], flag=flag)
        return BaseWeights(checkpoint.shape, checkpoint.read, checkpoint.dtype)
    return open_folder(path)


def open_folder(path: Path) -> BaseWeights:
    """Open a Hugging Face folder."""
    folder = HfFolder(path)
    return BaseWeights(folder.shape, build_reader(folder), lambda row, layer: folder.dtype(row.names(layer)[0]))
