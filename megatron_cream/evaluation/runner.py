"""Runs of examples or documents through a model: what is done is kept, what was done is not done again."""

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NoReturn

import torch
from torch import Tensor

from megatron_cream.common.errors import UsageError
from megatron_cream.evaluation import sliding_window
from megatron_cream.evaluation.longppl import KeyTokenRule, find_key_spans, find_key_tokens, find_tokens_in_spans
from megatron_cream.evaluation.models.generation import derive_seed
from megatron_cream.evaluation.models.language_model import LanguageModel
from megatron_cream.evaluation.models.tokenizer import ModelTokenizer
from megatron_cream.evaluation.progress import WorkBar
from megatron_cream.evaluation.results import RESULTS, Results
from megatron_cream.evaluation.sliding_window import Document
from megatron_cream.evaluation.tasks.task import Example

_BATCHES_AT_ONCE = 8  # examples are taken so many batches at a time, and sorted by length among themselves

_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class OutOfMemory(Exception):
    """The device's memory did not do. The message is one line with advice; results so far are kept."""


@dataclass(frozen=True)
class Plan:
    """The examples of a run.

    examples: made as they are taken, short ones first where lengths are given.
    count: how many.
    tokens: in all of them, if that is known before.
    score: of (example, output), 0 to 1; and what else is to be kept of them.
    """

    examples: Iterable[Example]
    count: int
    tokens: int | None
    score: Callable[[Example, str], dict[str, float]]


@dataclass(frozen=True)
class Generation:
    """How answers are made: see `generation.generate`; `chat` puts prompts into the chat template."""

    batch_size: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False


def run_task(
    open_model: Callable[[], LanguageModel], plan: Plan, generation: Generation, results: Results
) -> list[dict[str, Any]]:
    """Answer and score every example that `results` lacks.

    Args:
        open_model: called once there is something to answer.
        plan: the examples, and how to score them.
        generation: how answers are made.
        results: keeps each record as soon as it is made.

    Returns: the records of all the plan's examples, in its order.

    Raises:
        OutOfMemory: with what was done until then kept.
    """
    order: list[str] = []
    with WorkBar(plan.count, plan.tokens) as bar:

        def missing() -> Iterator[Example]:
            for example in plan.examples:
                order.append(example.name)
                if example.name in results.records:
                    _check_same_example(example, results)
                    bar.skip(example.length)
                else:
                    yield example

        todo, model = missing(), None
        while some := list(islice(todo, min(_BATCHES_AT_ONCE * generation.batch_size, sys.maxsize))):
            model = model or open_model()
            for batch in _make_batches(model, some, generation):
                for record in _answer_batch(model, batch, plan, generation):
                    results.add(record)
                    bar.add(record["length"], record["prompt_tokens"])
    return [results.records[name] for name in order]


def run_perplexity(
    open_model: Callable[[], LanguageModel],
    documents: list[Document],
    *,
    lengths: list[int],
    stride: int,
    rule: KeyTokenRule | None,
    key: dict[str, Tensor],
    results: Results,
) -> list[dict[str, Any]]:
    """Measure the negative log-likelihood of each document at each context length.

    Skips the documents that `results` has already.

    Args:
        open_model: called once there is something to score.
        documents: tokenized texts.
        lengths: of the context, in tokens.
        stride: tokens that a window moves; a shorter context moves by its length.
        rule: what makes a key token of LongPPL; None leaves LongPPL out.
        key: bool [n - 1] by document's name, the key tokens by another model; those of documents
            that are not there are the model's own, with the longest context.
        results: keeps each record as soon as it is made.

    Returns: the records of all documents: {"lengths": {n: {"nll", "tokens", "key_nll", "key_tokens"}}}.

    Raises:
        OutOfMemory: with what was done until then kept.
    """
    by_length, model = sorted(lengths, reverse=True), None
    with WorkBar(len(documents), sum(len(document.tokens) for document in documents)) as bar:
        for document in documents:
            if document.name in results.records:
                _check_lengths(document, by_length, rule, results)
                bar.skip(len(document.tokens))
                continue
            record: dict[str, Any] = {"name": document.name, "tokens": len(document.tokens), "lengths": {}}
            model = model or open_model()
            with report_out_of_memory(len(document.tokens), 1):
                is_key = key.get(document.name)
                for length in by_length:
                    log_probs = sliding_window.log_probs(model, document.tokens, length, min(stride, length))
                    if rule and is_key is None:
                        is_key = find_key_tokens(model, document.tokens, log_probs, rule)
                    record["lengths"][str(length)] = _sum_losses(log_probs, is_key)
            results.add(record)
            bar.add(len(document.tokens), len(document.tokens))
    return [results.records[document.name] for document in documents]


def find_key_tokens_by_model(
    open_model: Callable[[], LanguageModel], documents: list[Document], tokenizer: ModelTokenizer, rule: KeyTokenRule
) -> dict[str, Tensor]:
    """Find key tokens of LongPPL by another model: bool [n - 1] by document's name.

    The model is freed afterwards.

    Args:
        open_model: called once there is a document.
        documents: tokenized texts.
        tokenizer: of the documents' tokens.
        rule: decides what is a key token.

    Raises:
        OutOfMemory: the other model takes too much.
    """
    model, found = None, {}
    for document in documents:
        model = model or open_model()
        with report_out_of_memory(len(document.tokens), 1):
            spans = find_key_spans(model, document, tokenizer, rule)
        found[document.name] = find_tokens_in_spans(document, tokenizer, spans)
    return found


def _sum_losses(log_probs: Tensor, is_key: Tensor | None) -> dict[str, float]:
    values = log_probs.double()
    sums = {"nll": -values.sum().item(), "tokens": len(values)}
    if is_key is not None:
        sums |= {"key_nll": -values[is_key].sum().item(), "key_tokens": int(is_key.sum())}
    return sums


def _make_batches(model: LanguageModel, examples: list[Example], generation: Generation) -> Iterator[list[tuple]]:
    """(example, prompt ids) by batches of similar lengths."""
    encode = model.tokenizer.encode_chat if generation.chat else model.tokenizer.encode_prompt
    pairs = [(example, encode(example.prompt)) for example in examples]
    pairs.sort(key=lambda pair: (pair[0].max_new_tokens, len(pair[1])))
    for first in range(0, len(pairs), generation.batch_size):
        yield pairs[first : first + generation.batch_size]


def _answer_batch(model: LanguageModel, batch: list[tuple], plan: Plan, generation: Generation) -> list[dict[str, Any]]:
    prompts = [ids for _, ids in batch]
    with report_out_of_memory(max(map(len, prompts)), len(batch)):
        outputs = model.generate(
            prompts,
            max(example.max_new_tokens for example, _ in batch),
            temperature=generation.temperature,
            top_p=generation.top_p,
            seeds=[derive_seed(generation.seed, example.name) for example, _ in batch],
        )
    records = []
    for (example, ids), output in zip(batch, outputs, strict=True):
        text = model.tokenizer.decode(output[: example.max_new_tokens])
        records.append(
            {
                "name": example.name,
                "part": example.part,
                "length": example.length,
                "depth": example.depth,
                "prompt_tokens": len(ids),
                "output": text,
                "answers": list(example.answers),
                **plan.score(example, text),
            }
        )
    return records


@contextlib.contextmanager
def report_out_of_memory(tokens: int, samples: int) -> Iterator[None]:
    """What runs out of memory in the block raises OutOfMemory; `samples` of `tokens` each are what it runs."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # On a CPU torch raises a plain RuntimeError.
        if type(error) is RuntimeError and not any(words in str(error) for words in _NO_MEMORY):
            raise
        batch = "" if samples == 1 else "a smaller --batch-size, "
        raise OutOfMemory(
            f"out of memory at {tokens} tokens x {samples}: try {batch}a smaller --prefill-chunk, or shorter lengths; "
            "what is done is kept, and the same command goes on from there"
        ) from error


def _check_same_example(example: Example, results: Results) -> None:
    """Raise UsageError where the folder's result of that name is of another example."""
    record = results.records[example.name]
    values = {"part": example.part, "length": example.length, "depth": example.depth, "answers": list(example.answers)}
    for key, value in values.items():
        if key in record and record[key] != value:
            _reject(example.name, f"{key} {record[key]!r}, not {value!r}", results)


def _check_lengths(document: Document, lengths: list[int], rule: KeyTokenRule | None, results: Results) -> None:
    """Raise UsageError where the folder's result of that document is of other context lengths."""
    rows = results.records[document.name].get("lengths", {})
    if rows.keys() != set(map(str, lengths)):
        _reject(document.name, f"context lengths {', '.join(rows) or 'none'}, not {lengths}", results)
    if any(("key_nll" in row) != (rule is not None) for row in rows.values()):
        _reject(document.name, f"{'no ' if rule else ''}LongPPL", results)


def _reject(name: str, reason: str, results: Results) -> NoReturn:
    raise UsageError(
        f"--output {results.folder}: its {RESULTS} has a result of {name} with {reason}; delete that line and the "
        "example is done again, or give another folder, or --overwrite"
    )


def summarise_perplexity(records: list[dict[str, Any]]) -> dict[str, dict[str, float | int | None]]:
    """By length: perplexity over all scored tokens, and LongPPL over all key tokens if they were told."""
    summary = {}
    for length in sorted({length for record in records for length in record["lengths"]}, key=int):
        parts = [record["lengths"][length] for record in records]
        total = {key: math.fsum(part[key] for part in parts) for key in parts[0]}
        summary[length] = {"perplexity": _exp_mean(total["nll"], total["tokens"]), "tokens": int(total["tokens"])}
        if "key_nll" in total:
            summary[length] |= {
                "longppl": _exp_mean(total["key_nll"], total["key_tokens"]),
                "key_tokens": int(total["key_tokens"]),
            }
    return summary


def _exp_mean(nll: float, count: float) -> float | None:
    return math.exp(min(nll / count, 700.0)) if count else None
