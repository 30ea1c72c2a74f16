"""Write random documents of more than 256K tokens: `python -m benchmarks.several_gpus.documents PREFIX`."""

import sys

import numpy as np

from megatron_cream.patches import platform

platform.setup()

import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

VOCABULARY = 32000
TOKENS = 300_000


def main() -> None:
    prefix = sys.argv[1]
    rng = np.random.default_rng(0)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(8):
        # Frequent and rare tokens, as in a text.
        tokens = np.minimum(rng.zipf(1.3, size=TOKENS), VOCABULARY - 2).astype(np.uint16)
        builder.add_document(torch.from_numpy(tokens.astype(np.int32)), [TOKENS])
    builder.finalize(f"{prefix}.idx")


if __name__ == "__main__":
    main()
