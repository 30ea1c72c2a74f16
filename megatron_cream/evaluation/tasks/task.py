"""The types that every long-context task uses: an example with its gold answers, and the tokenizer interface."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Example:
    """One prompt with its gold answers.

    name: unique within a task's examples and the same in every run, so that a run can resume.
    prompt: the text that the model continues.
    answers: gold answers; the task's score defines how they count.
    max_new_tokens: maximum tokens of an answer.
    length: context length of this example in tokens, prompt and answer together.
    depth: place of the gold in the context, 0 (start) to 1 (end); None if there is not exactly one place.
    part: the part of the task (a RULER task, a LongBench data set).
    chat: whether `--chat` puts the prompt into the chat template; False if the benchmark's authors do not.
    """

    name: str
    prompt: str
    answers: tuple[str, ...]
    max_new_tokens: int
    length: int
    depth: float | None = None
    part: str = ""
    chat: bool = True


@dataclass(frozen=True)
class Draft:
    """An example that is not built yet: building takes time, and another rank may do it.

    name: the example's name.
    build: builds the example; it is the same at every call.
    """

    name: str
    build: Callable[[], Example]


class Tokenizer(Protocol):
    """The tokenizer interface with which tasks fill a context of a given length."""

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids, without special tokens."""
