"""Generation from logits: chooses tokens and stops, in the same way for every engine with a key-value cache."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor


class NonFiniteLogits(Exception):
    """The model's logits are NaN or infinite, so no token can be chosen."""


class CachedBatch(Protocol):
    """A batch of sequences with a key-value cache that persists between calls."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts; return the logits [b, vocabulary] of the next tokens."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token per sequence, int64 [b]; return the next logits [b, vocabulary]."""


def generate(
    batch: CachedBatch,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop_ids: Collection[int],
    temperature: float,
    top_p: float,
    seeds: Sequence[int],
    agree: Callable[[Tensor], Tensor] | None = None,
) -> list[list[int]]:
    """Return the continuation of each prompt, up to `max_new_tokens` or a stop token.

    Continuations do not include the stop token.

    Args:
        batch: runs the model on all prompts at once.
        prompts: token ids of each prompt.
        max_new_tokens: maximum tokens of a continuation.
        stop_ids: token ids that end a continuation.
        temperature: sampling temperature; 0 takes the likeliest token.
        top_p: sample from the likeliest tokens that together have this probability.
        seeds: one seed per prompt; its samples do not depend on the rest of the batch.
        agree: makes the chosen tokens, int64 [b], the same on all ranks that run the model.

    Raises:
        NonFiniteLogits: a logit is NaN, or the largest one is infinite.
    """
    choose = _TokenSampler(temperature, top_p, seeds)
    outputs: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    logits = batch.prefill(prompts)
    for step in range(max_new_tokens):
        # Padding of the vocabulary has -inf, so only the maximum is checked; a NaN becomes the maximum.
        if not logits.amax(-1).isfinite().all():
            raise NonFiniteLogits
        tokens = choose(logits)
        if agree:
            tokens = agree(tokens)
        for i, token in enumerate(tokens.tolist()):
            if token in stop_ids:
                unfinished.discard(i)
            elif i in unfinished:
                outputs[i].append(token)
        if not unfinished or step == max_new_tokens - 1:
            break
        logits = batch.step(tokens)
    return outputs


def derive_seed(seed: int, name: str) -> int:
    """Derive the seed of one example from the run's seed and the example's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7])


class _TokenSampler:
    """Chooses one token per sequence: logits [b, vocabulary] -> int64 [b]."""

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int]):
        self._temperature, self._top_p = temperature, top_p
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor) -> Tensor:
        if self._temperature == 0:
            return logits.argmax(-1)
        probabilities = torch.softmax(logits.double() / self._temperature, dim=-1)
        likeliest, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        cumulative = likeliest.cumsum(-1)
        # Keep a token if the likelier ones together have less than top_p; this always keeps the likeliest.
        kept = cumulative - likeliest < self._top_p
        total = (likeliest * kept).sum(-1)
        uniform = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in self._generators])
        # Find the token whose interval of the cumulative sum contains the sample.
        place = (cumulative <= (uniform.to(cumulative.device) * total)[:, None]).sum(-1)
        place = torch.minimum(place, kept.sum(-1) - 1)
        return tokens.gather(-1, place[:, None]).squeeze(-1)
