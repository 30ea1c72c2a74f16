"""Base classes of the samplers: argument checks, and plans of one sample or many."""

import operator
from abc import ABC, abstractmethod
from bisect import bisect_right
from typing import Any

import numpy as np

from megatron_cream.positions.plan import Plan, Plans


class Integers:
    """Arithmetic for one sample, on Python numbers."""

    @staticmethod
    def where(condition, a, b):
        return a if condition else b

    @staticmethod
    def draw(u, low, high):
        """Return a uniform integer in low .. high, both included, from u in [0, 1)."""
        return low + int(u * (high - low + 1))

    rank = staticmethod(bisect_right)


class Arrays:
    """The same arithmetic for many samples, on numpy arrays."""

    where = staticmethod(np.where)

    @staticmethod
    def draw(u, low, high):
        return low + (u * (high - low + 1)).astype(np.int64)

    @staticmethod
    def rank(thresholds, u):
        return np.searchsorted(thresholds, u, side="right")


def as_integer(name: str, value: int, low: int = 0) -> int:
    """Return `value` as a Python integer in [low, 2**64), or raise ValueError with `name`."""
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
    """Base class of the samplers.

    A plan is a pure function of (seed, epoch, sample, document length).

    Args:
        window: N, the tokens of a sample.
        target: L, the window to extend to, a multiple of N; position ids are in [0, L).
        seed: an integer in [0, 2**64).

    Raises:
        ValueError: an argument is out of range. One line with the argument and the valid range.
    """

    name: str

    def __init__(self, window: int, target: int, seed: int = 0):
        window, target = as_integer("window", window, low=1), as_integer("target", target, low=1)
        if target < window or target % window:
            raise ValueError(f"target {target}: must be a multiple of window {window}")
        self.window, self.target, self.seed = window, target, as_integer("seed", seed)

    @property
    def sequence_length(self) -> int:
        """Tokens of a sample; a document must have as many or more."""
        return self.window

    @abstractmethod
    def plan(self, epoch: int, sample: int, document_length: int) -> Plan:
        """Return the plan of one sample: its tokens and positions.

        Args:
            epoch: integer in [0, 2**64), of Python or numpy.
            sample: as `epoch`.
            document_length: T, in tokens.

        Raises:
            ValueError: the document is shorter than `sequence_length`, or an argument is not such an integer.
        """

    def _check_arguments(self, epoch: int, sample: int, document_length: int) -> tuple[int, int, int]:
        """Return the arguments of `plan` as Python integers.

        numpy integers would overflow in the generator.
        """
        document_length = as_integer("document_length", document_length)
        self._check_length(document_length)
        return as_integer("epoch", epoch), as_integer("sample", sample), document_length

    def _check_length(self, document_length: int) -> None:
        if document_length < self.sequence_length:
            raise ValueError(
                f"document_length {document_length}: a {self.name} sample needs {self.sequence_length} tokens"
            )


class BlockSampler(Sampler):
    """A sampler of a few contiguous blocks; one formula computes one plan or many."""

    @abstractmethod
    def _blocks(self, math, epoch, sample, document_length) -> tuple[Any, Any, Any, Any]:
        """Return token starts, position starts and lengths of the blocks, and alpha or None.

        `math` is `Integers` or `Arrays`, and decides the type of the numbers.
        """

    def plan(self, epoch: int, sample: int, document_length: int) -> Plan:
        epoch, sample, document_length = self._check_arguments(epoch, sample, document_length)
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
            document_lengths: integers [n], or one integer for all samples.

        Raises:
            ValueError: as `plan`, for any sample.
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
