"""LongPPL: perplexity over the tokens that need the long context (L. Fang and others, arXiv 2410.23771).

A token is a key token if the long context makes it likelier, by more than alpha in natural
logarithm, than a short context does (LSD > alpha), and if it is likely enough with the long one
(LCL > beta). The paper's values are alpha 2 and beta -2, a short context of 4096 tokens, and 1024
tokens that share one: each token's short context has from 4096 to 5119 tokens. Tokens before the
4097th are never key tokens.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_cream.evaluation.models.language_model import LanguageModel
from megatron_cream.evaluation.models.tokenizer import ModelTokenizer
from megatron_cream.evaluation.sliding_window import Document


@dataclass(frozen=True)
class KeyTokenRule:
    """alpha, beta: bounds of the gain, and of the log-probability.  short_context, block: in tokens."""

    alpha: float = 2.0
    beta: float = -2.0
    short_context: int = 4096
    block: int = 1024


def find_key_tokens(model: LanguageModel, tokens: Sequence[int], long: Tensor, rule: KeyTokenRule) -> Tensor:
    """Return which tokens but the first are key tokens: bool [n - 1].

    Args:
        model: computes the log-probabilities with the short context.
        tokens: ids of a document's n tokens.
        long: float32 [n - 1], log-probabilities of tokens[1:] with the long context.
        rule: decides what is a key token.
    """
    ids = torch.tensor([tokens])
    result = torch.zeros(len(tokens) - 1, dtype=torch.bool)
    for begin in range(0, len(tokens) - rule.short_context, rule.block):
        first = begin + rule.short_context
        end = min(first + rule.block, len(tokens))
        short = model.log_probs(ids[:, begin:end], rule.short_context)[0]
        given_long = long[first - 1 : end - 1]
        result[first - 1 : end - 1] = (given_long - short > rule.alpha) & (given_long > rule.beta)
    return result


def find_key_spans(
    model: LanguageModel, document: Document, tokenizer: ModelTokenizer, rule: KeyTokenRule
) -> list[tuple]:
    """Return the characters (start, end) of a document's key tokens by another model.

    Spans that touch are joined.

    Args:
        model: the other model.
        document: whose text is read.
        tokenizer: of the document's tokens; the other model reads the same text with its own.
        rule: decides what is a key token.
    """
    mine = model.tokenizer
    text = document.text[: _find_token_spans(tokenizer, document.text, len(document.tokens))[-1][1]]
    tokens = mine.encode_prompt(text)
    long = model.log_probs(torch.tensor([tokens]), 1)[0]
    is_key = find_key_tokens(model, tokens, long, rule).tolist()
    found: list[tuple[int, int]] = []
    for key, (start, end) in zip(is_key, _find_token_spans(mine, text, len(tokens))[1:], strict=True):
        if key and found and found[-1][1] >= start:  # tokens of parts of one character share its span
            found[-1] = (found[-1][0], end)
        elif key:
            found.append((start, end))
    return found


def find_tokens_in_spans(document: Document, tokenizer: ModelTokenizer, key: Sequence[tuple[int, int]]) -> Tensor:
    """Return which tokens but the first lie whole within a span: bool [n - 1].

    Args:
        document: of n tokens.
        tokenizer: of the document's tokens.
        key: spans of characters in order, without overlap.
    """

    def inside(start: int, end: int) -> bool:
        place = bisect_right(starts, start) - 1
        return place >= 0 and start < end <= key[place][1]

    starts = [start for start, _ in key]
    spans = _find_token_spans(tokenizer, document.text, len(document.tokens))[1:]
    return torch.tensor([inside(*span) for span in spans], dtype=torch.bool)


def _find_token_spans(tokenizer: ModelTokenizer, text: str, count: int) -> list[tuple[int, int]]:
    """The characters of the first `count` tokens of a text; a BOS has none."""
    bos = [] if tokenizer.bos is None else [(0, 0)]
    return [*bos, *tokenizer.token_spans(text)][:count]
