"""Micro-batches for the model chunks of an interleaved pipeline stage."""

from collections import deque
from collections.abc import Callable
from typing import Any


class SharedMicroBatches:
    """The micro-batches of this rank: its first chunk reads each one, and the later chunks get the same.

    Megatron gives every chunk its own data loader, so that each would read, copy to the GPU and rotate for itself what
    all have in common. A schedule runs the first chunk of a rank before the others for each micro-batch, and all chunks
    see the micro-batches in the same order.
    """

    def __init__(self):
        self._waiting: dict[int, deque] = {}

    def take(self, read: Callable[[], Any], chunk: int | None, chunks: int | None) -> Any:
        """Return the next micro-batch of a chunk.

        Args:
            read: reads the next micro-batch of this rank.
            chunk: index of the chunk among those of this rank; None without interleaved stages.
            chunks: their number.
        """
        if not chunk:
            batch = read()
            for later in range(1, chunks or 1):
                self._waiting.setdefault(later, deque()).append(batch)
            return batch
        return self._waiting[chunk].popleft()
