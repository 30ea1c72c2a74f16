"""The plan of each command-line task: its examples, their number, and how they are scored.

A length that is too short, a missing file or a missing package raises UsageError here, before a model is loaded.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from megatron_cream.evaluation.runner import Plan
from megatron_cream.evaluation.tasks import kv, lines, longbench, needle
from megatron_cream.evaluation.tasks.ruler import suite as ruler
from megatron_cream.evaluation.tasks.task import Draft, Example, Tokenizer


def plan_needle(
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    kind: str,
    samples: int,
    seed: int,
    haystack: Path | None,
) -> Plan:
    """Plan needle: `samples` examples per length and depth. See needle.examples."""

    options = dict(depths=depths, seed=seed, needle=kind, haystack=haystack)

    def score(example: Example, output: str) -> dict[str, float]:
        scores = {"score": needle.score(example, output)}
        return scores | ({"rouge_l": needle.rouge_l(output)} if kind == "sandwich" else {})

    first = next(iter(needle.examples(tokenizer, lengths=lengths[:1], per_cell=1, **options)))
    score(first, "")  # fails now if a package is missing
    drafts = needle.drafts(tokenizer, lengths=lengths, per_cell=samples, **options)
    return _build_lazily(drafts, lengths, len(depths) * samples, score)


def plan_lines(
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    lines_counts: Sequence[int],
    files: Sequence[Path],
    samples: int,
    seed: int,
) -> Plan:
    """Plan the task lines: `samples` examples per length, number of lines or file.

    See lines.examples, and lines.load for `files`.
    """
    score = _wrap_score(lines.score)
    if files:
        return _build_plan(lines.load(tokenizer, files, most=samples), score)
    if lines_counts:
        made = lines.examples(tokenizer, lengths=lengths, lines=lines_counts, seed=seed, per_cell=samples)
        return _build_plan(made, score)
    next(iter(lines.examples(tokenizer, lengths=lengths[:1], seed=seed)))
    drafts = lines.drafts(tokenizer, lengths=lengths, seed=seed, per_cell=samples)
    return _build_lazily(drafts, lengths, samples, score)


def plan_kv(
    tokenizer: Tokenizer,
    *,
    keys: Sequence[int],
    lengths: Sequence[int],
    gold: Sequence[int] | None,
    files: Sequence[Path],
    samples: int,
    seed: int,
) -> Plan:
    """Plan the task kv: `samples` examples per place and number of keys, length or file.

    See kv.examples, and kv.load for `files`.
    """
    if files:
        return _build_plan(kv.load(tokenizer, files, gold=gold, most=samples), _wrap_score(kv.score))
    if lengths and not keys:
        next(iter(kv.examples(tokenizer, keys=(), lengths=lengths[:1], seed=seed)))
        drafts = kv.drafts(tokenizer, lengths=lengths, seed=seed, per_cell=samples)
        return _build_lazily(drafts, lengths, kv.PLACES * samples, _wrap_score(kv.score))
    made = kv.examples(tokenizer, keys=keys, lengths=lengths, gold=gold, seed=seed, per_cell=samples)
    return _build_plan(made, _wrap_score(kv.score))


def plan_ruler(
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    tasks: Sequence[str] | None,
    samples: int,
    seed: int,
    haystack: Path | None,
    squad: Path | None,
    hotpotqa: Path | None,
) -> Plan:
    """Plan RULER: `samples` examples of each task at each length. See ruler.examples."""

    options = dict(tasks=tasks, seed=seed, haystack=haystack, squad=squad, hotpotqa=hotpotqa)
    first = ruler.examples(tokenizer, lengths=lengths[:1], per_cell=1, **options)
    per_length = samples * sum(1 for _ in first)  # one of each task, at the shortest length
    drafts = ruler.drafts(tokenizer, lengths=lengths, per_cell=samples, **options)
    return _build_lazily(drafts, lengths, per_length, _wrap_score(ruler.score))


def plan_longbench(
    tokenizer: Tokenizer,
    *,
    folder: Path,
    length: int,
    datasets: Sequence[str] | None,
    samples: int | None,
    code_similarity: str,
) -> Plan:
    """Plan LongBench: at most `samples` examples per data set. See longbench.examples."""
    options = dict(length=length, datasets=datasets, most=samples, code_similarity=code_similarity)
    made = longbench.examples(tokenizer, folder=folder, **options)
    return _build_plan(made, _wrap_score(partial(longbench.score, code_similarity=code_similarity)))


def _build_lazily(
    drafts: Iterable[Draft], lengths: Sequence[int], per_length: int, score: Callable[[Example, str], dict[str, float]]
) -> Plan:
    """Return a plan of examples that are built only when they are needed, `per_length` at each length."""
    listed = list(drafts)
    examples = (draft.build() for draft in listed)
    return Plan(examples, len(lengths) * per_length, sum(lengths) * per_length, score, listed)


def _build_plan(examples: Iterable[Example], score: Callable[[Example, str], dict[str, float]]) -> Plan:
    made = list(examples)
    return Plan(made, len(made), sum(example.length for example in made), score)


def _wrap_score(score: Callable[[Example, str], float]) -> Callable[[Example, str], dict[str, float]]:
    return lambda example, output: {"score": score(example, output)}
