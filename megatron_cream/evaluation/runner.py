"""Runs examples or documents through a model: keeps every result at once and skips those of earlier runs."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from megatron_cream.common.errors import UsageError, is_out_of_memory
from megatron_cream.evaluation import conventions
from megatron_cream.evaluation.longppl import KeyTokenRule, find_key_spans, find_key_tokens, find_tokens_in_spans
from megatron_cream.evaluation.models.generation import derive_seed
from megatron_cream.evaluation.models.language_model import LanguageModel
from megatron_cream.evaluation.models.tokenizer import ModelTokenizer
from megatron_cream.evaluation.parts import PartResults
from megatron_cream.evaluation.progress import WorkBar
from megatron_cream.evaluation.ranks import Ranks
from megatron_cream.evaluation.results import RESULTS, Results
from megatron_cream.evaluation.sharing import Recorder, claim_batches, take_share
from megatron_cream.evaluation.sliding_window import Document
from megatron_cream.evaluation.tasks.task import Draft, Example

_BATCHES_AT_ONCE = 8
"""Batches of examples that are sorted by length together."""


class OutOfMemory(Exception):
    """The device ran out of memory. The message is one line with advice; earlier results are kept."""


@dataclass(frozen=True)
class Plan:
    """The examples of a run.

    examples: made lazily, short ones first if lengths are given.
    count: number of examples.
    tokens: total tokens of all examples, or None if unknown.
    score: (example, output) -> {"score": 0 to 1} and any other values to record.
    drafts: the same examples, not built yet; None where all were built to know their lengths.
    """

    examples: Iterable[Example]
    count: int
    tokens: int | None
    score: Callable[[Example, str], dict[str, float]]
    drafts: Sequence[Draft] | None = None

    def list_drafts(self) -> list[Draft]:
        """Return the examples as drafts, in order."""
        if self.drafts is not None:
            return list(self.drafts)
        return [Draft(example.name, lambda example=example: example) for example in self.examples]


@dataclass(frozen=True)
class Generation:
    """Settings of generation: see `generation.generate`; `chat` puts prompts that allow it into the chat template."""

    batch_size: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False


@dataclass(frozen=True)
class PerplexitySettings:
    """What the perplexity of a document is.

    convention: one of conventions.CONVENTIONS, for the perplexity. LongPPL slides as `ours` does.
    lengths: context lengths in tokens.
    stride: tokens by which the window moves; at a shorter context, the context length.
    rule: LongPPL's rule for key tokens; None skips LongPPL.
    longppl_bos: LongPPL scores the text after a BOS; its authors do not. Key tokens are found with a BOS.
    """

    convention: str
    lengths: list[int]
    stride: int
    rule: KeyTokenRule | None
    longppl_bos: bool


def run_task(
    open_model: Callable[[], LanguageModel],
    plan: Plan,
    generation: Generation,
    results: Results | PartResults,
    ranks: Ranks | None = None,
) -> list[dict[str, Any]]:
    """Answer and score every example that `results` does not have yet, on all ranks.

    Args:
        open_model: loads the model; called only if an example is missing.
        plan: the examples, and how to score them.
        generation: settings of generation.
        results: of this rank, as `sharing.open_shared` opened them; receives each record as soon as it is made.
        ranks: this process's place; None is a single rank.

    Returns: on rank 0 the records of all the plan's examples, in the plan's order; elsewhere nothing.

    Raises:
        OutOfMemory: the device ran out of memory; earlier results are kept.
    """
    ranks, drafts = ranks or Ranks(), plan.list_drafts()
    missing = [draft for draft in drafts if draft.name not in results.records]
    size = min(_BATCHES_AT_ONCE * generation.batch_size, max(len(missing), 1))
    chunks = [missing[first : first + size] for first in range(0, len(missing), size)]
    with WorkBar(plan.count, plan.tokens, shown=ranks.is_first) as bar:
        if isinstance(results, Results):
            for draft in drafts:
                if draft.name in results.records:
                    example = draft.build()
                    _check_same_example(example, results)
                    bar.skip(example.length)
        recorder, model = Recorder(ranks, results, bar), None
        batches, built = [], -1
        for chunk, number in claim_batches(ranks, [-(-len(chunk) // generation.batch_size) for chunk in chunks]):
            model = model or open_model()
            if chunk != built:
                batches, built = _make_batches(model, [draft.build() for draft in chunks[chunk]], generation), chunk
            for place, record in enumerate(_answer_batch(model, batches[number], plan, generation)):
                recorder.add(record, (chunk, number, place))
            recorder.merge()
        recorder.finish()
    return [results.records[draft.name] for draft in drafts] if ranks.is_first else []


def run_perplexity(
    open_model: Callable[[], LanguageModel],
    documents: list[Document],
    *,
    settings: PerplexitySettings,
    key: dict[str, Tensor],
    results: Results | PartResults,
    ranks: Ranks | None = None,
) -> list[dict[str, Any]]:
    """Measure the negative log-likelihood of each document at each context length, on all ranks.

    Skips the documents that `results` already has.

    Args:
        open_model: loads the model; called only if a document is missing.
        documents: tokenized texts.
        settings: what is measured.
        key: document name -> the key tokens that another model found.
        results: of this rank, as `sharing.open_shared` opened them; receives each record as soon as it is made.
        ranks: this process's place; None is a single rank.

    Returns: on rank 0 the records of all documents, as `_measure_document` returns them; elsewhere nothing.

    Raises:
        OutOfMemory: the device ran out of memory; earlier results are kept.
    """
    ranks = ranks or Ranks()
    missing = [document for document in documents if document.name not in results.records]
    places = {document.name: place for place, document in enumerate(missing)}
    total = sum(len(document.tokens) for document in documents)
    with WorkBar(len(documents), total, shown=ranks.is_first) as bar:
        if isinstance(results, Results):
            for document in documents:
                if document.name in results.records:
                    _check_lengths(document, settings, results)
                    bar.skip(len(document.tokens))
        recorder, model = Recorder(ranks, results, bar), None
        for document in take_share(ranks, missing):
            model = model or open_model()
            record = _measure_document(model, document, settings, key.get(document.name))
            recorder.add(record, (places[document.name],))
            recorder.merge()
        recorder.finish()
    return [results.records[document.name] for document in documents] if ranks.is_first else []


def _measure_document(
    model: LanguageModel, document: Document, settings: PerplexitySettings, is_key: Tensor | None
) -> dict[str, Any]:
    """Return a document's record: {"name", "tokens", "lengths": {n: {"nll", "tokens", "key_nll", "key_tokens"}}}.

    Args:
        model: the model.
        document: the document.
        settings: what is measured.
        is_key: bool [n - 1], the key tokens that another model found; None: the model finds them itself, with the
            longest context.

    Raises:
        OutOfMemory: the device ran out of memory.
    """
    convention, rule = settings.convention, settings.rule
    record: dict[str, Any] = {"name": document.name, "tokens": len(document.tokens), "lengths": {}}
    with report_out_of_memory(len(document.tokens), 1):
        bos_left_out = int(not settings.longppl_bos and model.tokenizer.bos is not None)
        for length in sorted(settings.lengths, reverse=True):
            moves = min(settings.stride, length)
            log_probs = conventions.log_probs(convention, model, document.tokens, length, moves)
            sums = _sum_losses(log_probs)
            if rule:
                if is_key is None:  # by the longest context, which holds the document by any convention
                    is_key = find_key_tokens(model, document.tokens, log_probs, rule)
                if bos_left_out or convention != "ours":
                    text = document.tokens[bos_left_out:]
                    log_probs = conventions.log_probs("ours", model, text, length, moves)
                sums |= _sum_losses(log_probs[is_key[bos_left_out:]], "key_")
            record["lengths"][str(length)] = sums
    return record


def find_key_tokens_by_model(
    open_model: Callable[[], LanguageModel], documents: list[Document], tokenizer: ModelTokenizer, rule: KeyTokenRule
) -> dict[str, Tensor]:
    """Find LongPPL's key tokens with another model, and free the model afterwards.

    Args:
        open_model: loads the other model; called only if there is a document.
        documents: tokenized texts.
        tokenizer: the tokenizer that made the documents' tokens.
        rule: decides which tokens are key tokens.

    Returns: document name -> bool [n - 1], for a document of n tokens.

    Raises:
        OutOfMemory: the other model ran out of memory.
    """
    model, found = None, {}
    for document in documents:
        model = model or open_model()
        with report_out_of_memory(len(document.tokens), 1):
            spans = find_key_spans(model, document, tokenizer, rule)
        found[document.name] = find_tokens_in_spans(document, tokenizer, spans)
    return found


def _sum_losses(log_probs: Tensor, prefix: str = "") -> dict[str, float]:
    return {f"{prefix}nll": -log_probs.double().sum().item(), f"{prefix}tokens": len(log_probs)}


def _make_batches(model: LanguageModel, examples: list[Example], generation: Generation) -> list[list[tuple]]:
    """Return batches of (example, prompt ids) with similar lengths."""
    plain, chat = model.tokenizer.encode_prompt, model.tokenizer.encode_chat
    pairs = [(example, (chat if generation.chat and example.chat else plain)(example.prompt)) for example in examples]
    pairs.sort(key=lambda pair: (pair[0].max_new_tokens, len(pair[1])))
    return [pairs[first : first + generation.batch_size] for first in range(0, len(pairs), generation.batch_size)]


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
    """Turn out-of-memory errors of the block into OutOfMemory.

    Args:
        tokens: tokens of each sample, for the message.
        samples: samples that the block runs at once, for the message.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        batch = "" if samples == 1 else "a smaller --batch-size, "
        raise OutOfMemory(
            f"out of memory at {tokens} tokens x {samples}: try {batch}a smaller --prefill-chunk, or shorter lengths. "
            "Finished results are kept, and the same command resumes."
        ) from error


def _check_same_example(example: Example, results: Results) -> None:
    """Raise UsageError if the folder's result with this name belongs to another example."""
    record = results.records[example.name]
    values = {"part": example.part, "length": example.length, "depth": example.depth, "answers": list(example.answers)}
    for key, value in values.items():
        if key in record and record[key] != value:
            _reject(example.name, f"{key} {record[key]!r}, not {value!r}", results)


def _check_lengths(document: Document, settings: PerplexitySettings, results: Results) -> None:
    """Raise UsageError if the folder's result for this document has other context lengths."""
    lengths, rule = sorted(settings.lengths, reverse=True), settings.rule
    rows = results.records[document.name].get("lengths", {})
    if rows.keys() != set(map(str, lengths)):
        _reject(document.name, f"context lengths {', '.join(rows) or 'none'}, not {lengths}", results)
    if any(("key_nll" in row) != (rule is not None) for row in rows.values()):
        _reject(document.name, f"{'no ' if rule else ''}LongPPL", results)


def _reject(name: str, reason: str, results: Results) -> NoReturn:
    raise UsageError(
        f"--output {results.folder}: its {RESULTS} has a result of {name} with {reason}. Delete that line to evaluate "
        "the example again, or give another folder, or --overwrite."
    )


def summarise_perplexity(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return perplexity by length, and LongPPL if the records have key tokens."""
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
