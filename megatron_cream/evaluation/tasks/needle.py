"""Needle in a Haystack: one fact hidden in long filler, with a question about it at the end.

Published: G. Kamradt's test (github.com/gkamradt/LLMTest_NeedleInAHaystack) puts a fact about San Francisco
at the start of a sentence, at a given depth of essays, and a language model grades the answer. CREAM's paper
uses that fact at 10 lengths from 1,024 to 32,700 tokens by 6 depths, with an answer of up to 50 tokens, and
its released code grades by ROUGE-L. Here these are the kind `sandwich` and `rouge_l`.

Different here: the default fact is a random number of a random city (`number`). It needs no judge, no model
has seen the answer in training, and the examples of a cell differ. `score` is the share of the answer's key
words that are in the output; for a number it is 0 or 1.
"""

import random
import re
from collections.abc import Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np

from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation.tasks import longbench_metrics
from megatron_cream.evaluation.tasks.filler import Haystack, fit, load_sentences
from megatron_cream.evaluation.tasks.task import Draft, Example, Tokenizer

MAX_NEW_TOKENS = 50
KINDS = ("number", "sandwich")
"""Kinds of needle."""

_INTRODUCTION = "An important fact is hidden in the text below. Find it and remember it: you will be asked about it.\n"
_CITIES = (
    "Lisbon Nairobi Oslo Lima Kyoto Cairo Quito Riga Perth Lagos Turin Hanoi Dakar Bergen Cork Tunis Sofia Porto "
    "Malmo Leeds Basel Tampa Zagreb Adelaide Montevideo"
).split()
_SANDWICH = "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day."
_SANDWICH_WORDS = ("eat", "sandwich", "sit", "Dolores", "Park", "sunny", "day")


def build_grid(minimum: int, maximum: int, count: int, depths: int) -> tuple[list[int], list[float]]:
    """Return evenly spaced lengths, and evenly spaced depths from 0 to 1.

    Args:
        minimum: shortest length in tokens.
        maximum: longest length in tokens.
        count: number of lengths.
        depths: number of depths.

    Raises:
        UsageError: a count is below 1, or `minimum` is not between 1 and `maximum`.
    """
    if not 0 < minimum <= maximum or count < 1 or depths < 1:
        raise UsageError(
            f"{count} lengths from {minimum} to {maximum} by {depths} depths: give at least one length and one depth, "
            "and the shortest length first"
        )
    lengths = np.linspace(minimum, maximum, count).astype(int).tolist()
    return sorted(set(lengths)), np.linspace(0, 1, depths).tolist()


def examples(tokenizer: Tokenizer, **options) -> Iterator[Example]:
    """Yield the examples of `drafts`, which has the arguments."""
    for draft in drafts(tokenizer, **options):
        yield draft.build()


def drafts(
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    seed: int = 0,
    per_cell: int = 1,
    needle: str = "number",
    haystack: Path | None = None,
) -> Iterator[Draft]:
    """Yield `per_cell` examples for each length and depth, not built yet.

    Args:
        tokenizer: the model's tokenizer.
        lengths: tokens of prompt and answer together.
        depths: share of the filler's tokens before the needle, 0 to 1.
        seed: seed of the random facts.
        per_cell: examples for each length and depth.
        needle: one of KINDS.
        haystack: folder of .txt files; None takes the standard library's prose.

    Raises:
        UsageError: a depth is not in 0 to 1, the needle is unknown, or there is no filler. Building raises it if a
            length is too short.
    """
    if needle not in KINDS:
        raise UsageError(f"needle {needle}: must be one of {', '.join(KINDS)}")
    for depth in depths:
        if not 0 <= depth <= 1:
            raise UsageError(f"needle depth {depth}: must be from 0 to 1")
    sentences = load_sentences(haystack)
    starts = _draw_starts(len(sentences), seed)

    @cache
    def open_filler(start: int) -> Haystack:
        return Haystack(tokenizer, sentences, start)

    def build(name: str, length: int, depth: float, i: int) -> Example:
        fact, question, answers = _draw_needle(needle, random.Random(f"{seed}/{name}"))
        # The number differs among the samples of a cell; with the one sandwich only other filler can.
        filler = open_filler(starts[i % len(starts)] if needle == "sandwich" else 0)
        prompt = _build_prompt(tokenizer, filler, fact, question, length, depth)
        return Example(name, prompt, answers, MAX_NEW_TOKENS, length, depth, part=needle)

    for length in lengths:
        for depth in depths:
            for i in range(per_cell):
                name = f"needle/{needle}/{length}/{depth:.6g}/{i}"
                yield Draft(name, partial(build, name, length, depth, i))


def score(example: Example, output: str) -> float:
    """Return the share of the answer's key words that are whole words of the output."""
    found = [re.search(rf"\b{re.escape(answer)}\b", output, re.IGNORECASE) for answer in example.answers]
    return sum(map(bool, found)) / len(found)


def rouge_l(output: str) -> float:
    """Return the ROUGE-L F1 of the output's first line, as in CREAM's code."""
    return longbench_metrics.rouge_l(output.split("\n")[0], _SANDWICH)


def _draw_starts(count: int, seed: int) -> list[int]:
    """Return the numbers of `count` sentences in random order after 0, the start of each cell's first sample."""
    others = list(range(1, count))
    random.Random(f"{seed}/needle/starts").shuffle(others)
    return [0, *others]


def _draw_needle(kind: str, rng: random.Random) -> tuple[str, str, tuple[str, ...]]:
    """Return (the fact, the question with the start of its answer, key words of the answer)."""
    if kind == "sandwich":
        return _SANDWICH, "What is the best thing to do in San Francisco?\nAnswer:", _SANDWICH_WORDS
    city, number = rng.choice(_CITIES), str(rng.randint(1_000_000, 9_999_999))
    fact = f"The special magic number of {city} is {number}."
    return fact, f"What is the special magic number of {city}?\nThe special magic number of {city} is", (number,)


def _build_prompt(tokenizer: Tokenizer, filler: Haystack, fact: str, question: str, length: int, depth: float) -> str:
    def prompt(words: int) -> str:
        before, after = filler.split(words, [depth])
        return f"{_INTRODUCTION}\n{before}\n{fact}\n{after}\n\n{question}"

    room = length - MAX_NEW_TOKENS - len(tokenizer.encode(prompt(1)))
    words = fit(
        tokenizer,
        prompt,
        task="needle",
        length=length,
        max_new_tokens=MAX_NEW_TOKENS,
        least=1,
        guess=filler.estimate_words(room),
    )
    return prompt(words)
