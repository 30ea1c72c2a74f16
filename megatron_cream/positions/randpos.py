"""Randomised positions: N of 0 .. L-1 without replacement, sorted (Ruoss et al. 2023, arXiv 2305.16843)."""

import math
from dataclasses import dataclass

import numpy as np

from megatron_cream.positions.random import unit, word_source, words
from megatron_cream.positions.sampler import Integers, Sampler


@dataclass(frozen=True, eq=False)
class RandposPlan:
    """As `positions.plan.Plan`, from the positions themselves: there are hundreds of blocks, rarely asked for."""

    token_indices: np.ndarray
    position_ids: np.ndarray
    alpha: None = None

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """((start, length), ...): the runs of consecutive positions."""
        breaks = np.flatnonzero(np.diff(self.position_ids) != 1) + 1
        edges = np.concatenate(([0], breaks, [len(self.position_ids)]))
        return tuple(zip(self.position_ids[edges[:-1]].tolist(), np.diff(edges).tolist()))


class RandposSampler(Sampler):
    """Contiguous tokens from a uniformly drawn place of the document, at random positions."""

    name = "randpos"

    def plan(self, epoch: int, sample: int, document_length: int) -> RandposPlan:
        epoch, sample, document_length = self._checked(epoch, sample, document_length)
        start = Integers.draw(unit(words(self.seed, epoch, sample)[0]), 0, document_length - self.window)
        source = word_source(self.seed, epoch, sample, stream=2)
        return RandposPlan(
            token_indices=np.arange(start, start + self.window, dtype=np.int64),
            position_ids=_sorted_subset(source, self.target, self.window),
        )


def _sorted_subset(source: np.random.Philox, population: int, size: int) -> np.ndarray:
    """`size` of 0 .. population-1, every subset equally likely, sorted; int64."""
    if 2 * size <= population:
        return _first_distinct(source, population, size)
    # Most are taken: draw those left out, instead of waiting for the last few to come up.
    keep = np.ones(population, dtype=bool)
    keep[_first_distinct(source, population, population - size)] = False
    return np.flatnonzero(keep)


def _first_distinct(source: np.random.Philox, population: int, size: int) -> np.ndarray:
    """The first `size` distinct values of an endless row of uniform draws of 0 .. population-1, sorted; int64.

    How many are drawn at a time does not matter to the result. size <= population / 2.
    """
    draws = math.ceil(-population * math.log1p(-size / population))  # gives `size` distinct ones, on average
    draws += 4 * math.isqrt(draws)
    values = np.empty(0, dtype=np.int64)
    while True:
        values = np.concatenate((values, (unit(source.random_raw(draws)) * population).astype(np.int64)))
        # Value and place in one integer: one sort brings equal values together, the earliest first.
        bits = len(values).bit_length()
        keys = np.sort(values << bits | np.arange(len(values)))
        keys = keys[np.diff(keys >> bits, prepend=-1) != 0]
        if len(keys) >= size:
            break
    places = keys & ((1 << bits) - 1)
    return keys[places < np.sort(places)[size]] >> bits if len(keys) > size else keys >> bits
