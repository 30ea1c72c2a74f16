"""Retrieval accuracy by teacher forcing, on prompts of the long-context tasks with their gold answers."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation.models.tokenizer import ModelTokenizer
from megatron_cream.evaluation.tasks import kv, needle
from megatron_cream.evaluation.tasks.task import Example
from megatron_cream.evaluation.teacher_forced import ScoredText, score_texts

TASKS = ("needle", "kv")
PLACES = 5
"""Number of depths of the needle, or places of the key, from the start of the context to its end."""

# Text between a task's prompt and its answer. The kv prompt quotes its keys, so the answer starts with a quote.
_LEAD = {"needle": " ", "kv": ' "'}


@dataclass(frozen=True)
class Recall:
    """Retrieval results over a set of prompts.

    accuracy: share of the answers that greedy decoding gives completely.
    tokens: share of the answers' tokens that are the likeliest after the correct tokens before them.
    loss: mean over the answers' tokens.
    """

    accuracy: float
    tokens: float
    loss: float


def build_recall_texts(tokenizer: ModelTokenizer, task: str, length: int, samples: int) -> list[ScoredText]:
    """Return PLACES x `samples` prompts with answers; equal arguments give equal texts.

    Args:
        tokenizer: the model's tokenizer.
        task: one of TASKS.
        length: maximum tokens of a text; the last token of an answer is not read and not counted.
        samples: prompts at each place.

    Raises:
        UsageError: the length is too short for the task.
    """
    try:
        return [
            _build_text(tokenizer, example, _LEAD[task])
            for example in _build_examples(tokenizer, task, length, samples)
        ]
    except UsageError as error:
        raise UsageError(f"--long-eval-lengths {length}: {error}") from error


def measure_recall(model: list[torch.nn.Module], texts: list[ScoredText], length: int) -> Recall:
    """Measure the recall of `texts` on every rank; arguments as in `score_texts`."""
    nll, count, likeliest = score_texts(model, texts, length).unbind(dim=1)
    return Recall(
        accuracy=(likeliest == count).double().mean().item(),
        tokens=(likeliest.sum() / count.sum()).item(),
        loss=(nll.sum() / count.sum()).item(),
    )


def _build_examples(tokenizer: ModelTokenizer, task: str, length: int, samples: int) -> Iterator[Example]:
    if task == "needle":
        depths = np.linspace(0, 1, PLACES).tolist()
        return needle.examples(tokenizer, lengths=[length], depths=depths, per_cell=samples)
    return kv.examples(tokenizer, keys=(), lengths=[length], per_cell=samples)


def _build_text(tokenizer: ModelTokenizer, example: Example, lead: str) -> ScoredText:
    before = tokenizer.encode_prompt(example.prompt + lead)
    whole = tokenizer.encode_prompt(example.prompt + lead + example.answers[0])
    # A tokenizer may merge the lead with the answer's first letters: that token is then scored too.
    pairs = enumerate(zip(before, whole, strict=False))
    first = next((i for i, (one, other) in pairs if one != other), min(len(before), len(whole)))
    return ScoredText(np.array(whole, dtype=np.int64), first)
