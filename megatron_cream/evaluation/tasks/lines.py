"""LongChat-Lines: find the number on one of many lines.

Published: D. Li and others, "How long can open-source LLMs truly promise on context length?"
(LongChat, 2023), and the LRT-NL test in its code: each line has a name of an adjective and a noun and a number
up to 50,000, and the question is the number of one line. CREAM's code grades the first number in an output of
35 tokens, LongChat's the last number in 100 tokens. This module grades as CREAM does, because a model without
chat tuning continues after its answer.

Different here: the wording of the prompt, which ends with the start of the requested line.
"""

import random
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from megatron_cream.common.errors import UsageError, one_line
from megatron_cream.evaluation.tasks.filler import LazyList, draw_distinct, fit
from megatron_cream.evaluation.tasks.sources import check_distinct_names, load_words, read_json_lines
from megatron_cream.evaluation.tasks.task import Draft, Example, Tokenizer

MAX_NEW_TOKENS = 35
_LARGEST = 50_000
_INTRODUCTION = (
    "Here is a record of lines to remember. Each line begins with 'line' and the line's name, and ends with its "
    "REGISTER_CONTENT, which is a number. At the end of the record you will be asked for the REGISTER_CONTENT of one "
    "line. The record begins:\n\n"
)


def examples(
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int] = (),
    lines: Sequence[int] = (),
    seed: int = 0,
    per_cell: int = 1,
) -> Iterator[Example]:
    """Yield `per_cell` examples for each length and each number of lines.

    Args:
        tokenizer: the model's tokenizer.
        lengths: tokens of prompt and answer together; each holds as many lines as fit.
        lines: numbers of lines, 2 or more.
        seed: seed of the random lines.
        per_cell: examples for each length or number of lines.

    Raises:
        UsageError: a length is too short, a number of lines is below 2, or `wonderwords` is not installed.
    """
    for count in lines:
        if count < 2:
            raise UsageError(f"--lines {count}: must be 2 or more")
    for draft in drafts(tokenizer, lengths=lengths, seed=seed, per_cell=per_cell):
        yield draft.build()
    for count in lines:
        for i in range(per_cell):
            name, part = f"lines/{count}_lines/{i}", f"{count}_lines"
            record = _Record(f"{seed}/{name}")
            length = len(tokenizer.encode(record.prompt(count))) + MAX_NEW_TOKENS
            yield record.example(name, count, length, part)


def drafts(tokenizer: Tokenizer, *, lengths: Sequence[int], seed: int, per_cell: int) -> Iterator[Draft]:
    """Yield `per_cell` examples for each length, not built yet. Building raises UsageError if it is too short."""

    def build(name: str, length: int) -> Example:
        record = _Record(f"{seed}/{name}")
        count = fit(tokenizer, record.prompt, task="lines", length=length, max_new_tokens=MAX_NEW_TOKENS, least=2)
        return record.example(name, count, length, part="")

    for length in lengths:
        for i in range(per_cell):
            name = f"lines/{length}/{i}"
            yield Draft(name, partial(build, name, length))


def load(tokenizer: Tokenizer, files: Sequence[Path], *, most: int | None = None) -> Iterator[Example]:
    """Yield the published tests, with their prompts unchanged.

    Args:
        tokenizer: the model's tokenizer.
        files: LongEval's JSONL files, N_lines.jsonl.
        most: maximum examples per file; None takes all.

    Raises:
        UsageError: a file is missing or is not one of LongEval's, or two files have one name.
    """
    check_distinct_names("--data", files, lambda path: path.stem)
    for path in map(Path, files):
        for i, (where, case) in enumerate(
            read_json_lines(path, ("prompt", "expected_number", "num_lines", "random_idx"))
        ):
            if i == most:
                break
            try:
                count, number, (_, index) = int(case["num_lines"]), int(case["expected_number"]), case["random_idx"]
                if not isinstance(case["prompt"], str) or not case["prompt"].strip():
                    raise TypeError("prompt must be a non-empty text")
                length = len(tokenizer.encode(case["prompt"])) + MAX_NEW_TOKENS
                depth = int(index) / max(1, count - 1)
            except (TypeError, ValueError, OverflowError) as error:
                raise UsageError(f"{where}: not one of LongEval's lines ({one_line(error)})") from error
            name, part = f"lines/{path.stem}/{i}", f"{count}_lines"
            yield Example(name, case["prompt"], (str(number),), MAX_NEW_TOKENS, length, depth, part)


def score(example: Example, output: str) -> float:
    """Return 1 if the first number in the output is the line's number, else 0."""
    numbers = re.findall(r"\d+", output)
    return float(bool(numbers) and int(numbers[0]) == int(example.answers[0]))


class _Record:
    """The lines of one example; a longer record starts with the lines of a shorter one."""

    def __init__(self, seed: str):
        rng = random.Random(seed)
        self._place = rng.random()
        adjectives, nouns, _ = load_words()
        names = draw_distinct(lambda: f"{rng.choice(adjectives)}-{rng.choice(nouns)}")
        self._lines = LazyList((name, rng.randint(1, _LARGEST)) for name in names)

    def gold(self, count: int) -> int:
        """Return the index of the requested line among `count` lines, counted from 0."""
        return int(self._place * count)

    def prompt(self, count: int) -> str:
        lines = self._lines.first(count)
        record = "".join(f"line {name}: REGISTER_CONTENT is <{number}>\n" for name, number in lines)
        name = lines[self.gold(count)][0]
        question = f"The record is over. What is the REGISTER_CONTENT of line {name}? Give the number.\n"
        return f"{_INTRODUCTION}{record}\n{question}line {name}: REGISTER_CONTENT is"

    def example(self, name: str, count: int, length: int, part: str) -> Example:
        gold = self.gold(count)
        answers = (str(self._lines.first(count)[gold][1]),)
        return Example(name, self.prompt(count), answers, MAX_NEW_TOKENS, length, gold / (count - 1), part)
