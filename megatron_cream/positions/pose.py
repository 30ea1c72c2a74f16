"""PoSE: positional skip-wise training (Zhu et al. 2023, arXiv 2309.10400), two chunks."""

from megatron_cream.positions.random import unit, words
from megatron_cream.positions.sampler import BlockSampler


class PoseSampler(BlockSampler):
    """The first chunk at position 0, the second shifted by u of [0, L - N].

    The first chunk has 1 .. N-1 tokens, uniformly, from the document's start; the second
    follows after a gap of 0 .. T-N tokens of the document, uniformly.
    """

    name = "pose"

    def _blocks(self, math, epoch, sample, document_length):
        n = self.window
        split, shift, gap, _ = map(unit, words(self.seed, epoch, sample))
        first = math.draw(split, 1, n - 1) if n > 1 else 1 + 0 * document_length
        shift = math.draw(shift, 0, self.target - n)
        gap = math.draw(gap, 0, document_length - n)
        return (0 * first, first + gap), (0 * first, first + shift), (first, n - first), None
