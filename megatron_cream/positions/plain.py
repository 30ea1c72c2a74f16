"""Samplers of consecutive positions 0 .. n-1: position interpolation, and full-length training."""

from megatron_cream.positions.random import unit, words
from megatron_cream.positions.sampler import BlockSampler


class PiSampler(BlockSampler):
    """N consecutive tokens from a random place, at positions 0 .. N-1 (Chen et al. 2023)."""

    name = "pi"

    def _blocks(self, math, epoch, sample, document_length):
        n = self.sequence_length
        start = math.draw(unit(words(self.seed, epoch, sample)[0]), 0, document_length - n)
        return (start,), (0 * start,), (n + 0 * start,), None


class FullSampler(PiSampler):
    """L consecutive tokens at positions 0 .. L-1: training at the full target length."""

    name = "full"

    @property
    def sequence_length(self) -> int:
        return self.target
