"""Randomised positions: N of 0 .. L-1 without replacement, sorted (Ruoss et al. 2023, arXiv 2305.16843)."""

import math
from dataclasses import dataclass

import numpy as np

from megatron_cream.positions.plan import Plan
from megatron_cream.positions.random import unit, words
from megatron_cream.positions.sampler import Integers, Sampler


@dataclass(frozen=True)
class RandposPlan:
    """As `Plan`, from the positions themselves: there are hundreds of blocks, rarely asked for."""

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

    def plan(self, epoch: int, sample: int, document_length: int) -> Plan | RandposPlan:
        self._check_length(document_length)
        first, *key = words(self.seed, epoch, sample)
        generator = np.random.Generator(np.random.Philox(key=key[:2]))
        start = Integers.draw(unit(first), 0, document_length - self.window)
        return RandposPlan(
            token_indices=np.arange(start, start + self.window),
            position_ids=_sorted_subset(generator, self.target, self.window),
        )


def _sorted_subset(generator: np.random.Generator, population: int, size: int) -> np.ndarray:
    """`size` of 0 .. population-1, every subset equally likely, sorted; int64.

    Sorting draws with replacement and dropping what is too many is faster than numpy's
    `choice`: the distinct values of any number of draws are a uniform subset, and so is a
    uniform subset of those.
    """
    if 2 * size > population:
        return np.sort(generator.choice(population, size, replace=False, shuffle=False))
    draws = math.ceil(-population * math.log1p(-size / population))  # gives `size` distinct ones, on average
    draws += 4 * math.isqrt(draws)
    while True:
        values = np.sort(generator.integers(0, population, size=draws, dtype=np.int32))
        values = values[np.concatenate(([True], values[1:] != values[:-1]))]
        extra = len(values) - size
        if extra >= 0:
            break
    keep = np.ones(len(values), dtype=bool)
    keep[generator.choice(len(values), extra, replace=False, shuffle=False)] = False
    return values[keep].astype(np.int64)
