"""What a sampler decides about one sample, or about many."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Contiguous blocks of a document's tokens, and the positions each is trained at.

    token_starts: where each block begins in the document.
    position_starts: the position id of its first token.
    lengths: its number of tokens, 1 or more.
    alpha: CREAM's scale of the middle, in {1, 1.5, .. target / window}; None for other samplers.
    """

    token_starts: tuple[int, ...]
    position_starts: tuple[int, ...]
    lengths: tuple[int, ...]
    alpha: float | None = None

    @cached_property
    def token_indices(self) -> np.ndarray:
        """int64 [window]: indices into the document's tokens."""
        return _concatenated(self.token_starts, self.lengths)

    @cached_property
    def position_ids(self) -> np.ndarray:
        """int64 [window]: strictly increasing, in [0, target)."""
        return _concatenated(self.position_starts, self.lengths)

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """((start, length), ...) of the blocks, in position ids."""
        return tuple(zip(self.position_starts, self.lengths))


@dataclass(frozen=True)
class Plans:
    """The plans of n samples, as arrays; a block may have length 0.

    token_starts, position_starts, lengths: int64 [n, blocks].
    alpha: float64 [n], or None.
    """

    token_starts: np.ndarray
    position_starts: np.ndarray
    lengths: np.ndarray
    alpha: np.ndarray | None

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> Plan:
        keep = self.lengths[i] > 0
        rows = (self.token_starts[i], self.position_starts[i], self.lengths[i])
        return Plan(
            *(tuple(row[keep].tolist()) for row in rows), alpha=None if self.alpha is None else float(self.alpha[i])
        )


def _concatenated(starts: tuple[int, ...], lengths: tuple[int, ...]) -> np.ndarray:
    if len(starts) == 1:
        return np.arange(starts[0], starts[0] + lengths[0], dtype=np.int64)
    out = np.empty(sum(lengths), dtype=np.int64)
    at = 0
    for start, length in zip(starts, lengths):
        out[at : at + length] = np.arange(start, start + length, dtype=np.int64)
        at += length
    return out
