"""Faults of Megatron's datasets."""

import resource
import signal
from argparse import Namespace
from importlib import reload
from pathlib import Path

from megatron.core.datasets import utils
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.utils import Split

from tests.upstream import upstream_fault
from tests.upstream.unpatched import unpatched

SAMPLES = 1000


@upstream_fault(
    "blend-cache",
    "half an index has the name of a whole one: every later job maps it",
    raises=ValueError,
)
def test_an_index_truncated_by_a_full_disk_is_rebuilt(tmp_path):
    assert unpatched(_build_after_a_full_disk, tmp_path) == SAMPLES


def _build_after_a_full_disk(folder: Path) -> int:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        _build(folder)
    except OSError:
        pass
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return _build(folder)


def _build(folder: Path) -> int:
    """Return the number of samples in a blend's index, which stores 8 bytes per sample in one of its files."""
    blend = BlendedDataset.__new__(BlendedDataset)
    blend.config = Namespace(path_to_cache=str(folder), defer_npy_index_mmap=False, fast_cache_load=False)
    blend.split, blend.size, blend.weights, blend.datasets = Split.train, SAMPLES, [1.0, 1.0], [range(SAMPLES)] * 2
    blend.unique_description, blend.unique_description_hash = "a blend", "hash"
    _, samples = blend._build_indices()
    return len(samples)


@upstream_fault(
    "compile-helpers",
    "`make` is run for what the wheel has built already, in a folder without a makefile",
    raises=SystemExit,
)
def test_compiled_helpers_of_the_wheel_are_used():
    unpatched(_compile_helpers)


def _compile_helpers() -> None:
    reload(utils).compile_helpers()  # `platform` replaces it
