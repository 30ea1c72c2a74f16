"""The samples of the newest step, for the error report if the step fails."""

import numpy as np
import torch
from torch import Tensor


class RecentSamples:
    """The micro-batches that this rank read for the newest step."""

    def __init__(self):
        self._step, self._batches = -1, []

    def add(self, step: int, batch: dict[str, Tensor]) -> None:
        """Record a micro-batch of `LongDocumentDataset` samples or of a blend's samples."""
        if step != self._step:
            self._step, self._batches = step, []
        kept = ("sample", "document", "dataset_id", "position_ids")
        # Copies: a tensor in shared memory keeps a file open, and a step may have a thousand micro-batches. By numpy,
        # which starts no threads: the GPU waits for the first micro-batch of a step.
        self._batches.append({name: torch.from_numpy(batch[name].numpy().copy()) for name in kept if name in batch})

    def lines(self, step: int) -> list[str]:
        """Return a line for each sample of a step: its number, its document and its position ids."""
        return [_line(batch, i) for batch in self._batches if self._step == step for i in range(len(batch["sample"]))]


def _line(batch: dict[str, Tensor], i: int) -> str:
    blend = f"data set {int(batch['dataset_id'][i])}, " if "dataset_id" in batch else ""
    ids = batch["position_ids"][i].numpy()
    runs = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1)
    places = " ".join(f"{run[0]}-{run[-1]}" for run in runs[:8]) + (" ..." if len(runs) > 8 else "")
    return f"{blend}sample {int(batch['sample'][i])}, document {int(batch['document'][i])}, positions {places}"
