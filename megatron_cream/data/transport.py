"""Samples on their way from a data loader's worker to the training process.

torch sends each tensor of a batch by a file descriptor of its own, over a socket that is opened for it: 1.4 to 1.9 ms
of processor time for a micro-batch of six tensors, and waiting for the worker's answers (benchmarks/data_loader.py). A
pipeline stage reads a micro-batch for each of its chunks. Here the arrays go through the worker's pipe, in a few tenths
of a millisecond, and become tensors when they are unpickled.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data._utils.collate import default_collate_fn_map


@dataclass(frozen=True)
class _Sample:
    """A sample, of a type of its own so that torch's loader calls `_collate`.

    fields: an array or a number by name.
    """

    fields: dict[str, Any]


@dataclass(frozen=True)
class _Batch:
    """A batch in a worker; it is unpickled as a dictionary of tensors."""

    arrays: dict[str, np.ndarray]

    def __reduce__(self) -> tuple:
        return _to_tensors, (self.arrays,)


class ThroughPipe(torch.utils.data.Dataset):
    """A data set whose batches torch's loader sends through a pipe.

    The batches are those of the data set itself. Its other attributes are the data set's: Megatron asks for the split.

    Args:
        dataset: its samples are dictionaries of arrays and numbers.
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> _Sample:
        return _Sample(self.dataset[index])

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not set yet, in a copy
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _collate(batch: list[_Sample], *, collate_fn_map: dict | None = None) -> _Batch | dict[str, Tensor]:
    arrays = {name: np.stack([sample.fields[name] for sample in batch]) for name in batch[0].fields}
    return _Batch(arrays) if torch.utils.data.get_worker_info() else _to_tensors(arrays)


def _to_tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


default_collate_fn_map[_Sample] = _collate  # as torch.utils.data.default_collate is documented to be extended
