"""Time what a micro-batch from a data loader costs the training process: python benchmarks/data_loader.py

Compares tensors, as torch's loader sends them, with the pipe of megatron_cream/data/transport.py. Counted is the
processor time of the training process, without that of the workers; needs no GPU.
"""

import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # not this folder: its profile.py hides the standard library's

import numpy as np
import torch

from megatron_cream.data.transport import ThroughPipe

COUNT = 400


class Samples(torch.utils.data.Dataset):
    """Samples with the fields and the sizes of `LongDocumentDataset`."""

    def __init__(self, tokens: int):
        self.tokens = tokens

    def __len__(self) -> int:
        return 10**9

    def __getitem__(self, i: int) -> dict:
        ids = np.arange(self.tokens)
        mask = np.ones(self.tokens, dtype=np.float32)
        return dict(tokens=ids, labels=ids, loss_mask=mask, position_ids=ids, sample=np.int64(i), document=np.int64(i))


def main() -> None:
    torch.set_num_threads(1)
    print("| tokens | samples of a micro-batch | tensors, ms | through a pipe, ms |\n|---|---|---|---|")
    for tokens, size in ((4096, 1), (4096, 8), (8192, 4), (32768, 1)):
        as_tensors, through_pipe = (measure(data, size) for data in (Samples(tokens), ThroughPipe(Samples(tokens))))
        print(f"| {tokens:,} | {size} | {as_tensors:.2f} | {through_pipe:.2f} |", flush=True)


def measure(dataset, size: int) -> float:
    """Return the milliseconds of processor time for each micro-batch."""
    batches = iter(torch.utils.data.DataLoader(dataset, batch_size=size, num_workers=1, shuffle=False))
    for _ in range(10):
        next(batches)
    began = time.process_time()
    for _ in range(COUNT):
        next(batches)
    return (time.process_time() - began) / COUNT * 1000


if __name__ == "__main__":
    main()
