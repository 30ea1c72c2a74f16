"""What a long-context task gives: examples with their gold answers, to be generated for and scored."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Example:
    """One prompt and what it should be answered with.

    name: unique within a task's examples and the same in every run: what a run resumes by.
    prompt: the text the model continues.
    answers: gold answers; what they mean is the task's score's to say.
    max_new_tokens: how long an answer may be, in tokens.
    length: the context length this example stands for, in tokens, prompt and answer together.
    depth: where the gold lies in the context, 0 (start) to 1 (end), where there is one such place.
    part: the part of the task it belongs to (a RULER task, a LongBench data set).
    """

    name: str
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    length: int
    depth: float | None = None
    part: str = ""


class Tokenizer(Protocol):
    """What tasks need of a tokenizer to fill a context of a given length."""

    def encode(self, text: str) -> list[int]:
        """Token ids, without special tokens."""

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
