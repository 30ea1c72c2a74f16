"""Evaluation at the target lengths inside a training job, and the score that picks the best checkpoint."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation.models.tokenizer import ModelTokenizer
from megatron_cream.evaluation.perplexity import measure_perplexity, read_held_out_documents
from megatron_cream.evaluation.recall import PLACES, Recall, build_recall_texts, measure_recall


@dataclass(frozen=True)
class Settings:
    """What a run evaluates at its target lengths, and when.

    tasks: any of needle, kv, perplexity.
    lengths: context lengths in tokens, ascending.
    samples: prompts for each length and depth.
    held_out: files for `read_held_out_documents`; used by perplexity.
    interval: steps between two evaluations; the last step is evaluated too.
    share: maximum share of the run's time for evaluations and best checkpoints. The first evaluation, which measures
        the cost, and that of the last step are always made.
    score: name of the Score that checkpoints are compared by; None compares none.
    folder: --save, where the record is written, or None.
    """

    tasks: tuple[str, ...]
    lengths: list[int]
    samples: int
    held_out: list[tuple[str, tuple[float, float]]]
    interval: int
    share: float
    score: str | None
    folder: Path | None

    def describe(self) -> dict[str, Any]:
        """Return the settings under which scores compare, as plain values."""
        return dict(tasks=",".join(self.tasks), lengths=self.lengths, samples=self.samples, best=self.score)


@dataclass(frozen=True)
class Score:
    """The score that picks the best checkpoint.

    name: "accuracy" or "perplexity".
    value: mean accuracy over retrieval tasks and lengths, or geometric mean of the perplexity over lengths.
    loss: mean over the answers' tokens, then over tasks and lengths; it decides between equal accuracies. For
        perplexity: its logarithm.
    """

    name: str
    value: float
    loss: float

    def __str__(self) -> str:
        return (
            f"accuracy {self.value:.3f}, loss {self.loss:.3f}"
            if self.name == "accuracy"
            else (f"perplexity {self.value:.2f}")
        )

    def is_better_than(self, other: "Score | None") -> bool:
        """Return whether this score beats `other`; a non-finite score beats nothing."""
        if other is None or not math.isfinite(self.loss):
            return math.isfinite(self.loss)
        if self.name == "accuracy":
            return (self.value, -self.loss) > (other.value, -other.loss)
        return self.value < other.value


@dataclass(frozen=True)
class Result:
    """What one evaluation measured.

    recalls: task -> length -> recall.
    perplexity: length -> perplexity.
    score_name: as in `Settings`.
    """

    recalls: dict[str, dict[int, Recall]]
    perplexity: dict[int, float]
    score_name: str | None = None

    @property
    def score(self) -> Score | None:
        """The score that checkpoints are compared by; None if they are not compared."""
        if self.score_name is None:
            return None
        if self.score_name == "perplexity":
            loss = _mean([math.log(value) for value in self.perplexity.values()])
            return Score("perplexity", math.exp(loss), loss)
        recalls = [value for by_length in self.recalls.values() for value in by_length.values()]
        return Score(self.score_name, _mean([r.accuracy for r in recalls]), _mean([r.loss for r in recalls]))

    def flatten(self) -> dict[str, float]:
        """Return every measured value by a name such as "kv/4096" or "kv loss/4096"."""
        found = {}
        for task, by_length in self.recalls.items():
            for length, value in by_length.items():
                found[f"{task}/{length}"] = value.accuracy
                found |= {f"{task} tokens/{length}": value.tokens, f"{task} loss/{length}": value.loss}
        return found | {f"perplexity/{length}": value for length, value in self.perplexity.items()}

    def format_line(self) -> str:
        """Return the accuracies and perplexities as one line for the console."""
        parts = [
            f"{task} " + ", ".join(f"{length}: {value.accuracy:.2f}" for length, value in by_length.items())
            for task, by_length in self.recalls.items()
        ]
        if self.perplexity:
            parts.append("perplexity " + ", ".join(f"{n}: {value:.2f}" for n, value in self.perplexity.items()))
        return " | ".join(parts)


class LongEvaluation:
    """An evaluation that uses the same prompts and documents at every call.

    Args:
        tokenizer: the model's tokenizer; None if perplexity is the only task.
        settings: what to evaluate.

    Raises:
        UsageError: a length is too short for a task, or no held-out document is long enough.
    """

    def __init__(self, tokenizer: ModelTokenizer | None, settings: Settings):
        lengths, samples = settings.lengths, settings.samples
        self._lengths, self._documents, self._score_name = lengths, [], settings.score
        self._texts = {
            task: {length: build_recall_texts(tokenizer, task, length, samples) for length in lengths}
            for task in settings.tasks
            if task != "perplexity"
        }
        if "perplexity" in settings.tasks:
            self._documents = read_held_out_documents(settings.held_out, lengths[-1], PLACES * samples)
            if not self._documents:
                raise UsageError(
                    f"--long-eval-lengths {lengths[-1]}: no held-out document has that many tokens. Give a smaller "
                    "length, longer texts, or --long-eval-tasks without perplexity."
                )

    def __call__(self, model: list[torch.nn.Module]) -> Result:
        """Evaluate Megatron's model chunks, in evaluation mode and without gradients.

        Call it on every rank; every rank gets the same result.
        """
        recalls = {
            task: {length: measure_recall(model, texts, length) for length, texts in by_length.items()}
            for task, by_length in self._texts.items()
        }
        perplexity = {}
        if self._documents:
            perplexity = measure_perplexity(model, self._documents, self._lengths, self._lengths[0] // 2)
        return Result(recalls, perplexity, self._score_name)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
