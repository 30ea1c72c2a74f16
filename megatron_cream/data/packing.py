"""Pack whole short documents into samples of N tokens.

Only the lengths decide which documents share a sample, so they are packed once, by best-fit decreasing over a histogram
of lengths: millions of documents take a second. An epoch shuffles the documents of each length, so a document gets
other neighbours in each epoch, and any sample can be computed without the samples before it.
"""

import functools
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_cream.data import indexed
from megatron_cream.data.order import permute, permute_range

MIN_TOKENS = 2
"""A document of one token has no token to predict."""


@dataclass(frozen=True)
class _Slot:
    """Documents of one length in each sample of a layout."""

    length: int
    count: int

    first: int
    """Rank, among the documents of this length, of the first one in the first sample of the layout."""


@dataclass(frozen=True)
class PackingTotals:
    """What one epoch of packed documents has.

    window: tokens of a sample.
    squares: sum of the squared lengths of the documents.
    too_long: documents that are left out because they have more than `window` tokens.
    too_short: documents that are left out because they have less than MIN_TOKENS.
    """

    window: int
    samples: int
    documents: int
    tokens: int
    squares: int
    too_long: int
    too_short: int

    @property
    def padding(self) -> float:
        """Share of the samples' tokens that are padding."""
        return 1 - self.tokens / (self.samples * self.window) if self.samples else 0.0

    @property
    def mean_context(self) -> float:
        """Mean length of the document that a token is in: attention costs as much as in samples of this length."""
        return self.squares / (self.samples * self.window) if self.samples else 0.0


class Packing:
    """The packing of documents into samples of `window` tokens; each document is in one sample an epoch.

    samples: samples of one epoch.
    totals: what one epoch has.
    """

    def __init__(self, lengths: np.ndarray, window: int):
        """Pack documents of these lengths, int32 [n]; they may be mapped from a file."""
        fits = (lengths >= MIN_TOKENS) & (lengths <= window)
        kept = np.flatnonzero(fits).astype(np.int32)
        self._by_length = kept[np.argsort(lengths[kept], kind="stable")]
        self._counts = np.bincount(lengths[kept], minlength=window + 1)
        self._begins = np.cumsum(self._counts) - self._counts
        used = np.zeros(window + 1, dtype=np.int64)
        self._layouts: list[list[_Slot]] = []
        sizes = []
        for layout, samples in pack_lengths(
            {int(n): int(self._counts[n]) for n in np.flatnonzero(self._counts)}, window
        ):
            self._layouts.append([_Slot(length, count, int(used[length])) for length, count in layout])
            for length, count in layout:
                used[length] += count * samples
            sizes.append(samples)
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self.samples = int(self._ends[-1]) if sizes else 0
        each = np.arange(window + 1, dtype=np.int64)
        self.totals = PackingTotals(
            window=window,
            samples=self.samples,
            documents=len(kept),
            tokens=int(self._counts @ each),
            squares=int(self._counts @ each**2),
            too_long=int((lengths > window).sum()),
            too_short=int((lengths < MIN_TOKENS).sum()),
        )

    def sample_documents(self, index: int, seed: int) -> Iterator[int]:
        """Yield the numbers of the documents in a sample; samples are counted over all epochs.

        Raises:
            ZeroDivisionError: no document fits.
        """
        epoch, place = divmod(index, self.samples)
        row = permute(place, self.samples, (seed, epoch))
        layout = int(np.searchsorted(self._ends, row, side="right"))
        within = row - (int(self._ends[layout - 1]) if layout else 0)
        for slot in self._layouts[layout]:
            of_length = int(self._counts[slot.length])
            for rank in range(slot.first + within * slot.count, slot.first + (within + 1) * slot.count):
                shuffled = permute(rank, of_length, (seed + slot.length, epoch))
                yield int(self._by_length[self._begins[slot.length] + shuffled])

    def count_documents(self, samples: int, seed: int) -> np.ndarray:
        """Return how many documents of each length the first `samples` samples have, int64 [window + 1]."""
        epochs, rest = divmod(samples, self.samples)
        counts = epochs * self._counts
        rows = permute_range(rest, self.samples, (seed, epochs))
        times = np.bincount(np.searchsorted(self._ends, rows, side="right"), minlength=len(self._layouts))
        for layout in np.flatnonzero(times):
            for slot in self._layouts[layout]:
                counts[slot.length] += slot.count * times[layout]
        return counts


@functools.lru_cache(maxsize=64)
def count_packed(prefix: str, window: int) -> PackingTotals:
    """Return what one epoch of all documents of PREFIX.bin/.idx has."""
    return Packing(indexed.open_index(prefix).lengths, window).totals


def pack_lengths(counts: dict[int, int], window: int) -> list[tuple[tuple[tuple[int, int], ...], int]]:
    """Return the layouts of samples that hold every document: [(layout, number of samples)].

    Best-fit decreasing: the longest documents first, each into the sample with the least room that still holds it. A
    layout is ((length, number of documents), ...).

    Args:
        counts: {length: number of documents}, lengths from 1 to `window`.
        window: tokens of a sample.
    """
    groups: dict[int, list[tuple[tuple, int]]] = {}
    rooms: list[int] = []  # the keys of `groups`, sorted

    def add(room: int, layout: tuple, samples: int) -> None:
        if room not in groups:
            insort(rooms, room)
            groups[room] = []
        groups[room].append((layout, samples))

    for length in sorted(counts, reverse=True):
        left = counts[length]
        while left:
            at = bisect_left(rooms, length)
            if at == len(rooms):
                room, layout, samples = window, (), -(-left // (window // length))
            else:
                room = rooms[at]
                layout, samples = groups[room].pop()
                if not groups[room]:
                    del groups[room], rooms[at]
            each = room // length
            full = min(samples, left // each)
            if full:
                add(room - each * length, (*layout, (length, each)), full)
                left, samples = left - full * each, samples - full
            if samples and left:
                add(room - left * length, (*layout, (length, left)), 1)
                left, samples = 0, samples - 1
            if samples:
                add(room, layout, samples)
    return [group for room in rooms for group in groups[room]]
