"""Megatron's index of a blend (data set and number of each sample), in a shared cache.

Megatron writes three files directly under their final names, so another job that starts meanwhile maps partial files.
If the first rank cannot write, or another node does not see the files, Megatron crashes. Here the files are replaced
atomically, a fourth file has their CRC-32, damaged files are rebuilt, and without a cache the index is built in memory.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from megatron.core.utils import log_single_rank

from megatron_cream.common.files import crc32_of

logger = logging.getLogger(__name__)

_FILES = ("dataset_index.npy", "dataset_sample_index.npy", "description.txt")
_SUMS = "crc32.json"


def build_index(original: Callable, self):
    """Build a blend's index from intact cache files, or in memory if they cannot be written.

    Replaces `BlendedDataset._build_indices`, which is `original`.
    """
    folder = self.config.path_to_cache
    if not folder or self.config.defer_npy_index_mmap:
        return original(self)
    prefix = f"{self.unique_description_hash}-{type(self).__name__}-{self.split.name}-"
    files = [Path(folder) / f"{prefix}{name}" for name in _FILES]
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    sums = Path(folder) / f"{prefix}{_SUMS}"
    intact = _are_intact(files, sums)
    if first and not intact:
        try:
            return _write_index(original, self, files, sums, f".{prefix}")
        except OSError as error:
            problem = f"{error.strerror or error}: each rank builds the blend's index in memory"
            log_single_rank(logger, logging.WARNING, f"--data-cache-path {folder}: {problem}")
    with _use_cache(self.config, folder if intact else None):
        return original(self)


def _are_intact(files: list[Path], sums: Path) -> bool:
    """Return whether all files exist and match their CRC-32."""
    try:
        expected = json.loads(sums.read_bytes())
        return all(expected[file.name] == crc32_of(file) for file in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_index(original: Callable, self, files: list[Path], sums: Path, temporary_prefix: str):
    """Build the index, write its files under temporary names, then rename them."""
    folder = files[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    # Left by a killed job. A live job that loses its folder here continues without a cache.
    for leftover in folder.glob(f"{temporary_prefix}*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=temporary_prefix, suffix=".partial", dir=folder))
    try:
        with _use_cache(self.config, str(partial)):
            index = original(self)
        (partial / sums.name).write_text(json.dumps({file.name: crc32_of(partial / file.name) for file in files}))
        for file in [*files, sums]:  # the sums last: files without them are not used
            (partial / file.name).chmod(0o644)
            os.replace(partial / file.name, file)
        return index
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _use_cache(config, folder: str | None) -> Iterator[None]:
    before, config.path_to_cache = config.path_to_cache, folder
    try:
        yield
    finally:
        config.path_to_cache = before
