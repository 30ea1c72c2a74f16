"""A blend without weights, for as many epochs as a run needs."""

from typing import Any

import numpy as np
from megatron.core.datasets.blended_dataset import BlendedDataset
from torch.utils.data import Dataset


class RepeatedBlend(Dataset):
    """Samples of a blend without weights, epoch after epoch; each data set draws again in each epoch.

    Megatron builds one epoch of such a blend, and a longer run would end at its end.

    blend: of data sets whose sample i is in their epoch i // their length.
    samples: of the run.
    """

    def __init__(self, blend: BlendedDataset, samples: int):
        self.blend, self.datasets, self._samples = blend, blend.datasets, samples

    def __len__(self) -> int:
        # One more than requested: Megatron's sampler fails if a resumed run has consumed all samples.
        return self._samples + 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, place = divmod(int(index), len(self.blend))
        number = int(self.blend.dataset_index[place])
        source = self.datasets[number]
        sample = int(self.blend.dataset_sample_index[place]) + epoch * len(source)
        return {"dataset_id": np.int64(number), **source[sample]}

    def count_samples(self, samples: int) -> np.ndarray:
        """Return how many of the first `samples` samples are of each data set, int64 [data sets]."""
        epochs, rest = divmod(samples, len(self.blend))
        part = np.bincount(self.blend.dataset_index[:rest], minlength=len(self.datasets))
        return epochs * np.array([len(source) for source in self.datasets]) + part


def repeat_if_short(dataset: Any, samples: int | None) -> Any:
    """Return a data set that has at least `samples` samples: itself, or a blend without weights repeated."""
    if isinstance(dataset, BlendedDataset) and samples and len(dataset) <= samples:
        return RepeatedBlend(dataset, samples)
    return dataset
