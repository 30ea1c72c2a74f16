"""Share the examples of an evaluation among replicas of the model, with the batches and the results of one rank.

Each replica claims a chunk of examples and builds and answers its batches. Near the end, when all chunks are claimed,
it claims single batches of the others' chunks. So the replicas end at about the same time, and all batches are those
that one rank would make.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from megatron_cream.distributed.launcher import waiting_for_peers
from megatron_cream.distributed.rendezvous import broadcast_from_rank_0
from megatron_cream.evaluation.parts import Order, PartReader, PartResults
from megatron_cream.evaluation.progress import WorkBar
from megatron_cream.evaluation.ranks import Ranks
from megatron_cream.evaluation.results import Results
from megatron_cream.evaluation.sliding_window import Document

_POLL = timedelta(seconds=1)


@contextlib.contextmanager
def open_shared(ranks: Ranks, open_results: Callable) -> Iterator[Results | PartResults]:
    """Open the results folder on rank 0, and a part of it on the others.

    Args:
        ranks: this process's place.
        open_results: opens the folder; called on rank 0 only.
    """
    if ranks.is_first:
        with open_results() as results:
            opened = {"folder": str(results.folder), "run": results.run, "finished": list(results.records)}
            broadcast_from_rank_0(json.dumps(opened))
            yield results
        return
    opened = json.loads(broadcast_from_rank_0(""))
    part = PartResults(Path(opened["folder"]), ranks.rank, opened["run"], opened["finished"])
    with contextlib.closing(part):
        yield part


class Recorder:
    """Records results of all ranks: on rank 0 in results.jsonl, on the others in their parts.

    Args:
        ranks: this process's place.
        results: of this rank, as `open_shared` opened them.
        bar: shows the progress of all ranks, on rank 0.
    """

    def __init__(self, ranks: Ranks, results: Results | PartResults, bar: WorkBar):
        self._ranks, self._results, self._bar = ranks, results, bar
        self._order: dict[str, Order] = {}
        merges = ranks.is_multi_rank and isinstance(results, Results)
        self._reader = PartReader(results.folder, results.run) if merges else None

    def add(self, record: dict[str, Any], order: Order) -> None:
        """Record a result of this rank; only a replica's leader keeps it."""
        if isinstance(self._results, PartResults):
            if self._ranks.is_leader:
                self._results.add(record, order)
            return
        self._keep(record, order)

    def merge(self) -> None:
        """On rank 0, add the results that the other ranks have written."""
        for record, order in self._reader.read_new() if self._reader else ():
            if record["name"] not in self._results.records:
                self._keep(record, order)

    def finish(self) -> None:
        """On rank 0, wait for the results of all ranks and sort them; on the others, tell that this one has ended."""
        key, others = "evaluation/ended/{}", range(1, self._ranks.world_size)
        if isinstance(self._results, PartResults):
            self._results.close()
            self._ranks.store.set(key.format(self._ranks.rank), "")
            return
        for rank in others:
            with waiting_for_peers():
                while not self._has(key.format(rank)):
                    self.merge()
        self.merge()
        self._results.sort(self._order)

    def _keep(self, record: dict[str, Any], order: Order) -> None:
        self._results.add(record)
        self._order[record["name"]] = order
        tokens = record["tokens"] if "tokens" in record else record["prompt_tokens"]
        self._bar.add(record.get("length", tokens), tokens)

    def _has(self, key: str) -> bool:
        try:
            self._ranks.store.wait([key], _POLL)
            return True
        except torch.distributed.DistStoreError:
            return False


def take_share(ranks: Ranks, documents: list[Document]) -> list[Document]:
    """Return the documents that this rank's replica measures: they have about the same length."""
    return documents[ranks.replica :: ranks.replicas]


def claim_batches(ranks: Ranks, counts: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (chunk, batch) of each batch that this rank's replica answers; all its ranks get the same.

    Args:
        ranks: this process's place.
        counts: number of batches of each chunk.
    """
    if not ranks.is_multi_rank:
        yield from ((chunk, batch) for chunk, count in enumerate(counts) for batch in range(count))
        return
    if ranks.is_leader:
        claims = _claim_as_leader(ranks.store, counts)
    for number in range(sum(counts) + 1):
        key = f"evaluation/claim/{ranks.replica}/{number}"
        if ranks.is_leader:
            claim = next(claims, None)
            if ranks.replica_size > 1:
                ranks.store.set(key, json.dumps(claim))
        else:
            with waiting_for_peers():
                claim = json.loads(ranks.store.get(key))
        if claim is None:
            return
        yield tuple(claim)


def _claim_as_leader(store: torch.distributed.Store, counts: list[int]) -> Iterator[tuple[int, int]]:
    def claim_chunk(chunk: int) -> Iterator[tuple[int, int]]:
        while (batch := store.add(f"evaluation/batches/{chunk}", 1) - 1) < counts[chunk]:
            yield chunk, batch

    while (chunk := store.add("evaluation/chunks", 1) - 1) < len(counts):
        yield from claim_chunk(chunk)
    for chunk in reversed(range(len(counts))):
        yield from claim_chunk(chunk)
