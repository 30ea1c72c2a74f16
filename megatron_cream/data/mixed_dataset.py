"""A share of packed short texts among the samples of long documents."""

import functools
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from megatron_cream.data.order import permute

_BLOCK = 64
"""Samples in which the share is exact, up to one sample; the short ones are at random places in it."""


class Mix(NamedTuple):
    """Which samples of a run are packed short texts: a pure function of share, seed and sample number."""

    share: float
    seed: int

    def count_short(self, samples: int) -> int:
        """Return how many of the first `samples` samples are short texts."""
        block, place = divmod(samples, _BLOCK)
        whole = self._count_in_blocks(block)
        return whole + _count_before(self._count_in_blocks(block + 1) - whole, self.seed, block)[place]

    def is_short(self, index: int) -> bool:
        return self.count_short(index + 1) > self.count_short(index)

    def _count_in_blocks(self, blocks: int) -> int:
        return int(blocks * _BLOCK * self.share + 0.5)


@functools.lru_cache(maxsize=16)
def _count_before(short: int, seed: int, block: int) -> list[int]:
    """Return, for each place of a block, how many short samples are before it; with the end, _BLOCK + 1 numbers."""
    places = [permute(place, _BLOCK, (seed, block)) < short for place in range(_BLOCK)]
    return [0, *np.cumsum(places).tolist()]


class MixedDataset(Dataset):
    """Samples of long documents and of packed short texts, in the shares of a `Mix`.

    Each source has its own epochs. A sample has the items of its source's, and `dataset_id`: the number of its data
    set, long ones first.
    """

    def __init__(self, long: Dataset, short: Dataset, mix: Mix, samples: int):
        self.long, self.short, self.mix = long, short, mix
        self._samples = samples

    def __len__(self) -> int:
        # One more than requested: Megatron's sampler fails if a resumed run has consumed all samples.
        return self._samples + 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        before = self.mix.count_short(index)
        source, number, first = self.long, index - before, 0
        if self.mix.is_short(index):
            source, number, first = self.short, before, len(getattr(self.long, "datasets", [self.long]))
        sample = source[number]
        return sample | {"dataset_id": np.int64(first + sample.get("dataset_id", 0))}
