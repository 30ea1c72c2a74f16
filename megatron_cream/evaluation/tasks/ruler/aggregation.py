"""RULER's counting tasks: cwe, the most common words of a list, and fwe, the most frequent coded words.

Published: cwe has ten common words, 30 times each, among others, 3 times each (6 times and once below 4,096
tokens), after a small solved list. fwe has random words of six letters, of which the word of rank k occurs
N k**-2 / zeta(2) times, rounded down. The first is shown as dots and ignored, and the question is the next three.

Different here: cwe's solved list has its own words, and when the words of `wonderwords` run out (past about 200K
tokens) pairs of words follow. fwe is never so short that ranks four and five occur equally often.
"""

import math
import random
import string
from collections.abc import Iterator, Sequence
from itertools import chain, count

from megatron_cream.evaluation.tasks.filler import LazyList, draw_distinct, fit
from megatron_cream.evaluation.tasks.sources import load_words
from megatron_cream.evaluation.tasks.task import Example, Tokenizer

MAX_NEW_TOKENS = {"cwe": 120, "fwe": 50}
COMMON = 10
"""Number of words that cwe asks for."""

_SHORT = 4096
_ZETA_2 = math.pi**2 / 6
_LEAST_CODED = 80
"""Minimum N of fwe: from here on, each of the first four ranks occurs more often than the next."""


def build_common_words(tokenizer: Tokenizer, *, length: int, index: int, seed: str) -> Example:
    """Build example number `index` of cwe at `length`; all randomness is from `seed`."""
    rng = random.Random(seed)
    vocabulary = LazyList(_draw_words(rng))
    solved_size, solved_times, times = (20, (3, 1), (6, 1)) if length < _SHORT else (40, (10, 3), (30, 3))
    solved = vocabulary.first(solved_size)
    shown = f"{_build_problem(solved, solved_times, f'{seed}/solved')} {_list_items(solved[:COMMON])}\n"

    def prompt(size: int) -> str:
        return shown + _build_problem(vocabulary.first(solved_size + size)[solved_size:], times, f"{seed}/order")

    chosen = fit(tokenizer, prompt, task="cwe", length=length, max_new_tokens=MAX_NEW_TOKENS["cwe"], least=COMMON + 1)
    answers = tuple(vocabulary.first(solved_size + chosen)[solved_size : solved_size + COMMON])
    name = f"ruler/cwe/{length}/{index}"
    return Example(name, prompt(chosen), answers, MAX_NEW_TOKENS["cwe"], length, part="cwe")


def build_frequent_words(tokenizer: Tokenizer, *, length: int, index: int, seed: str) -> Example:
    """Build example number `index` of fwe at `length`; all randomness is from `seed`."""
    rng = random.Random(seed)
    vocabulary = LazyList(draw_distinct(lambda: "".join(rng.choices(string.ascii_lowercase, k=6))))

    def prompt(size: int) -> str:
        text = []
        for rank in count(1):
            times = int(size * rank**-2 / _ZETA_2)
            if times == 0:
                break
            text += ["..." if rank == 1 else vocabulary.first(rank)[-1]] * times
        random.Random(f"{seed}/order").shuffle(text)
        return (
            "Read the coded text below and keep count of each coded word. Find the three coded words that come most "
            f"often. {' '.join(text)}\nQuestion: Give no explanation, and leave the dots '...' out. Which three words "
            "come most often in the coded text above? Answer: By the coded text above, the three words that come most "
            "often are:"
        )

    size = fit(tokenizer, prompt, task="fwe", length=length, max_new_tokens=MAX_NEW_TOKENS["fwe"], least=_LEAST_CODED)
    answers, name = tuple(vocabulary.first(4)[1:]), f"ruler/fwe/{length}/{index}"
    return Example(name, prompt(size), answers, MAX_NEW_TOKENS["fwe"], length, part="fwe")


def _draw_words(rng: random.Random) -> Iterator[str]:
    adjectives, nouns, verbs = load_words()
    single = sorted({*adjectives, *nouns, *verbs})
    rng.shuffle(single)
    return chain(single, draw_distinct(lambda: f"{rng.choice(adjectives)}-{rng.choice(nouns)}"))


def _build_problem(vocabulary: Sequence[str], times: tuple[int, int], seed: str) -> str:
    """Build the question up to its answer.

    Args:
        vocabulary: the words; the first COMMON are the common ones.
        times: occurrences of each common word and of each other word.
        seed: seed of the order.
    """
    listed = [*vocabulary[:COMMON]] * times[0] + [*vocabulary[COMMON:]] * times[1]
    random.Random(seed).shuffle(listed)
    return (
        "Below is a numbered list of words. Some of them come more often than others. Remember those that come most "
        f"often.\n{_list_items(listed)}\nQuestion: Which {COMMON} words come most often in the list above? Answer: The "
        f"{COMMON} words that come most often in the list are:"
    )


def _list_items(items: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(items, start=1))
