"""Tests of the cached indices of long documents and blends: correct after concurrent writes, kills and write errors."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder

from megatron_cream.data import blend_cache, indexed, long_documents
from megatron_cream.data.dataset import LongDocumentDataset, LongDocumentDatasetConfig
from megatron_cream.patches import blend_cache as blend_cache_patch
from tests.launch import ROOT

LENGTHS = np.random.default_rng(0).integers(1, 200, size=5000).astype(np.int32)
WANTED = np.flatnonzero(LENGTHS[100:4900] >= 90) + 100


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Write index files for more than ten documents, in chunks of seven."""
    monkeypatch.setattr(long_documents, "IN_MEMORY", 10)
    monkeypatch.setattr(long_documents, "_CHUNK", 7)


def flip(file: Path, place: int) -> None:
    """Flip one bit of the byte at `place`."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def find(file: Path, said: list[str] | None = None, lengths=LENGTHS):
    return long_documents.find_long_documents(lengths, 100, 4900, 90, file, (said if said is not None else []).append)


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), max_size=80),
    cut=st.tuples(st.integers(0, 80), st.integers(0, 80)),
    minimum=st.integers(1, 9),
    turns=st.integers(1, 2),
)
def test_the_index_matches_a_direct_scan(tmp_path_factory, lengths, cut, minimum, turns):
    lengths, (begin, end) = np.array(lengths, dtype=np.int32), sorted(min(c, len(lengths)) for c in cut)
    file = tmp_path_factory.mktemp("cache") / "x.npy"
    wanted = np.flatnonzero(lengths[begin:end] >= minimum) + begin
    for _ in range(turns):
        found = long_documents.find_long_documents(lengths, begin, end, minimum, file, pytest.fail)
        assert list(found) == wanted.tolist()
    assert isinstance(found, np.memmap) == (10 < len(wanted) < end - begin)


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-1]),
        lambda file: file.write_bytes(file.read_bytes()[:60]),
        lambda file: np.save(file, np.arange(100, dtype=np.int64)),
        lambda file: np.save(file, np.arange(100, 400, dtype=np.int32)),
        lambda file: np.save(file, WANTED[::-1].astype(np.int32)),
        lambda file: np.save(file, np.array([print], dtype=object), allow_pickle=True),
        lambda file: file.write_bytes(file.read_bytes()[:128] + bytes(file.stat().st_size - 128)),
        lambda file: flip(file, 128 + 4 * (len(WANTED) // 2) + 1),
        lambda file: flip(file, -1),
        lambda file: np.save(file, WANTED.astype(np.int32)),
    ],
    ids=[
        "empty",
        "cut",
        "cut in its header",
        "dtype",
        "other documents",
        "disorder",
        "pickle",
        "zeros",
        "one bit",
        "its sum",
        "no sum",
    ],
)
def test_a_damaged_index_is_rebuilt(tmp_path, damage):
    file = tmp_path / "x.npy"
    find(file)
    whole = file.read_bytes()
    damage(file)
    said = []
    np.testing.assert_array_equal(find(file, said), WANTED)
    assert file.read_bytes() == whole and not said and list(tmp_path.iterdir()) == [file]


def test_several_processes_write_at_once(tmp_path):
    context, file = multiprocessing.get_context("fork"), tmp_path / "cache" / "x.npy"
    barrier = context.Barrier(4)

    def one():
        for turn in range(20):
            barrier.wait()
            if not np.array_equal(find(file.with_name(f"{turn}.npy")), WANTED):
                os._exit(1)

    processes = [context.Process(target=one) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert sorted(path.name for path in file.parent.iterdir()) == sorted(f"{turn}.npy" for turn in range(20))


def test_a_killed_writer_leaves_no_readable_index(tmp_path):
    file = tmp_path / "x.npy"
    code = f"""
import pathlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
import numpy as np
from megatron_cream.data import long_documents
def parts():
    yield np.arange(50, dtype=np.int32)
    print("half", flush=True)
    time.sleep(600)
long_documents._write(pathlib.Path({str(file)!r}), 100, parts())
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not file.exists() and len(list(tmp_path.iterdir())) == 1
    np.testing.assert_array_equal(find(file), WANTED)
    assert list(tmp_path.iterdir()) == [file]


def test_ranks_hold_the_index_in_memory_where_the_folder_is_unwritable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    said = []
    found = find(tmp_path / "file" / "cache" / "x.npy", said)
    np.testing.assert_array_equal(found, WANTED)
    assert len(said) == 1 and "Not a directory: each rank keeps the numbers of" in said[0] and "\n" not in said[0]

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    np.testing.assert_array_equal(find(tmp_path / "x.npy", said), WANTED)
    assert "No space left on device" in said[1] and [path.name for path in tmp_path.iterdir()] == ["file"]


def write(prefix: Path, lengths: list[int]) -> str:
    np.ones(sum(lengths), dtype=np.uint16).tofile(f"{prefix}.bin")
    indexed.write_index(Path(f"{prefix}.idx"), np.array(lengths, dtype=np.int32), np.uint16)
    return str(prefix)


def blend(prefixes: list[str], cache: str | None):
    config = LongDocumentDatasetConfig(
        random_seed=5,
        sequence_length=96,
        blend=(prefixes, [0.7, 0.3]),
        split="100,0,0",
        path_to_cache=cache,
        sampler={"name": "pi", "window": 96, "target": 384},
    )
    return BlendedMegatronDatasetBuilder(LongDocumentDataset, [300, 0, 0], lambda: True, config).build()[0]


def items(dataset) -> list[tuple[int, int]]:
    return [(int(dataset[i]["dataset_id"]), int(dataset[i]["document"])) for i in range(300)]


@pytest.fixture
def blended(tmp_path):
    blend_cache_patch.install()
    prefixes = [write(tmp_path / name, ([50] + [100] * 9) * 10) for name in "ab"]
    return prefixes, items(blend(prefixes, None))


def test_samples_are_the_same_with_and_without_a_cache(blended, tmp_path):
    prefixes, wanted = blended
    cache = tmp_path / "cache"
    for _ in range(2):
        dataset = blend(prefixes, str(cache))
        assert items(dataset) == wanted
    assert isinstance(dataset.dataset_index, np.memmap)
    assert all(isinstance(part.documents, np.memmap) for part in dataset.datasets)
    assert len(list(cache.iterdir())) == 6 and dataset.config.path_to_cache == str(cache)
    # Without --data-cache-path the index is beside the data, like Megatron's own.
    assert len(list((tmp_path / "a" / "cache" / "LongDocumentDataset_indices").iterdir())) == 1
    # Another data file of the same name gets another index.
    time.sleep(0.01)
    write(tmp_path / "a", ([100] * 9 + [50]) * 10)
    assert items(blend(prefixes, str(cache))) != wanted
    assert len(list(cache.iterdir())) == 7


@pytest.mark.parametrize("name", ["dataset_index.npy", "dataset_sample_index.npy", "description.txt", "crc32.json"])
def test_a_damaged_blend_index_is_rebuilt(blended, tmp_path, name):
    prefixes, wanted = blended
    cache = tmp_path / "cache"
    assert items(blend(prefixes, str(cache))) == wanted
    (file,) = cache.glob(f"*{name}")
    whole = file.read_bytes()
    flip(file, len(whole) // 2)
    assert items(blend(prefixes, str(cache))) == wanted
    assert file.read_bytes() == whole and len(list(cache.iterdir())) == 6


def test_a_rank_without_the_shared_cache_continues(blended, tmp_path, monkeypatch):
    prefixes, wanted = blended
    monkeypatch.setattr(blend_cache.torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(blend_cache.torch.distributed, "get_rank", lambda *_: 1)
    monkeypatch.setattr(blend_cache.torch.distributed, "barrier", lambda *_, **__: None)
    assert items(blend(prefixes, str(tmp_path / "elsewhere"))) == wanted
    assert not list((tmp_path / "elsewhere").glob("*-description.txt"))


def test_an_unwritable_blend_cache_prints_one_line(blended, tmp_path, caplog):
    prefixes, wanted = blended
    (tmp_path / "file").write_text("no folder")
    with caplog.at_level("WARNING"):
        assert items(blend(prefixes, str(tmp_path / "file"))) == wanted
    said = [record.getMessage() for record in caplog.records]
    assert sum("each rank builds the blend's index in memory" in line for line in said) == 1
    assert sum("each rank keeps the numbers of 90 documents" in line for line in said) == 2


def test_a_killed_job_leaves_no_readable_blend_index(blended, tmp_path, monkeypatch):
    prefixes, wanted = blended
    cache, replace = tmp_path / "cache", os.replace

    def dies(source, to):
        if str(to).endswith("dataset_sample_index.npy"):
            raise KeyboardInterrupt
        replace(source, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        patch.setattr(blend_cache.shutil, "rmtree", lambda *_, **__: None)  # a SIGKILL cleans nothing up
        with pytest.raises(KeyboardInterrupt):
            blend(prefixes, str(cache))
    assert list(cache.glob(".*.partial"))
    assert items(blend(prefixes, str(cache))) == wanted
    assert not list(cache.glob(".*")) and len(list(cache.iterdir())) == 6
