"""Megatron's index of a blend (which data set each sample is of, and which sample) in a cache that jobs share.

Megatron writes three files under the names that others look for: another job that starts meanwhile maps half a file.
Where the first rank cannot write, or another rank's node does not see what it wrote, the job ends in tracebacks.
A fourth file has the CRC-32 of each; files that differ from it are made anew.
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


def whole_or_none(original: Callable, self):
    """For `BlendedDataset._build_indices`: from whole files; if there are none, and none can be, from memory."""
    folder = self.config.path_to_cache
    if not folder or self.config.defer_npy_index_mmap:
        return original(self)
    begin = f"{self.unique_description_hash}-{type(self).__name__}-{self.split.name}-"
    files = [Path(folder) / f"{begin}{name}" for name in _FILES]
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    sums = Path(folder) / f"{begin}{_SUMS}"
    whole = _are_whole(files, sums)
    if first and not whole:
        try:
            return _written(original, self, files, sums, f".{begin}")
        except OSError as error:
            said = f"--data-cache-path {folder}: {error.strerror or error}: each rank holds the blend's index by itself"
            log_single_rank(logger, logging.WARNING, said)
    with _cache(self.config, folder if whole else None):
        return original(self)


def _are_whole(files: list[Path], sums: Path) -> bool:
    """Whether all files are there and as they were written."""
    try:
        kept = json.loads(sums.read_bytes())
        return all(kept[file.name] == crc32_of(file) for file in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _written(original: Callable, self, files: list[Path], sums: Path, beside: str):
    folder = files[0].parent
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f"{beside}*.partial"):  # by a job that was killed; one that lives goes on without a cache
        shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=beside, suffix=".partial", dir=folder))
    try:
        with _cache(self.config, str(partial)):
            index = original(self)
        (partial / sums.name).write_text(json.dumps({file.name: crc32_of(partial / file.name) for file in files}))
        for file in [*files, sums]:  # the sums last: without them the others count for nothing
            (partial / file.name).chmod(0o644)
            os.replace(partial / file.name, file)
        return index
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _cache(config, folder: str | None) -> Iterator[None]:
    before, config.path_to_cache = config.path_to_cache, folder
    try:
        yield
    finally:
        config.path_to_cache = before
