"""Lost in the Middle's key-value retrieval: find the value of one key in a JSON object of UUIDs.

Published: N. Liu and others, "Lost in the Middle" (arXiv 2307.03172): 75, 140 or 300 pairs, with the
requested (gold) pair moved to chosen places; an answer is correct if the value is in the output. CREAM uses
75 and 140 pairs at five places and an answer of up to 50 tokens: `PUBLISHED` here.

Different here: the wording of the prompt.
"""

import random
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.evaluation.tasks.filler import LazyList, draw_distinct, fit
from megatron_cream.evaluation.tasks.sources import check_distinct_names, read_json_lines
from megatron_cream.evaluation.tasks.task import Draft, Example, Tokenizer

MAX_NEW_TOKENS = 50
PLACES = 5
"""Number of places of the gold pair at each length, evenly spaced."""
PUBLISHED = {75: (0, 18, 37, 54, 74), 140: (0, 34, 69, 104, 139)}
"""Number of pairs -> places of the gold pair, counted from 0, in CREAM's paper."""


def examples(
    tokenizer: Tokenizer,
    *,
    keys: Sequence[int] = tuple(PUBLISHED),
    lengths: Sequence[int] = (),
    gold: Sequence[int] | None = None,
    seed: int = 0,
    per_cell: int = 1,
) -> Iterator[Example]:
    """Yield `per_cell` examples for each number of pairs, or each length, and each place.

    The i-th example asks for the same pair at every place, among the same other pairs, as published.

    Args:
        tokenizer: the model's tokenizer.
        keys: numbers of pairs, 2 or more.
        lengths: tokens of prompt and answer together; each holds as many pairs as fit, at five places.
        gold: places of the gold pair, counted from 0, only for `keys`; None takes PUBLISHED, and for other
            numbers of pairs five places from the first to the last.
        seed: seed of the random pairs.
        per_cell: examples for each number or length, and place.

    Raises:
        UsageError: a number of pairs is below 2, a place does not exist, or a length is too short.
    """
    for count in keys:
        if count < 2:
            raise UsageError(f"--keys {count}: must be 2 or more")
        _check_gold(count, gold)
    for count in keys:
        for place in choose_places(count) if gold is None else gold:
            for i in range(per_cell):
                pairs = _move(_draw_pairs(f"{seed}/kv/{count}_keys/{i}").first(count), 0, place)
                yield _build_example(tokenizer, f"kv/{count}_keys/{place}/{i}", pairs, place, part=f"{count}_keys")
    for draft in drafts(tokenizer, lengths=lengths, seed=seed, per_cell=per_cell):
        yield draft.build()


def drafts(tokenizer: Tokenizer, *, lengths: Sequence[int], seed: int, per_cell: int) -> Iterator[Draft]:
    """Yield `per_cell` examples for each length and place, not built yet.

    Building raises UsageError if the length is too short.
    """

    def build(length: int, step: int, i: int) -> Example:
        pairs, place = _fit_pairs(tokenizer, _draw_pairs(f"{seed}/kv/{length}/{i}"), length, step)
        return _build_example(tokenizer, f"kv/{length}/{step}/{i}", pairs, place, length=length)

    for length in lengths:
        for step in range(PLACES):
            for i in range(per_cell):
                yield Draft(f"kv/{length}/{step}/{i}", partial(build, length, step, i))


def load(
    tokenizer: Tokenizer, files: Sequence[Path], *, gold: Sequence[int] | None = None, most: int | None = None
) -> Iterator[Example]:
    """Yield each published example, once for each place of its gold pair.

    Args:
        tokenizer: the model's tokenizer.
        files: the published kv-retrieval-N_keys.jsonl.gz files, or .jsonl.
        gold: as in `examples`.
        most: maximum examples per file; None takes all.

    Raises:
        UsageError: a file is missing or is not such a file, or two files have one name.
    """
    check_distinct_names("--data", files, _stem)
    for path in map(Path, files):
        for i, (where, case) in enumerate(read_json_lines(path, ("ordered_kv_records", "key", "value"))):
            if i == most:
                break
            try:
                pairs = [(str(key), str(value)) for key, value in case["ordered_kv_records"]]
                index = pairs.index((case["key"], case["value"]))
                if len(pairs) < 2:
                    raise ValueError("it has only one pair")
            except (TypeError, ValueError) as error:
                raise UsageError(f"{where}: not an example of key-value retrieval ({one_line(error)})") from error
            _check_gold(len(pairs), gold)
            for place in choose_places(len(pairs)) if gold is None else gold:
                name = f"kv/{_stem(path)}/{place}/{i}"
                yield _build_example(tokenizer, name, _move(pairs, index, place), place, part=f"{len(pairs)}_keys")


def score(example: Example, output: str) -> float:
    """Return 1 if the value is in the output, else 0."""
    return float(example.answers[0].lower() in output.lower())


def find_asked_depth(record: dict[str, Any]) -> float:
    """Return the depth that a result's gold pair was meant to have.

    With `lengths` the number of pairs that fit differs among the examples of one place, and so does their exact depth.
    """
    parts = record.get("name", "").split("/")
    if record["part"] or len(parts) != 4 or not parts[2].isdecimal():
        return record["depth"]
    return int(parts[2]) / (PLACES - 1)


def choose_places(count: int) -> tuple[int, ...]:
    """Return the places of PUBLISHED, or five places from the first of `count` to the last."""
    return PUBLISHED.get(count) or tuple(dict.fromkeys(_choose_place(count, step) for step in range(PLACES)))


def _choose_place(count: int, step: int) -> int:
    """Return the place among `count` for `step`: 0 is the first, PLACES - 1 the last."""
    return step * (count - 1) // (PLACES - 1)


def _check_gold(count: int, gold: Sequence[int] | None) -> None:
    for place in gold or ():
        if not 0 <= place < count:
            raise UsageError(f"--gold {place}: must be from 0 to {count - 1}, for {count} keys")


def _stem(path: Path) -> str:
    return path.name.split(".")[0]


def _draw_pairs(seed: str) -> LazyList[tuple[str, str]]:
    rng = random.Random(seed)
    ids = draw_distinct(lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)))
    return LazyList(zip(ids, ids, strict=False))


def _fit_pairs(
    tokenizer: Tokenizer, pairs: LazyList[tuple[str, str]], length: int, step: int
) -> tuple[list[tuple[str, str]], int]:
    """Return as many pairs as fit in `length`, and the place of the gold pair."""

    def moved(count: int) -> tuple[list[tuple[str, str]], int]:
        place = _choose_place(count, step)
        return _move(pairs.first(count), 0, place), place

    def prompt(count: int) -> str:
        return _build_prompt(*moved(count))

    return moved(fit(tokenizer, prompt, task="kv", length=length, max_new_tokens=MAX_NEW_TOKENS, least=2))


def _move(pairs: list[tuple[str, str]], index: int, place: int) -> list[tuple[str, str]]:
    rest = pairs[:index] + pairs[index + 1 :]
    return [*rest[:place], pairs[index], *rest[place:]]


def _build_prompt(pairs: list[tuple[str, str]], place: int) -> str:
    records = ",\n ".join(f'"{key}": "{value}"' for key, value in pairs)
    return (
        f"Find the value that belongs to a key of the JSON object below.\n\nJSON object:\n{{{records}}}\n\n"
        f'Key: "{pairs[place][0]}"\nValue that belongs to it:'
    )


def _build_example(
    tokenizer: Tokenizer,
    name: str,
    pairs: list[tuple[str, str]],
    place: int,
    *,
    length: int | None = None,
    part: str = "",
) -> Example:
    prompt = _build_prompt(pairs, place)
    if length is None:
        length = len(tokenizer.encode(prompt)) + MAX_NEW_TOKENS
    return Example(name, prompt, (pairs[place][1],), MAX_NEW_TOKENS, length, place / (len(pairs) - 1), part)
