"""What every sampler shares: its window and target, its checks, one plan or many from one formula."""

from abc import ABC, abstractmethod
from bisect import bisect_right

import numpy as np

from megatron_cream.positions.plan import Plan, Plans


class Integers:
    """The arithmetic of one sample, in Python numbers."""

    @staticmethod
    def where(condition, a, b):
        return a if condition else b

    @staticmethod
    def draw(u, low, high):
        """A uniform integer of low .. high, both included, from u in [0, 1)."""
        return low + int(u * (high - low + 1))

    rank = staticmethod(bisect_right)


class Arrays:
    """The same for many samples, in numpy arrays."""

    where = staticmethod(np.where)

    @staticmethod
    def draw(u, low, high):
        return low + (u * (high - low + 1)).astype(np.int64)

    @staticmethod
    def rank(thresholds, u):
        return np.searchsorted(thresholds, u, side="right")


class Sampler(ABC):
    """Base of the samplers. A plan is a pure function of (seed, epoch, sample, document length).

    Args:
        window: N, tokens of a sample.
        target: L, the window to extend to, a multiple of N; position ids lie in [0, L).
        seed: any integer in [0, 2**64).

    Raises:
        ValueError: an argument is out of range; one line says which, and what would be right.
    """

    name: str

    def __init__(self, window: int, target: int, seed: int = 0):
        if window < 1:
            raise ValueError(f"window {window}: must be 1 or more")
        if target < window or target % window:
            raise ValueError(f"target {target}: must be a multiple of window {window}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed {seed}: must be in 0 .. 2**64 - 1")
        self.window, self.target, self.seed = window, target, seed

    @property
    def sequence_length(self) -> int:
        """Tokens of a sample; a document must have at least as many."""
        return self.window

    @abstractmethod
    def plan(self, epoch: int, sample: int, document_length: int) -> Plan:
        """Tokens and positions of one visit of a document.

        Raises:
            ValueError: the document is shorter than `sequence_length`.
        """

    def _check_length(self, document_length: int) -> None:
        if document_length < self.sequence_length:
            raise ValueError(
                f"document_length {document_length}: a {self.name} sample takes {self.sequence_length} tokens or more"
            )


class BlockSampler(Sampler):
    """A sampler of a few contiguous blocks, from one formula for one sample and for many."""

    @abstractmethod
    def _blocks(self, math, epoch, sample, document_length):
        """(token starts, position starts, lengths) of the blocks, and alpha or None; in `math`'s numbers."""

    def plan(self, epoch: int, sample: int, document_length: int) -> Plan:
        self._check_length(document_length)
        token_starts, position_starts, lengths, alpha = self._blocks(Integers, epoch, sample, document_length)
        if 0 in lengths:
            keep = [i for i, length in enumerate(lengths) if length]
            token_starts, position_starts, lengths = (
                [values[i] for i in keep] for values in (token_starts, position_starts, lengths)
            )
        return Plan(tuple(token_starts), tuple(position_starts), tuple(lengths), alpha)

    def plan_many(self, epoch: int, samples: np.ndarray, document_lengths: np.ndarray) -> Plans:
        """The block boundaries of many samples at once; entry i equals `plan(epoch, samples[i], ..)`.

        Args:
            samples: integers [n].
            document_lengths: integers [n], or one for all.
        """
        samples = np.asarray(samples)
        lengths_ = np.broadcast_to(np.asarray(document_lengths, dtype=np.int64), samples.shape)
        if len(lengths_):
            self._check_length(int(lengths_.min()))
        *rows, alpha = self._blocks(Arrays, epoch, samples.astype(np.uint64), lengths_)
        columns = [
            np.stack([np.broadcast_to(np.asarray(v, dtype=np.int64), samples.shape) for v in row], axis=1)
            for row in rows
        ]
        return Plans(*columns, alpha)
