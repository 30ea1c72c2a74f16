"""RULER's task vt: find all variables with a value in a chain of assignments among noise.

Published: one chain of four hops, so five variables with names of five letters, each assigned on its own line, in
order, among repeated noise; a solved example with names of three letters comes first. Different here: the solved
example has five lines of noise instead of 500 tokens.
"""

import random
import string
from collections.abc import Sequence
from itertools import islice, pairwise

from megatron_cream.evaluation.tasks.filler import draw_distinct, fit
from megatron_cream.evaluation.tasks.ruler.niah import NOISE
from megatron_cream.evaluation.tasks.task import Example, Tokenizer

MAX_NEW_TOKENS = 30
HOPS = 4
_SOLVED_NOISE = 5


def build_example(tokenizer: Tokenizer, *, length: int, index: int, seed: str) -> Example:
    """Build example number `index` at `length`; all randomness is from `seed`."""
    rng = random.Random(seed)
    solved, solved_names = _draw_chain(rng, letters=3)
    chain, names = _draw_chain(rng, letters=5)
    places = sorted(rng.random() for _ in chain)
    solved_places = sorted(rng.random() for _ in solved)
    shown = f"{_build_problem(solved, solved_places, _SOLVED_NOISE)} {' '.join(solved_names)}\n\n"

    def prompt(noise: int) -> str:
        return shown + _build_problem(chain, places, noise)

    noise = fit(tokenizer, prompt, task="vt", length=length, max_new_tokens=MAX_NEW_TOKENS, least=1)
    return Example(f"ruler/vt/{length}/{index}", prompt(noise), tuple(names), MAX_NEW_TOKENS, length, part="vt")


def _draw_chain(rng: random.Random, letters: int) -> tuple[list[str], list[str]]:
    """Draw a chain; return (assignments in order, the variables' names)."""
    names = list(islice(draw_distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=letters))), HOPS + 1))
    first = f"VAR {names[0]} = {rng.randint(10_000, 99_999)}"
    return [first] + [f"VAR {name} = VAR {before}" for before, name in pairwise(names)], names


def _build_problem(chain: Sequence[str], places: Sequence[float], noise: int) -> str:
    """Build the question up to its answer.

    Args:
        chain: the assignments in order.
        places: share of the noise before each assignment, ascending.
        noise: lines of noise.
    """
    lines, before = [], 0
    for assignment, place in zip(chain, places, strict=True):
        lines += [NOISE] * (round(place * noise) - before) + [assignment]
        before = round(place * noise)
    lines += [NOISE] * (noise - before)
    value = chain[0].split()[-1]
    return (
        "Remember and follow the chain of variable assignments that is hidden in the text below.\n\n"
        + "\n".join(lines)
        + f"\nQuestion: Find all variables that have the value {value} in the text above. Answer: By the chain of "
        f"variable assignments in the text above, {len(chain)} variables have the value {value}; they are:"
    )
