"""Samples that a data loader's worker sends as bytes."""

import multiprocessing.resource_sharer
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_cream.data.transport import SampleBytes, read_batch


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
def test_a_loader_gives_the_samples(workers, monkeypatch):
    """In order, as int64, and without a connection of its own for each tensor."""
    connected = []
    monkeypatch.setattr(multiprocessing.resource_sharer.DupFd, "detach", lambda self: connected.append(self))
    loader = torch.utils.data.DataLoader(SampleBytes(Samples()), batch_size=2, num_workers=workers)
    for number, batch in enumerate(loader):
        found, expected = read_batch(batch), [Samples()[2 * number + i] for i in range(2)]
        assert found.keys() == expected[0].keys()
        for name, tensor in found.items():
            wanted = torch.tensor(np.stack([sample[name] for sample in expected])).long()
            assert tensor.dtype == torch.int64 and torch.equal(tensor, wanted)
    assert number == 2 and not connected


def test_it_has_what_megatron_asks_a_data_set_for():
    assert SampleBytes(Samples()).split == "train" and len(SampleBytes(Samples())) == 6
    assert not hasattr(SampleBytes(Samples()), "index_split")
    assert SampleBytes(SimpleNamespace(index_split="valid")).index_split == "valid"
