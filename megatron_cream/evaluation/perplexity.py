"""Held-out perplexity against the length of the context, inside a training job.

The same tokens are scored at every length, so the lengths compare: for each held-out
document, the last `scored` of its first max(lengths) tokens are predicted from a context
that ends there and is n tokens long, at positions 0 .. n-1. A model that cannot use
positions beyond its window does worse as n grows; one that can does no worse.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_cream.data.long_documents import iterate_long_documents
from megatron_cream.evaluation.teacher_forced import ScoredText, score_texts


def read_held_out_documents(files: list[tuple[str, tuple[float, float]]], minimum: int, most: int) -> list[np.ndarray]:
    """The first `minimum` tokens of up to `most` documents that have as many, spread over the files.

    Args:
        files: prefixes of .bin/.idx pairs, each with the share of its documents that is held
            out: (0.969, 0.999) for the validation part of Megatron's split 969,30,1.
        minimum: tokens of each document.
        most: documents in all.

    Returns: int64 arrays [minimum]; empty where no document is long enough.
    """
    held_out = [(IndexedDataset(prefix), share) for prefix, share in files]

    def long() -> Iterator[tuple[IndexedDataset, np.ndarray]]:
        for dataset, share in held_out:
            first, last = (round(bound * len(dataset)) for bound in share)
            for numbers in iterate_long_documents(dataset.sequence_lengths, first, last, minimum):
                yield dataset, numbers

    count = sum(len(numbers) for _, numbers in long())
    chosen = np.unique(np.linspace(0, count - 1, num=min(most, count), dtype=np.int64))
    documents, at = [], 0
    for dataset, numbers in long():
        for i in numbers[chosen[(chosen >= at) & (chosen < at + len(numbers))] - at]:
            documents.append(dataset.get(int(i), offset=0, length=minimum).astype(np.int64))
        at += len(numbers)
    return documents


def measure_perplexity(
    model: list[torch.nn.Module], documents: list[np.ndarray], lengths: list[int], scored: int
) -> dict[int, float]:
    """exp of the mean negative log-likelihood of the scored tokens, for each context length.

    Runs on every rank, under any TP x PP x CP x DP; documents are shared out over the
    data-parallel ranks.

    Args:
        model: Megatron's model chunks, in evaluation mode.
        documents: int64 [max(lengths)] each.
        lengths: context lengths, in tokens; each more than `scored`.
        scored: tokens scored at the end of each context.

    Returns: perplexity for each length, the same on every rank.
    """
    end = max(lengths)
    result = {}
    for length in lengths:
        texts = [ScoredText(document[end - length : end], first=length - scored) for document in documents]
        nll, count, _ = score_texts(model, texts, length).sum(dim=0).tolist()
        result[length] = math.exp(min(nll / count, 100.0))
    return result
