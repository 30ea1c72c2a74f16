"""The plan of one sample, or of many: its tokens and their positions."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Plan:
    """Contiguous blocks of a document's tokens and their position ids.

    token_starts: index in the document of each block's first token.
    position_starts: position id of each block's first token.
    lengths: number of tokens of each block, 1 or more.
    alpha: CREAM's scale of the middle, in {1, 1.5, .. target / window}; None for other samplers.
    """

    token_starts: tuple[int, ...]
    position_starts: tuple[int, ...]
    lengths: tuple[int, ...]
    alpha: float | None = None

    @cached_property
    def token_indices(self) -> np.ndarray:
        """Indices into the document's tokens, int64 [window]."""
        return _concatenate_ranges(self.token_starts, self.lengths)

    @cached_property
    def position_ids(self) -> np.ndarray:
        """Position ids, int64 [window], strictly increasing, in [0, target)."""
        return _concatenate_ranges(self.position_starts, self.lengths)

    @property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """((start, length), ...) of the blocks; start is a position id."""
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


def _concatenate_ranges(starts: tuple[int, ...], lengths: tuple[int, ...]) -> np.ndarray:
    if len(starts) == 1:
        return np.arange(starts[0], starts[0] + lengths[0], dtype=np.int64)
    out = np.empty(sum(lengths), dtype=np.int64)
    at = 0
    for start, length in zip(starts, lengths):
        out[at : at + length] = np.arange(start, start + length, dtype=np.int64)
        at += length
    return out
