"""Held-out perplexity by context length, inside a training job.

The same tokens are scored at every length, so that lengths can be compared: of each held-out document's
first max(lengths) tokens the last `scored` are predicted, from a context of n tokens that ends with them,
at positions 0 .. n-1. If a model cannot use positions beyond its window, its perplexity rises with n;
otherwise it does not.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_cream.data.long_documents import iterate_long_documents
from megatron_cream.evaluation.teacher_forced import ScoredText, score_texts


def read_held_out_documents(files: list[tuple[str, tuple[float, float]]], minimum: int, most: int) -> list[np.ndarray]:
    """Read the starts of up to `most` long documents, spread evenly over the files.

    Args:
        files: prefixes of .bin/.idx pairs, each with the held-out range of its documents as shares:
            (0.969, 0.999) for the validation part of Megatron's split 969,30,1.
        minimum: tokens to read of each document; shorter documents are skipped.
        most: maximum number of documents.

    Returns: int64 arrays [minimum]; an empty list if no document is long enough.
    """
    held_out = [(IndexedDataset(prefix), share) for prefix, share in files]

    def find_long() -> Iterator[tuple[IndexedDataset, np.ndarray]]:
        for dataset, share in held_out:
            first, last = (round(bound * len(dataset)) for bound in share)
            for numbers in iterate_long_documents(dataset.sequence_lengths, first, last, minimum):
                yield dataset, numbers

    count = sum(len(numbers) for _, numbers in find_long())
    chosen = np.unique(np.linspace(0, count - 1, num=min(most, count), dtype=np.int64))
    documents, at = [], 0
    for dataset, numbers in find_long():
        for i in numbers[chosen[(chosen >= at) & (chosen < at + len(numbers))] - at]:
            documents.append(dataset.get(int(i), offset=0, length=minimum).astype(np.int64))
        at += len(numbers)
    return documents


def measure_perplexity(
    model: list[torch.nn.Module], documents: list[np.ndarray], lengths: list[int], scored: int
) -> dict[int, float]:
    """Measure the perplexity of the scored tokens at each context length.

    Call it on every rank, under any TP x PP x CP x DP. Documents are distributed over the data-parallel
    ranks.

    Args:
        model: Megatron's model chunks, in evaluation mode.
        documents: int64 arrays [max(lengths)].
        lengths: context lengths in tokens, each larger than `scored`.
        scored: tokens to score at the end of each context.

    Returns: length -> perplexity, the same on every rank.
    """
    end = max(lengths)
    result = {}
    for length in lengths:
        texts = [ScoredText(document[end - length : end], first=length - scored) for document in documents]
        nll, count, _ = score_texts(model, texts, length).sum(dim=0).tolist()
        result[length] = math.exp(min(nll / count, 100.0))
    return result
