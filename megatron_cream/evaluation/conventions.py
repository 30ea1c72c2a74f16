"""Definitions of "perplexity at a context of W tokens": this project's, the CREAM authors' and PoSE's.

A document is tokens[0] = BOS and its text's tokens after it. The three agree where a document has at most W tokens.

ours: a window of W tokens of context slides by the stride; the BOS is read in the first window only.
cream: the first W - 1 tokens of the text after the BOS, in one window; nothing beyond them is scored.
pose: a BOS and W - 1 tokens of the text; the window slides by the stride, and each later one has a BOS of its own.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_cream.evaluation import sliding_window
from megatron_cream.evaluation.models.language_model import LanguageModel

CONVENTIONS = ("ours", "cream", "pose")


def iterate_contexts(
    convention: str, tokens: Sequence[int], window: int, stride: int
) -> Iterator[tuple[list[int], int]]:
    """Yield (ids, start) of each window: ids[start:] are scored, each given all before it.

    Args:
        convention: of CONVENTIONS.
        tokens: of a document; for cream and pose the first is a BOS.
        window: tokens of the context; 2 or more for cream and pose.
        stride: 1 to `window`, for pose 1 to window - 1; cream has none.
    """
    tokens, bos = list(tokens), list(tokens[:1])
    if convention == "cream":
        yield tokens[:window], 1
    elif convention == "pose":
        for begin, first, end in sliding_window.iterate_windows(len(tokens), window - 1, stride):
            yield bos + tokens[begin + 1 : end], first - begin
    else:
        for begin, first, end in sliding_window.iterate_windows(len(tokens), window, stride):
            yield tokens[begin:end], first - begin


def log_probs(convention: str, model: LanguageModel, tokens: Sequence[int], window: int, stride: int) -> Tensor:
    """Return the natural log-probabilities of the scored tokens: float32, in the order of the text.

    See `iterate_contexts` for the arguments.
    """
    parts = [
        model.log_probs(torch.tensor([ids]), start)[0]
        for ids, start in iterate_contexts(convention, tokens, window, stride)
    ]
    return torch.cat([torch.empty(0), *parts])
