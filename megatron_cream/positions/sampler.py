"""What every sampler shares: its window and target, its checks, one plan or many from one formula."""

import operator
from abc import ABC, abstractmethod
from bisect import bisect_right
from typing import Any

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


def as_integer(name: str, value: int, low: int = 0) -> int:
    """`value` as a Python integer in [low, 2**64), or a ValueError that names it."""
    try:
        integer = operator.index(value)
    except TypeError:
        integer = -1
    if not low <= integer < 2**64:
        valid = f"{low} or more" if low else "in 0 .. 2**64 - 1"
        raise ValueError(f"{name} {value}: must be an integer, {valid}")
    return integer


def _as_integers(name: str, values) -> np.ndarray:
    array = np.asarray(values)
    if array.size and (array.dtype.kind not in "iu" or array.min() < 0):
        raise ValueError(f"{name}: must be integers in 0 .. 2**64 - 1")
    return array


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
        window, target = as_integer("window", window, low=1), as_integer("target", target, low=1)
        if target < window or target % window:
            raise ValueError(f"target {target}: must be a multiple of window {window}")
        self.window, self.target, self.seed = window, target, as_integer("seed", seed)

    @property
    def sequence_length(self) -> int:
        """Tokens of a sample; a document must have at least as many."""
        return self.window

    @abstractmethod
    def plan(self, epoch: int, sample: int, document_length: int) -> Plan:
        """Return tokens and positions of one visit of a document.

        Args:
            epoch: integer in [0, 2**64), Python's or numpy's.
            sample: as `epoch`.
            document_length: T, in tokens.

        Raises:
            ValueError: the document is shorter than `sequence_length`; an argument is no such integer.
        """

    def _checked(self, epoch: int, sample: int, document_length: int) -> tuple[int, int, int]:
        """The arguments of `plan` as Python integers: numpy's would overflow in the generator."""
        document_length = as_integer("document_length", document_length)
        self._check_length(document_length)
        return as_integer("epoch", epoch), as_integer("sample", sample), document_length

    def _check_length(self, document_length: int) -> None:
        if document_length < self.sequence_length:
            raise ValueError(
                f"document_length {document_length}: a {self.name} sample takes {self.sequence_length} tokens or more"
            )


class BlockSampler(Sampler):
    """A sampler of a few contiguous blocks, from one formula for one sample and for many."""

    @abstractmethod
    def _blocks(self, math, epoch, sample, document_length) -> tuple[Any, Any, Any, Any]:
        """Return token starts, position starts and lengths of the blocks, and alpha or None; in `math`'s numbers."""

    def plan(self, epoch: int, sample: int, document_length: int) -> Plan:
        epoch, sample, document_length = self._checked(epoch, sample, document_length)
        token_starts, position_starts, lengths, alpha = self._blocks(Integers, epoch, sample, document_length)
        if 0 in lengths:
            keep = [i for i, length in enumerate(lengths) if length]
            token_starts, position_starts, lengths = (
                [values[i] for i in keep] for values in (token_starts, position_starts, lengths)
            )
        return Plan(tuple(token_starts), tuple(position_starts), tuple(lengths), alpha)

    def plan_many(self, epoch: int, samples: np.ndarray, document_lengths: np.ndarray) -> Plans:
        """Return the block boundaries of many samples.

        Entry i equals `plan(epoch, samples[i], ..)`.

        Args:
            epoch: integer in [0, 2**64).
            samples: integers [n].
            document_lengths: integers [n], or one for all.

        Raises:
            ValueError: as `plan`, for any of them.
        """
        epoch = as_integer("epoch", epoch)
        samples = _as_integers("samples", samples).astype(np.uint64)
        lengths_ = np.broadcast_to(_as_integers("document_lengths", document_lengths).astype(np.int64), samples.shape)
        if len(lengths_):
            self._check_length(int(lengths_.min()))
        *rows, alpha = self._blocks(Arrays, epoch, samples, lengths_)
        columns = [
            np.stack([np.broadcast_to(np.asarray(v, dtype=np.int64), samples.shape) for v in row], axis=1)
            for row in rows
        ]
        tokens, positions, lengths = columns
        return Plans(tokens, positions, lengths, alpha)
