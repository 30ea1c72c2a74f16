"""Samples on their way from a data loader's worker to the training process.

torch sends each tensor of a batch by a file descriptor of its own, over a socket that is opened for it: 1.6 ms of
processor time for a micro-batch of six tensors, and waiting for the worker's answers (benchmarks/data_loader.py). A
pipeline stage reads a micro-batch for each of its chunks. Bytes go through the worker's pipe in 0.2 ms.
"""

import pickle
from typing import Any

import numpy as np
import torch
from torch import Tensor


class SampleBytes(torch.utils.data.Dataset):
    """A data set whose samples are bytes, which `read_batch` reads; torch's loader makes a list of them.

    Its other attributes are those of the data set: Megatron asks for the split.

    Args:
        dataset: its samples are dictionaries of arrays and numbers.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> bytes:
        return pickle.dumps(self.dataset[index], protocol=pickle.HIGHEST_PROTOCOL)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not set yet, in a copy
            raise AttributeError(name)
        return getattr(self.dataset, name)


def read_batch(batch: list[bytes]) -> dict[str, Tensor]:
    """Return the int64 tensors of a micro-batch of `SampleBytes` samples, each [samples, ...]."""
    samples = [pickle.loads(sample) for sample in batch]
    arrays = {name: np.stack([sample[name] for sample in samples]) for name in samples[0]}
    return {name: torch.from_numpy(array).long() for name, array in arrays.items()}
