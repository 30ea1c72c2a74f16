"""From logits to answers: choosing tokens and stopping, the same for every engine that keeps keys and values."""

import hashlib
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor


class NonFiniteLogits(Exception):
    """The model's logits are NaN or infinite: nothing can be chosen by them."""


class CachedBatch(Protocol):
    """A batch of sequences whose keys and values are kept from one call to the next."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Read the prompts. Logits [b, vocabulary] of the token after each."""

    def step(self, tokens: Tensor) -> Tensor:
        """Append one token each, int64 [b]. Logits [b, vocabulary] of the token after it."""


def generate(
    batch: CachedBatch,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop_ids: Collection[int],
    temperature: float,
    top_p: float,
    seeds: Sequence[int],
) -> list[list[int]]:
    """Return the continuation of each prompt, up to `max_new_tokens` or a stop token.

    The stop token is left out.

    Args:
        batch: runs the model on all prompts at once.
        prompts: token ids.
        max_new_tokens: of each prompt's continuation.
        stop_ids: token ids that end a continuation.
        temperature: 0 takes the likeliest token.
        top_p: a token is drawn from the likeliest ones that together have this probability.
        seeds: one for each prompt; what is drawn for it does not depend on the rest of the batch.

    Raises:
        NonFiniteLogits: a NaN or an infinite largest logit.
    """
    choose = _TokenSampler(temperature, top_p, seeds)
    outputs: list[list[int]] = [[] for _ in prompts]
    unfinished = set(range(len(prompts)))
    logits = batch.prefill(prompts)
    for step in range(max_new_tokens):
        # -inf is what padding of the vocabulary has; a NaN is the largest of any it stands among.
        if not logits.amax(-1).isfinite().all():
            raise NonFiniteLogits
        tokens = choose(logits)
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
    """The seed of one example's generator, from the run's seed and the example's name."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7])


class _TokenSampler:
    """logits [b, vocabulary] -> int64 [b]."""

    def __init__(self, temperature: float, top_p: float, seeds: Sequence[int]):
        self._temperature, self._top_p = temperature, top_p
        self._generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]

    def __call__(self, logits: Tensor) -> Tensor:
        if self._temperature == 0:
            return logits.argmax(-1)
        probabilities = torch.softmax(logits.double() / self._temperature, dim=-1)
        likeliest, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        upto = likeliest.cumsum(-1)
        # The likeliest token, and each whose likelier ones have less than top_p together.
        kept = upto - likeliest < self._top_p
        total = (likeliest * kept).sum(-1)
        uniform = torch.cat([torch.rand(1, generator=g, dtype=torch.float64) for g in self._generators])
        # Where the drawn share of what is kept falls in the running sum.
        place = (upto <= (uniform.to(upto.device) * total)[:, None]).sum(-1)
        place = torch.minimum(place, kept.sum(-1) - 1)
        return tokens.gather(-1, place[:, None]).squeeze(-1)
