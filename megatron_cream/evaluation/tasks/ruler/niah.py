"""RULER's retrieval tasks (niah): needles, each with a key and a value, in three kinds of haystack.

Published: haystacks of one repeated line (noise), of essays, or of other needles; keys and values that are
adjective-noun words, numbers of seven digits or UUIDs; four keys, values or queries in the tasks with several.
Different here: no two keys and no two values are equal, so that an answer is unique, and in essays a needle's
depth counts tokens.
"""

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, pairwise, repeat

from megatron_cream.evaluation.tasks.filler import Haystack, LazyList, draw_distinct, fit
from megatron_cream.evaluation.tasks.sources import load_words
from megatron_cream.evaluation.tasks.task import Example, Tokenizer

MAX_NEW_TOKENS = 128
NOISE = "The river is wide. The hill is green. The road is long. On we go. Day comes after night."
"""The line that is repeated as noise."""

_DEPTHS = 40
"""Number of evenly spaced depths from 0 to 1; each needle has its own depth, as published."""


@dataclass(frozen=True)
class Setting:
    """A task's published configuration.

    haystack: "noise", "essay" or "needle".
    key: kind of the keys: "words", "numbers" or "uuids".
    value: kind of the values.
    keys: number of keys.
    values: values of each key.
    queries: keys that the prompt asks for.
    """

    haystack: str
    key: str = "words"
    value: str = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


SETTINGS = {
    "niah_single_1": Setting("noise"),
    "niah_single_2": Setting("essay"),
    "niah_single_3": Setting("essay", value="uuids"),
    "niah_multikey_1": Setting("essay", keys=4),
    "niah_multikey_2": Setting("needle"),
    "niah_multikey_3": Setting("needle", key="uuids", value="uuids"),
    "niah_multivalue": Setting("essay", values=4),
    "niah_multiquery": Setting("essay", keys=4, queries=4),
}


def build_example(
    task: str, essay: Haystack | None, tokenizer: Tokenizer, *, length: int, index: int, seed: str
) -> Example:
    """Build example number `index` of `task` at `length`.

    Args:
        task: one of SETTINGS.
        essay: the haystack of the tasks with essays.
        tokenizer: the model's tokenizer.
        length: tokens of prompt and answer together.
        index: number of the example, from 0; only its name depends on it.
        seed: seed of everything random in the example.
    """
    setting, rng = SETTINGS[task], random.Random(seed)
    draw_key = draw_distinct(_make_drawer(setting.key, rng))
    draw_value = draw_distinct(_make_drawer(setting.value, rng))
    needles = {key: list(islice(draw_value, setting.values)) for key in islice(draw_key, setting.keys)}
    queries = rng.sample(list(needles), setting.queries)
    texts = [_format_needle(setting, key, value) for key, values in needles.items() for value in values]
    rng.shuffle(texts)
    depths = sorted(place / (_DEPTHS - 1) for place in rng.sample(range(_DEPTHS), len(texts)))
    if setting.haystack == "noise":
        filler = LazyList(repeat(NOISE))
    else:
        filler = LazyList(_format_needle(setting, next(draw_key), next(draw_value)) for _ in repeat(None))

    def prompt(n: int) -> str:
        if setting.haystack == "essay":
            pieces, joint = essay.split(n, depths), " "
        else:
            lines, joint = filler.first(n), "\n"
            cuts = [0, *(round(depth * n) for depth in depths), n]
            pieces = [joint.join(lines[first:end]) for first, end in pairwise(cuts)]
        parts = [pieces[0]] + [part for pair in zip(texts, pieces[1:], strict=True) for part in pair]
        return _build_prompt(setting, joint.join(filter(None, parts)), queries)

    units = fit(
        tokenizer,
        prompt,
        task=task,
        length=length,
        max_new_tokens=MAX_NEW_TOKENS,
        least=len(texts),
        guess=essay.estimate_words(length - MAX_NEW_TOKENS) if setting.haystack == "essay" else None,
    )
    answers = tuple(value for key in queries for value in needles[key])
    depth = depths[0] if len(texts) == 1 else None
    return Example(f"ruler/{task}/{length}/{index}", prompt(units), answers, MAX_NEW_TOKENS, length, depth, part=task)


def _format_needle(setting: Setting, key: str, value: str) -> str:
    return f"A special magic {setting.value[:-1]} of {key} is: {value}."


def _build_prompt(setting: Setting, context: str, queries: list[str]) -> str:
    asked = queries[0] if len(queries) == 1 else f"{', '.join(queries[:-1])}, and {queries[-1]}"
    if setting.queries * setting.values == 1:
        kind, hidden, it, question, verb = setting.value[:-1], "A special magic {} is", "it", "What is", "is"
    else:
        kind, hidden, it, question, verb = setting.value, "Some special magic {} are", "them", "What are all", "are"
    what = f"special magic {kind} of {asked} that the text mentions"
    return (
        f"{hidden.format(kind)} hidden in the text below. Remember {it}: you will be asked about {it} afterwards.\n"
        f"{context}\n{question} the {what}? The {what} {verb}"
    )


def _make_drawer(kind: str, rng: random.Random) -> Callable[[], str]:
    if kind == "numbers":
        return lambda: str(rng.randint(1_000_000, 9_999_999))
    if kind == "uuids":
        return lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4))
    adjectives, nouns, _ = load_words()
    return lambda: f"{rng.choice(adjectives)}-{rng.choice(nouns)}"
