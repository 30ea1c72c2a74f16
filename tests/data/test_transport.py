"""Batches that a data loader's worker sends through its pipe."""

import multiprocessing.resource_sharer
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_cream.data.transport import ThroughPipe


class Samples(torch.utils.data.Dataset):
    split = "train"

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> dict:
        tokens = np.arange(i, i + 40_000, dtype=np.int64)
        mask = np.ones(len(tokens), dtype=np.float32)
        mask[i] = 0
        return {"tokens": tokens, "loss_mask": mask, "sample": np.int64(i), "dataset_id": i % 2}


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_data_set(workers, monkeypatch):
    """Also their types and that they can be written, without a connection of its own for each tensor."""
    connected = []
    load = lambda dataset: torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=workers)
    expected = list(load(Samples()))
    monkeypatch.setattr(multiprocessing.resource_sharer.DupFd, "detach", lambda self: connected.append(self))
    found = list(load(ThroughPipe(Samples())))
    assert len(found) == len(expected) == 3 and not connected
    for mine, theirs in zip(found, expected):
        assert type(mine) is dict and mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name])
            tensor.zero_()


def test_it_has_what_megatron_asks_a_data_set_for():
    assert ThroughPipe(Samples()).split == "train" and len(ThroughPipe(Samples())) == 6
    assert not hasattr(ThroughPipe(Samples()), "index_split")
    assert ThroughPipe(SimpleNamespace(index_split="valid")).index_split == "valid"
