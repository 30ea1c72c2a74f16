"""PoSE: positional skip-wise training (Zhu et al. 2023, arXiv 2309.10400): text chunks and position skips.

Two chunks follow the authors' released code, more chunks follow the paper's section 3.2:

| quantity | drawn |
|---|---|
| tokens of chunk i | uniform in 1 .. (R + 1) // C; R tokens and C chunks remain. For two: 1 .. (N + 1) // 2 |
| tokens of the last chunk | all remaining tokens |
| skip of positions before chunk i | uniform from the previous skip (first: 0) .. L - N |
| gap in the document before chunk i | uniform from the previous gap (first: 0) .. T - N |
"""

from megatron_cream.positions.random import unit, words
from megatron_cream.positions.sampler import BlockSampler, as_integer

_FIRST_STREAM = 16
"""Random stream of the third chunk; later chunks use the next ones. The second chunk uses stream 0."""


class PoseSampler(BlockSampler):
    """The PoSE sampler; see the module's docstring, and `Sampler` for window, target and seed.

    Args:
        chunks: number of contiguous chunks in a sample, 2 or more; 2 in the paper's experiments.
    """

    name = "pose"

    def __init__(self, window: int, target: int, seed: int = 0, chunks: int = 2):
        super().__init__(window, target, seed)
        self.chunks = as_integer("chunks", chunks, low=2)
        if self.chunks > max(window, 2):
            raise ValueError(f"chunks {chunks}: must be at most the window, {window} tokens")

    def _blocks(self, math, epoch, sample, document_length):
        n = self.window
        zero = 0 * document_length
        begin = skip = gap = zero
        token_starts, position_starts, lengths = [zero], [zero], []
        for remaining in range(self.chunks, 1, -1):
            stream = 0 if remaining == self.chunks else _FIRST_STREAM + self.chunks - remaining
            split, skip_word, gap_word, _ = map(unit, words(self.seed, epoch, sample, stream))
            length = math.draw(split, 1, (n - begin + 1) // remaining)
            skip = math.draw(skip_word, skip, self.target - n)
            gap = math.draw(gap_word, gap, document_length - n)
            begin = begin + length
            lengths.append(length)
            token_starts.append(begin + gap)
            position_starts.append(begin + skip)
        lengths.append(n - begin)
        return token_starts, position_starts, lengths, None
