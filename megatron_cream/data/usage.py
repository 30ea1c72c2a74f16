"""Report the data that a run used of each source: samples, documents by length, tokens and padding.

Samples are pure functions of their number, so this is computed at the end of a run instead of counted during it.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Dataset

from megatron_cream.data.dataset import LongDocumentDataset
from megatron_cream.data.mixed_dataset import MixedDataset
from megatron_cream.data.order import permute_range
from megatron_cream.data.packed_dataset import PackedDocumentDataset
from megatron_cream.data.repeated_blend import RepeatedBlend


class Usage:
    """The training data of this rank, for the report at the end.

    dataset: set where the data is built; None without short texts.
    """

    dataset: MixedDataset | None = None

    def describe_sources(self, samples: int) -> list[str]:
        """Return a line for each source, about its part in the first `samples` samples of the run."""
        if self.dataset is None:
            return []
        short = self.dataset.mix.count_short(samples)
        return [*_describe_part(self.dataset.long, samples - short), *_describe_part(self.dataset.short, short)]


def _describe_part(dataset: Dataset, samples: int) -> Iterator[str]:
    sources = getattr(dataset, "datasets", [dataset])
    used = [samples]
    if isinstance(dataset, RepeatedBlend):
        used = dataset.count_samples(samples)
    elif hasattr(dataset, "dataset_index"):
        used = np.bincount(dataset.dataset_index[:samples], minlength=len(sources))
    for source, count in zip(sources, map(int, used), strict=True):
        describe = _describe_packed if isinstance(source, PackedDocumentDataset) else _describe_long
        yield f"{source.dataset_path}: {describe(source, count)}"


def _describe_packed(source: PackedDocumentDataset, count: int) -> str:
    window = source.config.sequence_length
    documents = source.packing.count_documents(count, source.config.random_seed)
    tokens, capacity = int(documents @ np.arange(window + 1)), count * window
    padding = f"{100 * (1 - tokens / capacity):.1f} % padding" if capacity else "no padding"
    by_length = _by_length(np.arange(window + 1), documents, window // 8, window)
    return f"{count:,} packed samples, {tokens:,} tokens, {padding}; {by_length}"


def _describe_long(source: LongDocumentDataset, count: int) -> str:
    documents = _count_visits(source, count)
    lengths, window = source.dataset.sequence_lengths[np.asarray(source.documents)], source.sampler.sequence_length
    by_length = _by_length(lengths, documents, 2 * window, 8 * window)
    return f"{count:,} samples, {count * window:,} tokens; {by_length}"


def _count_visits(source: LongDocumentDataset, samples: int) -> np.ndarray:
    """Return how many of the first `samples` samples are of each document, int64 [long documents]."""
    n = len(source.documents)
    epochs, rest = divmod(samples, n)
    visits = np.full(n, epochs)
    visits[permute_range(rest, n, (source.config.random_seed, epochs))] += 1
    return visits


def _by_length(lengths: np.ndarray, counts: np.ndarray, first: int, last: int) -> str:
    """Return the number of documents by length: up to `first` tokens, up to twice `first` .. `last`, and above.

    Args:
        lengths: int [m], in tokens.
        counts: int [m], documents of each of them.
        first: end of the first range.
        last: end of the last one but one.
    """
    edges = [first]
    while edges[-1] < last:
        edges.append(min(2 * edges[-1], last))
    sums = np.bincount(np.searchsorted(edges, lengths), weights=counts, minlength=len(edges) + 1)
    names = [f"up to {edge:,}" for edge in edges] + [f"above {edges[-1]:,}"]
    ranges = [f"{count:,.0f} of {name}" for count, name in zip(sums, names, strict=True) if count]
    return f"documents by tokens: {', '.join(ranges) or 'none'}"
