"""LongPPL: perplexity over the tokens that need the long context (L. Fang and others, arXiv 2410.23771).

A token is a key token if both hold: the long context raises its natural log-probability by more than
alpha over a short context (LSD > alpha), and its log-probability with the long context is above beta
(LCL > beta). The paper uses alpha 2, beta -2, a short context of 4096 tokens and blocks of 1024
tokens that share a short context, so each token's short context has 4096 to 5119 tokens. Tokens
before the 4097th are never key tokens.

As in the authors' code, key tokens are found in the text with the tokenizer's BOS and scored in the text without it.
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
    """The rule that decides which tokens are key tokens; the defaults are the paper's.

    alpha: minimum gain in log-probability from the long context.
    beta: minimum log-probability with the long context.
    short_context: tokens of the short context.
    block: tokens that share one short context.
    """

    alpha: float = 2.0
    beta: float = -2.0
    short_context: int = 4096
    block: int = 1024


def find_key_tokens(model: LanguageModel, tokens: Sequence[int], long: Tensor, rule: KeyTokenRule) -> Tensor:
    """Return a mask of the key tokens among tokens[1:]: bool [n - 1].

    Args:
        model: computes the log-probabilities with the short context.
        tokens: ids of a document's n tokens.
        long: float32 [n - 1], log-probabilities of tokens[1:] with the long context.
        rule: decides which tokens are key tokens.
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
    """Return the character spans (start, end) of the key tokens that another model finds.

    Adjacent spans are joined.

    Args:
        model: the other model; it reads the same text with its own tokenizer.
        document: the text to read.
        tokenizer: the tokenizer that made the document's tokens.
        rule: decides which tokens are key tokens.
    """
    own_tokenizer = model.tokenizer
    text = document.text[: _find_token_spans(tokenizer, document.text, len(document.tokens))[-1][1]]
    tokens = own_tokenizer.encode_prompt(text)
    long = model.log_probs(torch.tensor([tokens]), 1)[0]
    is_key = find_key_tokens(model, tokens, long, rule).tolist()
    found: list[tuple[int, int]] = []
    for key, (start, end) in zip(is_key, _find_token_spans(own_tokenizer, text, len(tokens))[1:], strict=True):
        if key and found and found[-1][1] >= start:  # tokens of one character's bytes share its span
            found[-1] = (found[-1][0], end)
        elif key:
            found.append((start, end))
    return found


def find_tokens_in_spans(document: Document, tokenizer: ModelTokenizer, key: Sequence[tuple[int, int]]) -> Tensor:
    """Return a mask of the tokens after the first that lie entirely in a span: bool [n - 1].

    Args:
        document: a document of n tokens.
        tokenizer: the tokenizer that made the document's tokens.
        key: character spans, in order and without overlap.
    """

    def is_inside(start: int, end: int) -> bool:
        place = bisect_right(starts, start) - 1
        return place >= 0 and start < end <= key[place][1]

    starts = [start for start, _ in key]
    spans = _find_token_spans(tokenizer, document.text, len(document.tokens))[1:]
    return torch.tensor([is_inside(*span) for span in spans], dtype=torch.bool)


def _find_token_spans(tokenizer: ModelTokenizer, text: str, count: int) -> list[tuple[int, int]]:
    """Return the character spans of a text's first `count` tokens; (0, 0) for a BOS."""
    bos = [] if tokenizer.bos is None else [(0, 0)]
    return [*bos, *tokenizer.token_spans(text)][:count]
