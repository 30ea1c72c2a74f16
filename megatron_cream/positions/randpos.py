"""Randomized positions: N of 0 .. L-1 without replacement, sorted (Ruoss et al. 2023, arXiv 2305.16843)."""

import math
from dataclasses import dataclass

import numpy as np

from megatron_cream.positions.random import unit, word_source, words
from megatron_cream.positions.sampler import Integers, Sampler


@dataclass(frozen=True, eq=False)
class RandposPlan:
    """A plan like `positions.plan.Plan` that stores the positions.

    Its hundreds of segments are computed only on access.
    """

    token_indices: np.ndarray
    position_ids: np.ndarray
    alpha: None = None

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """((start, length), ...) of the runs of consecutive positions."""
        breaks = np.flatnonzero(np.diff(self.position_ids) != 1) + 1
        edges = np.concatenate(([0], breaks, [len(self.position_ids)]))
        return tuple(zip(self.position_ids[edges[:-1]].tolist(), np.diff(edges).tolist()))


class RandposSampler(Sampler):
    """N consecutive tokens from a uniformly drawn place of the document, at random positions."""

    name = "randpos"

    def plan(self, epoch: int, sample: int, document_length: int) -> RandposPlan:
        epoch, sample, document_length = self._check_arguments(epoch, sample, document_length)
        start = Integers.draw(unit(words(self.seed, epoch, sample)[0]), 0, document_length - self.window)
        source = word_source(self.seed, epoch, sample, stream=2)
        return RandposPlan(
            token_indices=np.arange(start, start + self.window, dtype=np.int64),
            position_ids=_sorted_subset(source, self.target, self.window),
        )


def _sorted_subset(source: np.random.Philox, population: int, size: int) -> np.ndarray:
    """Return a uniformly drawn subset of 0 .. population-1, sorted, int64 [size]."""
    if 2 * size <= population:
        return _first_distinct(source, population, size)
    # For a large subset, draw its complement: the last distinct values would take many draws.
    keep = np.ones(population, dtype=bool)
    keep[_first_distinct(source, population, population - size)] = False
    return np.flatnonzero(keep)


def _first_distinct(source: np.random.Philox, population: int, size: int) -> np.ndarray:
    """Return the first `size` distinct draws from 0 .. population-1, sorted, int64 [size].

    The result does not depend on the number of draws at a time. Requires size <= population / 2.
    """
    draws = math.ceil(-population * math.log1p(-size / population))  # gives `size` distinct values on average
    draws += 4 * math.isqrt(draws)
    values = np.empty(0, dtype=np.int64)
    while True:
        values = np.concatenate((values, (unit(source.random_raw(draws)) * population).astype(np.int64)))
        # Value and place in one integer: a sort groups equal values, the earliest first.
        bits = len(values).bit_length()
        keys = np.sort(values << bits | np.arange(len(values)))
        keys = keys[np.diff(keys >> bits, prepend=-1) != 0]
        if len(keys) >= size:
            break
    places = keys & ((1 << bits) - 1)
    return keys[places < np.sort(places)[size]] >> bits if len(keys) > size else keys >> bits
